"""Names of classes as tables give them, and lists of names in messages."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

_NAMED = 5


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names by label: in alphabetical order or, where all are whole numbers, in that of the numbers.

    So numbers from 0 upwards keep their place. A warning tells where numbers have gaps or start elsewhere, and labels
    are therefore not the numbers of the table.
    """
    distinct = set(names)
    if not all(name.isascii() and name.isdecimal() for name in distinct):
        return tuple(sorted(distinct))
    ordered = tuple(sorted(distinct, key=lambda name: (int(name), name)))
    if ordered != tuple(map(str, range(len(ordered)))):
        log.warning(
            "the labels are %d numbers from %s to %s, not 0 to %d: label k of the shards is the k-th of them",
            len(ordered), ordered[0], ordered[-1], len(ordered) - 1,
        )  # fmt: skip
    return ordered


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
