"""A checkpoint takes the place of another, and none is lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.parallel.aside import aside, set_aside


@pytest.fixture
def there(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000003.ckpt"
    path.mkdir()
    (path / "content").write_text("old")
    return path


def test_replaced(there: Path) -> None:
    with set_aside(there):
        there.mkdir()
        (there / "content").write_text("new")
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    assert (there / "content").read_text() == "new"


def test_put_back_after_an_error(there: Path) -> None:
    with pytest.raises(OSError, match="full"), set_aside(there):
        raise OSError("full")
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    assert (there / "content").read_text() == "old"


def test_found_after_a_kill(there: Path) -> None:
    context = set_aside(there)
    context.__enter__()  # and no more
    ((old, path),) = aside(there.parent)
    assert path == there
    assert (old / "content").read_text() == "old"
    there.mkdir()  # it was replaced before the kill
    assert list(aside(there.parent)) == []
