"""Checkpoints as folders: every process writes its part of every tensor, and any number of processes reads them.

PyTorch's distributed checkpoint (DCP) keeps the tensors; what is not a tensor lies beside them in one small file. A
folder is written under another name and renamed when it is whole. DCP's own index is a pickle, and reading a pickle can
run code; here it is read by a reader that knows the few classes of an index and refuses everything else, so a folder
from anywhere is as harmless as a single file.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vit_efficient.errors import CheckpointError

REST = "rest.pt"  # what is not a tensor, readable with `weights_only`
INDEX = ".metadata"  # DCP's name
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"PosixPath"},
}  # fmt: skip
Place = tuple[str | int, ...]


def is_folder(path: Path) -> bool:
    """Whether a path is such a checkpoint, whole: it gets its name last."""
    return (path / REST).is_file() and (path / INDEX).is_file()


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
    first = dist.get_rank() == 0
    tensors = {"/".join(map(str, place)): tensor for place, tensor in _tensors(checkpoint)}
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier(group)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
    except (dcp.CheckpointException, OSError) as error:
        raise CheckpointError(
            f"Cannot write the checkpoint {path}: {_first(error)}. Checkpoints written before are untouched.\n"
            "  Free some space (`df -h`), then continue with `--resume auto`."
        ) from error
    if first:
        places = [place for place, _ in _tensors(checkpoint)]
        with open(temporary / REST, "wb") as file:
            torch.save({"tree": _without_tensors(checkpoint), "places": places}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    dist.barrier(group)  # nobody looks for what the first process has not named yet


def read_folder(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """A checkpoint that `write_folder` wrote, whatever wrote it.

    Args:
        path: the folder.
        like: this process's parameters by name. What belongs to one that is sharded, and has its shape, comes back
            sharded in the same way, and only this process's part is read. None: everything whole, on the CPU.

    Raises:
        CheckpointError: damaged, or its index asks for more than names and numbers, which is not run.
    """
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
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {_first(error)}\n"
            "  It is damaged, or holds something else than numbers (which is never run). Take another checkpoint."
        ) from error
    except dcp.CheckpointException as error:
        raise CheckpointError(f"Cannot read the checkpoint {path}: {_first(error)}\n  Take another one.") from error
    tree: dict[str, Any] = rest["tree"]
    for key, place in places.items():
        holder: Any = tree
        for part in place[:-1]:
            holder = holder[part]
        holder[place[-1]] = tensors[key]
    return tree


class IndexReader(dcp.FileSystemReader):
    """Reads DCP's index without running anything in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            index: Metadata = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its index asks Python to load `{module}.{name}`, which could run code")


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


def _first(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
