"""Checkpoints as folders: every process writes its part of every tensor, and any number of processes reads them.

PyTorch's distributed checkpoint (DCP) keeps the tensors; what is not a tensor lies beside them in one small file, with
the size and checksum of every other. A folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.aside import remove, set_aside, sync
from vit_efficient.parallel.index import INDEX, IndexReader
from vit_efficient.parallel.sums import REST, Sums, folder_damage, sums_of

T = TypeVar("T")
Place = tuple[str | int, ...]


def is_folder(path: Path) -> bool:
    """Whether a path is such a checkpoint. It gets its name when it is whole; `folder_damage` tells if it still is."""
    return (path / REST).is_file() or (path / INDEX).is_file()


def has_parts(checkpoint: Mapping[str, Any]) -> bool:
    """Whether some tensor in a checkpoint is sharded, so that it must be written as a folder."""
    return any(isinstance(tensor, DTensor) for _, tensor in _tensors(checkpoint))


def write_folder(path: Path, checkpoint: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint as a folder, atomically; every process calls it with its own parts.

    Args:
        path: the folder to make; one of that name is replaced.
        checkpoint: dicts and lists of tensors, sharded or not, and plain values.
        group: that the processes agree over; None: the usual one.

    Raises:
        CheckpointError: a process cannot write; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # the same in every process
    first, own = dist.get_rank() == 0, dist.get_rank(group)
    tensors = {"/".join(map(str, place)): tensor for place, tensor in _tensors(checkpoint)}
    try:
        _each(group, partial(_make_anew, temporary) if first else None)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
        sums = _each(group, lambda: sums_of(temporary.glob(f"__{own}_*")))
        _each(group, partial(_finish, temporary, path, checkpoint, sums) if first else None)
    except (dcp.CheckpointException, _PartError) as error:
        if first:
            with suppress(OSError):  # the same trouble again
                remove(temporary)
        dist.barrier(group)  # a process that leaves with an error ends the others, and the first has to clear away
        raise write_error(path, _cause(error)) from error


class _PartError(Exception):
    """What one process could not do, in the words of all."""


def _each(group: dist.ProcessGroup | None, act: Callable[[], T] | None) -> list[T | None]:
    """What ``act`` gave in every process, by rank, when all have done it; None: this one has nothing to do.

    Raises:
        _PartError: in all of them, when one failed.
    """
    value, cause = None, ""
    try:
        value = act() if act is not None else None
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        cause = _cause(error)
    # Errors of this call itself are no full disk but a lost process, and go their own way.
    said: list[tuple[T | None, str]] = [(value, cause)] * dist.get_world_size(group)
    dist.all_gather_object(said, (value, cause), group)
    for number, (_, cause) in enumerate(said):
        if cause:
            raise _PartError(f"{cause} (process {number})")
    return [value for value, _ in said]


def _make_anew(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _finish(temporary: Path, path: Path, checkpoint: Mapping[str, Any], sums: list[Sums | None]) -> None:
    """Add what is not a tensor, and give the folder its name."""
    files = sums_of([temporary / INDEX])
    for part in sums:
        files |= part or {}
    places = [place for place, _ in _tensors(checkpoint)]
    rest = io.BytesIO()  # to a file that cannot be written, torch's zip writer says only where it stopped
    torch.save({"tree": _without_tensors(checkpoint), "places": places, "files": files}, rest)
    with open(temporary / REST, "wb") as file:
        file.write(rest.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    sync(temporary)
    with set_aside(path):
        os.rename(temporary, path)
        sync(path.parent)


def write_error(path: Path, cause: str) -> CheckpointError:
    """What to say when a checkpoint, file or folder, cannot be written."""
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return CheckpointError(
        f"Cannot write the checkpoint {path}: {cause}. There are {free:,} bytes free.\n"
        "  What was half written is removed, and the checkpoints before it are untouched. Free some space, "
        "then continue with `--resume auto`."
    )


def read_folder(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """A checkpoint that `write_folder` wrote, whatever wrote it.

    Args:
        path: the folder.
        like: this process's parameters by name. What belongs to one that is sharded, and has its shape, comes back
            sharded in the same way, and only this process's part is read. None: everything whole, on the CPU.

    Raises:
        CheckpointError: damaged, or its index asks for more than names and numbers, which is not run.
    """
    if (reason := folder_damage(path)) is not None:
        raise _read_error(path, reason)
    reader = IndexReader(path)
    try:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        index = reader.read_metadata()
        places: dict[str, Place] = {"/".join(map(str, place)): tuple(place) for place in rest["places"]}
        entries = {key: index.state_dict_metadata[key] for key in places}
        tensors = {key: _empty(entry, places[key], like or {}) for key, entry in entries.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            dcp.load(tensors, storage_reader=reader, no_dist=True)  # each process knows by itself what it needs
    except (
        dcp.CheckpointException, OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        raise _read_error(path, _cause(error)) from error
    tree: dict[str, Any] = rest["tree"]
    for key, place in places.items():
        holder: Any = tree
        for part in place[:-1]:
            holder = holder[part]
        holder[place[-1]] = tensors[key]
    return tree


def _read_error(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot read the checkpoint {path}: {cause}\n"
        "  It is damaged, or holds something else than numbers (which is never run). Take another one; a run's folder "
        "in its place (`--resume RUN`) finds the newest that is whole."
    )


def _empty(entry: Any, place: Place, like: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError("its index has something else than tensors")
    dtype = entry.properties.dtype
    for part in place:
        parameter = like.get(str(part))
        if isinstance(parameter, DTensor) and parameter.shape == entry.size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def _tensors(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, (*place, key))


def _without_tensors(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_tensors(value) for value in tree]
    return None if isinstance(tree, Tensor) else tree


def _cause(error: BaseException) -> str:
    """The first line of what went wrong; DCP wraps it, for each process by its number."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        number, (inner, _) = next(iter(error.failures.items()))
        return f"{_cause(inner)} (process {number})"
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
