"""Adapters go on the base that they were trained on, or on none."""

from __future__ import annotations

import pytest

from vit_efficient.errors import CheckpointError
from vit_efficient.model.origin import Origin, check_same_base

BASE = Origin("runs/base/model.safetensors", "ab" * 32)


def test_the_same_base_may_lie_elsewhere() -> None:
    check_same_base(BASE.state(), Origin("copy.safetensors", BASE.sha256), "x.ckpt")
    check_same_base(None, None, "x.ckpt")  # random weights, made again from the seed


@pytest.mark.parametrize(
    ("saved", "now", "text"),
    [
        (BASE.state(), Origin(BASE.source, "cd" * 32), r"trained on runs/base/model\.safetensors with sha256 abababab"),
        (BASE.state(), None, "the weights are random now"),
        (None, BASE, "it names no base"),
    ],
)
def test_another_base_is_refused(saved: dict[str, str] | None, now: Origin | None, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        check_same_base(saved, now, "x.ckpt")
    assert str(caught.value).startswith("x.ckpt holds adapters of")
