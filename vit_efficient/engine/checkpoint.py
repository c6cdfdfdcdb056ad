"""Checkpoints that survive a crash: written beside the old one, then put in its place."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO

from vit_efficient.engine.background import Writer, snapshot
from vit_efficient.engine.integrity import damage
from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.aside import remove, set_aside, sync
from vit_efficient.parallel.folder import has_parts, is_folder, read_folder, write_error, write_folder

STEP_FILE = re.compile(r"step-(\d+)\.ckpt")


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, flush it to the disk, and rename it over ``path``.

    Whatever goes wrong, ``path`` is either the old file or the new one, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # some writers make files that only their owner may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with set_aside(path) if is_folder(path) else nullcontext():  # the run wrote folders before
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are atomic to write, and in which nothing can run when they are read.

    One file, which one process writes; or, where tensors come sharded, a folder, to which all of them do.

    Args:
        writer: does the writing, perhaps while training goes on; None: at once.
    """

    def __init__(self, writer: Writer | None = None) -> None:
        self.writer = writer or Writer()
        self._group: dist.ProcessGroup | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous checkpoint is untouched. An
            asynchronous writer raises it later.
        """
        write = _write_folder if has_parts(checkpoint) else _write_file
        if self.writer.asynchronous:
            self.writer.wait()  # one copy in memory at a time
            if write is _write_folder and self._group is None:
                self._group = _own_group()
            checkpoint = snapshot(checkpoint)
        self.writer.do(partial(write, Path(path), checkpoint, self._group))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads with ``weights_only`` whatever the caller says."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def _own_group() -> dist.ProcessGroup:
    """Processes that agree over this one do not disturb those that train meanwhile."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every process is in it"
    return group


def _write_file(path: Path, checkpoint: dict[str, Any], group: object) -> None:
    try:
        atomic_write(path, lambda temporary: torch.save(checkpoint, temporary))
    except OSError as error:
        raise write_error(path, str(error)) from error
    except RuntimeError as error:  # torch's zip writer says at which byte it stopped, and not why
        raise write_error(path, f"a full disk, a quota, or a limit on files ({error})") from error


def _write_folder(path: Path, checkpoint: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    write_folder(path, checkpoint, group)


def name_checkpoint(source: Path, name: Path) -> None:
    """Give a checkpoint a second name, atomically: a hard link, a copy where there are none, or a link to a folder.

    Raises:
        CheckpointError: the disk is full; a name that was there before is untouched.
    """
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        if source.is_dir():
            os.symlink(source.name, temporary, target_is_directory=True)
        else:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
        os.replace(temporary, name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(name, str(error)) from error


def drop_checkpoints(newest: Path, keep: int) -> None:
    """Delete step checkpoints before ``newest`` but the ``keep`` last, it among them; no folder that a link names.

    Later ones are left: a run that went on from an earlier checkpoint writes them over when it gets there.
    """
    folder = newest.parent
    steps = sorted(p for p in folder.iterdir() if STEP_FILE.fullmatch(p.name) and p.name <= newest.name)
    named = {p.resolve() for p in folder.iterdir() if p.is_symlink()}
    for old in steps[:-keep]:
        if old.resolve() not in named:
            remove(old)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load one of our own checkpoints, file or folder, whole, on the CPU; code inside it is refused, not run.

    Raises:
        CheckpointError: missing, damaged, hostile, or not written by this package.
    """
    if is_folder(path):
        return read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    if (reason := damage(path)) is not None:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {reason}\n"
            "  It is damaged, or something else than a checkpoint (and never run). Take another one; a run's folder in "
            "its place (`--resume RUN`) finds the newest that is whole."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # torch reports damage in half a dozen ways, one of them a bare RuntimeError
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {first}\n"
            "  It is damaged, or holds something else than numbers (which is never run). Take another checkpoint."
        ) from error
    if not isinstance(checkpoint, dict) or "vit_efficient" not in checkpoint:
        raise CheckpointError(
            f"{path} was not written by a run of vit_efficient, so it cannot be resumed. "
            "To start from its weights, pass `model.weights=` with that path."
        )
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a run's ``checkpoints`` folder, or None."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*.ckpt") if (m := STEP_FILE.fullmatch(p.name))]
    return max(found)[1] if found else None
