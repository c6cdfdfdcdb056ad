"""What one training step keeps and takes, byte by byte: a step of the real modules on tensors without memory.

Nothing is modelled here. PyTorch's own autograd decides what is kept, its checkpointing what is recomputed; the bytes
are those of the storages that live (`measure.live`). What it cannot see is what CUDA kernels take inside, which is
stated in `measure.memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.measure.live import LiveBytes


@dataclass(frozen=True)
class StepBytes:
    """Bytes beside weights, gradients and states, of one micro-batch.

    Args:
        kept: what the forward pass leaves for the backward pass, the images included.
        forward: the most at any time of the forward pass.
        backward: the most at any time of the backward pass, without the gradients of weights.
        with_gradients: the same with them, where none are there when it begins: what is kept falls while they rise.
        gradients: of all trained weights, at the end.
    """

    kept: int
    forward: int
    backward: int
    with_gradients: int
    gradients: int


def step_bytes(
    model: nn.Module,
    live: LiveBytes,
    *,
    images: int,
    size: int,
    autocast: torch.dtype | None,
    teacher: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> StepBytes:
    """Run one step and count. Within `pretending(live)`, where nothing is computed.

    Args:
        model: (B, 3, S, S) to (B, C); prepared as for training.
        live: the counter that watches.
        images: B, at once on a device.
        size: S, pixels a side.
        autocast: the half precision of the step; None: float32.
        teacher: answers for the same images, without gradients.
        loss: of logits (B, C) and soft targets (B, C).
    """
    model.train()
    before = live.live
    alone, done = 0, 0

    def count(parameter: Tensor) -> None:
        nonlocal done, alone
        assert parameter.grad is not None
        alone = max(alone, live.live - before - done)
        done += parameter.grad.untyped_storage().nbytes()

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters() if p.requires_grad]
    try:
        with live.stretch() as most_forward, _autocast(autocast):
            images_B3SS = torch.empty(images, 3, size, size)
            logits_BC = model(images_B3SS)
            targets_BC = torch.empty(logits_BC.shape)
            if teacher is not None:
                with torch.no_grad():
                    targets_BC = targets_BC + teacher(images_B3SS).float().softmax(1)
            result = loss(logits_BC.float(), targets_BC)
        del logits_BC, targets_BC
        kept = live.live - before
        alone = kept
        with live.stretch() as most_backward:
            result.backward()
        gradients = done
        for parameter in model.parameters():
            parameter.grad = None
    finally:
        for handle in handles:
            handle.remove()
    return StepBytes(
        kept=kept,
        forward=most_forward() - before,
        backward=alone,
        with_gradients=most_backward() - before,
        gradients=gradients,
    )


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """float16 as well, which a CPU's autocast takes where nothing is computed."""
    return nullcontext() if dtype is None or dtype == torch.float32 else torch.autocast("cpu", dtype)
