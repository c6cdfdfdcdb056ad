"""The memory estimate against what PyTorch itself counts."""

from __future__ import annotations

import timm
import torch
from torch import nn

from vit_efficient.measure.memory import estimate, peak_memory_bytes, weight_bytes


def make(depth: int = 2) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=10)


def estimated(model: nn.Module, images: int, *, checkpointing: bool = False, optimizer: str = "adamw"):  # type: ignore[no-untyped-def]
    return estimate(
        model, list(model.blocks), image_size=32, dtype=torch.float32, micro_batch=images, optimizer=optimizer,
        average=True, checkpointing=checkpointing,
    )  # fmt: skip


def test_weights_gradients_and_states_are_counted_exactly() -> None:
    model = make()
    count = sum(p.numel() for p in model.parameters())
    needed = estimated(model, 1)
    assert needed.weights == weight_bytes(model) == 4 * count
    assert (needed.gradients, needed.optimizer, needed.average) == (4 * count, 8 * count, 4 * count)
    assert estimated(model, 1, optimizer="adamw8bit").optimizer == 2 * count


def test_frozen_weights_need_neither_gradients_nor_states() -> None:
    model = make()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    head = sum(p.numel() for p in model.head.parameters())
    assert estimated(model, 1).gradients == 4 * head
    assert estimated(model, 1).activations < estimated(make(), 1).activations


def test_activations_grow_with_images_and_shrink_with_checkpointing() -> None:
    one, eight = (estimated(make(4), n).activations for n in (1, 8))
    assert 6 < eight / one <= 8.5
    assert estimated(make(4), 8, checkpointing=True).activations < 0.5 * eight


def test_activations_equal_a_real_step_of_eight_images() -> None:
    """The straight line through one and two images, against the storages that a step of eight really keeps."""
    model = make().train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(8, 3, 32, 32)).float().logsumexp(1).mean()
    assert abs(estimated(model, 8).activations / sum(kept.values()) - 1) < 0.05


def test_peak_memory_of_a_process_is_plausible() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40
