"""What a training step needs of a device's memory, estimated before there is a device."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 600 * 2**20  # CUDA context, cuBLAS workspaces and allocator slack; seen 0.4-0.7 GiB on recent drivers


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device during a training step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    teacher: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.teacher + CONTEXT

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) for a person to read."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer states", self.optimizer),
            ("moving average", self.average),
            ("activations", self.activations),
            ("teacher", self.teacher),
            ("CUDA context and workspaces", CONTEXT),
        ]
        return [(what, size) for what, size in rows if size]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def restart_peak(device: torch.device) -> None:
    """Count a GPU's peak from here on, so that what the process did before is left out; a CPU's cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: views of one storage count once."""
    plain = (part for tensor in tensors for part in _plain(tensor))
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return sum(seen.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: itself, or the parts of a subclass such as torchao's."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.data
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():  # bitsandbytes keeps scales and code books outside the parameters
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            for part in (state, state.state2):
                yield from (x for x in vars(part or state).values() if isinstance(x, Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers as they lie in memory, 4-bit scales included."""
    return storage_bytes(_held(model))


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[int, int]]:
    """Sizes of the storages that autograd keeps for the backward pass, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in _held(model)}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _step_bytes(model: nn.Module, blocks: Sequence[nn.Module], images: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes kept for the backward pass, bytes of all the blocks' inputs) of one forward pass on the CPU."""
    inputs = 0

    def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal inputs
        inputs += arguments[0].numel() * arguments[0].element_size()

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    try:
        with _recorded(model) as kept, autocast:
            model(images).float().logsumexp(1).mean()
    finally:
        for handle in handles:
            handle.remove()
    return sum(kept.values()), inputs


def activation_bytes(
    model: nn.Module, blocks: Sequence[nn.Module], image_size: int, dtype: torch.dtype, images: int, checkpointing: bool
) -> int:
    """Bytes that autograd keeps for ``images`` images: measured on one and on two images on the CPU, extended linearly.

    With checkpointing, every block's input is kept, and one block at a time is run again in full.

    Args:
        model: on the CPU, in training mode, not checkpointed; (B, 3, S, S) to (B, C).
        blocks: its blocks.
        image_size: S.
        dtype: the autocast dtype; float32 for none.
        images: the micro-batch to extend to.
        checkpointing: whether blocks are recomputed.
    """
    sizes = []
    for count in (1, 2):
        kept, inputs = _step_bytes(model, blocks, torch.randn(count, 3, image_size, image_size), dtype)
        sizes.append(kept // max(1, len(blocks)) + inputs if checkpointing else kept)
    per_image = max(0, sizes[1] - sizes[0])
    return per_image * images + max(0, sizes[0] - per_image)


def estimate(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    image_size: int,
    dtype: torch.dtype,
    micro_batch: int,
    optimizer: str,
    average: bool,
    checkpointing: bool,
    teacher: int = 0,
) -> Estimate:
    """Estimate one training step of ``model`` (on the CPU, as it will be trained) on one device.

    Args:
        blocks: the model's blocks, in order.
        image_size: pixels a side.
        dtype: autocast dtype.
        micro_batch: images at once.
        optimizer: ``adamw`` (two float32 moments) or ``adamw8bit`` (two of one byte, and small scales).
        average: whether a float32 moving average is kept.
        checkpointing: whether blocks are recomputed in the backward pass.
        teacher: bytes of the weights of a model to learn from.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    mode = model.training
    model.train()
    try:
        activations = activation_bytes(model, blocks, image_size, dtype, micro_batch, checkpointing)
    finally:
        model.train(mode)
    return Estimate(
        weights=weight_bytes(model),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=count * (8 if optimizer == "adamw" else 2),
        average=count * 4 if average else 0,
        activations=activations,
        teacher=teacher,
    )
