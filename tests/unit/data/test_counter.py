from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vit_efficient.data.counter import hash_int, hash_words, mix, permutation, permute_index


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_index_is_a_permutation(size: int, key: int) -> None:
    image = permute_index(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_permute_index_takes_each_element_by_its_own_size_and_key(sizes: list[int]) -> None:
    keys = hash_words(1, np.arange(len(sizes)))
    index = np.array([size - 1 for size in sizes])
    together = permute_index(index, np.array(sizes), keys)
    for row, size in enumerate(sizes):
        alone = permute_index(index[row : row + 1], np.array([size]), keys[row : row + 1])
        assert together[row] == alone[0] < size


def test_permute_index_reaches_far_beyond_memory() -> None:
    size = 10**15
    index = np.array([0, 1, size // 2, size - 1])
    image = permute_index(index, np.full(4, size), np.full(4, 7, np.uint64))
    assert len(set(image.tolist())) == 4
    assert image.min() >= 0
    assert image.max() < size


def test_all_permutations_of_four_are_equally_likely() -> None:
    trials = 24_000
    keys = hash_words(3, np.arange(trials))
    images = [permute_index(np.full(trials, i), np.full(trials, 4), keys).tolist() for i in range(4)]
    seen = Counter(zip(*images, strict=True))
    assert len(seen) == 24
    chi_squared = sum((count - 1000) ** 2 / 1000 for count in seen.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_permutation_depends_on_its_whole_key() -> None:
    orders = {tuple(permutation(50, *key)) for key in ((1, 2), (2, 1), (1, 3), (1, 2, 0))}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_draws_never_change() -> None:
    """A checkpoint of today must mean the same order tomorrow, whatever NumPy does."""
    assert hash_int(1, 2, 3) == 0xD0734750FDE362B3
    assert mix(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0, as published
    assert hash_int(-1) == hash_int(2**64 - 1)
    assert permutation(8, 1, 2).tolist() == [5, 1, 3, 2, 6, 0, 7, 4]
    assert permute_index(np.arange(8), np.full(8, 8), np.full(8, 5, np.uint64)).tolist() == [5, 4, 1, 3, 2, 6, 7, 0]
