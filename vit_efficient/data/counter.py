"""Counter-based randomness: every draw is a pure function of integers such as (seed, epoch, sample).

Nothing here keeps a state, so nothing has to be saved, and no draw depends on who made it or on what was drawn before.
The functions are fixed bit by bit: NumPy promises a stable stream for `Philox.random_raw`, not for `permutation`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Domain(IntEnum):
    """What a draw is for; the first word of every key, so that draws for two purposes never meet."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    AUGMENT = 3
    MIX_KIND = 4
    MIX = 5
    SOURCE_ORDER = 6
    SPLIT = 7
    DROPOUT = 8
    CALIBRATION = 9


U64 = NDArray[np.uint64]
MASK = (1 << 64) - 1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(x: U64) -> U64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), elementwise: a bijection of 64 bits that looks random."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hash_words(*words: int | NDArray[np.integer]) -> U64:
    """64-bit hashes of integer tuples; the words are broadcast against each other, the result is at least 1-d."""
    state = np.zeros(1, np.uint64)
    for word in words:
        bits = np.uint64(word & MASK) if isinstance(word, int) else np.asarray(word).astype(np.uint64)
        state = mix(state ^ bits)
    return state


def hash_int(*words: int) -> int:
    """One 64-bit hash, as a Python int."""
    return int(hash_words(*words)[0])


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A pseudo-random permutation of `range(size)`, materialised: for shards and classes, not for samples."""
    philox = np.random.Philox(key=np.array([hash_int(*key), 0], np.uint64))
    return np.argsort(philox.random_raw(size), kind="stable")


def permute_index(index: NDArray[np.int64], size: NDArray[np.int64], key: U64) -> NDArray[np.int64]:
    """Where a keyed pseudo-random permutation of `range(size)` sends `index`; O(1) memory for any size.

    A Feistel network whose two halves live in Z_a x Z_b with a = ceil(sqrt(size)) and b = ceil(size / a), so that
    a * b exceeds `size` by less than a; the few images past `size` walk on along their cycle until they fall inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: positions, each in [0, size).
        size: domain size of each element (elementwise, so one call serves many shards).
        key: 64-bit key of each element.
    """
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    b = (size.astype(np.uint64) + a - np.uint64(1)) // a
    result = index.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        result[walking] = _rounds(result[walking], a[walking], b[walking], key[walking])
        walking = walking[result[walking] >= size[walking].astype(np.uint64)]
    return result.astype(np.int64)


def _rounds(x: U64, a: U64, b: U64, key: U64) -> U64:
    left, right = x // b, x % b
    for number in range(0, 8, 2):
        left = (left + mix(mix(right ^ key) + np.uint64(number))) % a
        right = (right + mix(mix(left ^ key) + np.uint64(number + 1))) % b
    return left * b + right
