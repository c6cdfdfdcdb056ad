"""How many bytes are alive while PyTorch works, counted tensor by tensor; with fake tensors, without a device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: the CUDA caching allocator hands out multiples of it


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from the moment they are made until nothing refers to them.

    This is what `torch.cuda.max_memory_allocated` counts on a GPU, but for what kernels take inside (cuBLAS'
    workspaces). Under `FakeTensorMode` no byte is really taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    @contextmanager
    def stretch(self) -> Iterator[Callable[[], int]]:
        """Within the block `peak` counts anew; call what is yielded for the most that was alive in it."""
        before, self.peak = self.peak, self.live
        yield lambda: self.peak
        self.peak = max(before, self.peak)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: views of one storage count once."""
    plain = (part for tensor in tensors for part in _plain(tensor))
    storages = [tensor.untyped_storage() for tensor in plain]  # alive, so that no address is used twice
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: itself, or the parts of a subclass such as torchao's."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.data
    if isinstance(tensor, FakeTensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
