from __future__ import annotations

import logging

import pytest

from vit_efficient.data.sources.classes import order_classes, some


def test_names_are_ordered_and_numbers_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert order_classes(["dog", "cat", "dog", "10"]) == ("10", "cat", "dog")
    assert order_classes(map(str, reversed(range(12)))) == tuple(map(str, range(12)))  # not 0, 1, 10, 11, 2
    assert not caplog.records


@pytest.mark.parametrize("numbers", [("1", "2", "3"), ("0", "2"), ("00", "01")])
def test_numbers_with_gaps_are_told(numbers: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert order_classes(numbers) == numbers
    assert f"numbers from {numbers[0]} to {numbers[-1]}, not 0 to {len(numbers) - 1}" in caplog.text


def test_long_lists_are_cut() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some([str(n) for n in range(2000)]) == "0, 1, 2, 3, 4 and 1,995 more"
