"""The index of PyTorch's distributed checkpoint (DCP), read without running anything in it.

The index is a pickle, and reading a pickle can run code. This reader knows the few classes of an index and refuses
everything else, so a folder from anywhere is as harmless as a single file.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

INDEX = ".metadata"  # DCP's name
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
}  # fmt: skip
PATH = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}  # the latter as Python 3.13 writes it, and no other


class IndexReader(dcp.FileSystemReader):
    """DCP's own reader, but for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises:
        pickle.UnpicklingError: it asks for more than names and numbers, or is no index.
        """
        with open(Path(self.path) / INDEX, "rb") as file:
            index: Metadata = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def part_sizes(folder: Path) -> dict[str, int]:
    """Bytes that each part of a checkpoint must have at least, by its name.

    Raises:
        pickle.UnpicklingError: as `IndexReader`.
    """
    sizes: dict[str, int] = {}
    for place in (IndexReader(folder).read_metadata().storage_data or {}).values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    return sizes


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        if (module, name) in PATH:
            return PosixPath
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its index asks Python to load `{module}.{name}`, which could run code")
