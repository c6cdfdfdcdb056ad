"""Finds a checkpoint that is damaged before anything is built on it, and the one to take instead."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.sums import file_damage, folder_damage


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, file or folder, or None. What is there is read once only."""
    if path.is_dir():
        return folder_damage(path)
    status = path.stat()
    return _damage(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _damage(path: Path, _inode: int, _size: int, _changed: int) -> str | None:
    return file_damage(path)


def candidates(folder: Path) -> Iterator[Path]:
    """The checkpoints in a run's ``checkpoints`` folder, best to resume from first.

    By step, the newest first; then ``last.ckpt`` and ``best.ckpt`` where they are files of their own, and not other
    names of one that was there already.
    """
    numbered = sorted(folder.glob("step-*.ckpt"), key=lambda path: path.name, reverse=True)
    seen: set[tuple[int, int]] = set()
    for path in (*numbered, folder / "last.ckpt", folder / "best.ckpt"):
        if not path.exists():
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield path


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for each newer one that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    refused: list[str] = []
    for path in candidates(folder):
        if (reason := damage(path)) is None:
            return path, refused
        refused.append(f"{path} is damaged: {reason}")
    if refused:
        raise CheckpointError(
            "Every checkpoint of this run is damaged:\n" + "\n".join(f"    {line}" for line in refused) + "\n"
            "  The run cannot go on. Begin it anew in another `run.dir`."
        )
    return None, []
