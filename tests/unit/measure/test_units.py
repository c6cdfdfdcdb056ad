"""Numbers as people read them."""

from __future__ import annotations

import pytest

from vit_efficient.measure.table import result_table, worst_classes
from vit_efficient.measure.units import count, duration, size, wilson


def test_text() -> None:
    assert count(304_326_632) == "304 M"
    assert size(11_534_336) == "11.5 MB"
    assert [duration(s) for s in (3.21, 75.2, 7260)] == ["3.2 s", "1 min 15 s", "2 h 01 min"]


def test_wilson_interval() -> None:
    # Reference values: Newcombe 1998, table I, method 3 (score): 81/263 -> 0.2553 to 0.3662; 0/20 -> 0 to 0.1611.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_worst_classes_skip_those_without_images() -> None:
    assert worst_classes({"a": 0.5, "b": None, "c": 0.25, "d": 1.0})[0] == ("c", 0.25)


def test_table_has_every_row() -> None:
    metrics = {
        "top1": 0.9, "top5": 1.0, "f1": 0.9, "loss": 0.3, "samples": 360, "per_class": {"0": 1.0, "1": 0.8},
        "weight_bytes": 250, "fp32_bytes": 1000,
    }  # fmt: skip
    table = result_table("t", metrics)
    rows = list(table.columns[0].cells)
    assert rows == ["top-1", "top-5", "macro F1", "eval loss", "weakest classes", "size on disk"]
    assert "0.25 of fp32" in list(table.columns[1].cells)[-1]
    assert "n = 360" in next(iter(table.columns[1].cells))
