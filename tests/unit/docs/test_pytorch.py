"""The code on docs/pytorch.md runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "pytorch.md"


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "11 of 12 blocks fused",
        "not fused: blocks.0: attn.qkv is kept in floating point",
        "quantized apart: input of attn.proj in blocks.1 .. blocks.11 (11): attention ends in floating point",
    ]
    assert (tmp_path / "quantized.pt2").is_file()
