"""A recipe's model without its bytes: every tensor has a shape, a dtype and a place, and no memory behind it.

What `build` makes of a 7-billion-weight model in minutes and 27 GB takes seconds and nothing here, and a training step
on it runs through the same modules, the same autograd and the same checkpointing as the real one. So what a step would
take can be counted (`measure.step_bytes`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.kernels.int8_linear import passes
from vit_efficient.model.build import Built, build_model
from vit_efficient.recipe.schema import Recipe


def prime() -> None:
    """bitsandbytes makes a table from numbers when it first wants it, and keeps it: let it be a real one.

    To be called before 4-bit layers are made on the `meta` device.
    """
    import bitsandbytes.functional as bnb

    if "dynamic" not in bnb.name2qmap:
        bnb.name2qmap["dynamic"] = bnb.create_dynamic_map()


def outline(recipe: Recipe, num_classes: int) -> Built:
    """What `build_model` would make, with tensors on the `meta` device, which have shapes only. Outside `pretending`.

    Attention by another kernel becomes `sdpa`: it keeps the same tensors for the backward pass as FlashAttention does.

    Args:
        recipe: resolved; its weight file is not looked for.
        num_classes: outputs of the head.

    Raises:
        UserError: as `build_model` does.
    """
    prime()
    forced = recipe.attention.kernel if isinstance(recipe.attention, SdpaConfig) else "auto"
    update = {
        "attention": SdpaConfig(kernel="math" if forced == "math" else "auto"),
        "model": recipe.model.model_copy(update={"weights": None}),
    }
    with torch.device("meta"):
        return build_model(recipe.model_copy(update=update), num_classes)


@contextmanager
def pretending(watch: TorchDispatchMode | None = None) -> Iterator[None]:
    """Within the block, what PyTorch makes has no memory behind it. Nothing made here may be used outside.

    Args:
        watch: sees every operation.
    """
    with _whole_matrices(), FakeTensorMode(allow_non_fake_inputs=True):
        if watch is None:
            yield
        else:
            with watch:
                yield


@contextmanager
def _whole_matrices() -> Iterator[None]:
    """Integer layers pass over a whole matrix at once, as on a GPU, and not by pieces for a CPU's cache."""
    own = passes.BLOCK
    try:
        passes.BLOCK = sys.maxsize
        yield
    finally:
        passes.BLOCK = own


def pretend(model: nn.Module) -> None:
    """Put pretended tensors in the place of a model's own, which may be on the `meta` device; in `pretending`.

    They are on a pretended CPU, as PyTorch's autograd wants a real GPU for a pretended one. What a GPU does otherwise
    is put right: norms under autocast.
    """
    replaced: list[nn.Parameter] = []  # alive, so that no id is used twice
    parameters: dict[int, nn.Parameter] = {}  # one that two modules share stays shared

    def of(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def parameter(own: nn.Parameter) -> nn.Parameter:
        if id(own) not in parameters:
            new = nn.Parameter(of(own), requires_grad=own.requires_grad)
            if (state := getattr(own, "quant_state", None)) is not None:
                new.quant_state = quant_state(state)  # type: ignore[attr-defined]
            parameters[id(own)] = new
            replaced.append(own)
        return parameters[id(own)]

    def quant_state(state: Any) -> Any:
        """bitsandbytes' scales and code books, in place."""
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                setattr(state, name, of(value))
        if state.state2 is not None:
            quant_state(state.state2)
        return state

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            _in_float32(module)
        for name, own in module._parameters.items():
            if own is not None:
                module._parameters[name] = parameter(own)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = of(buffer)


def _in_float32(norm: nn.Module) -> None:
    """CUDA's autocast normalises in float32, whatever comes in; a CPU's, in the dtype that comes in."""
    own = norm.forward

    def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return own(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **named)

    norm.forward = forward
