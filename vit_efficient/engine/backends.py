"""The ways to run a deployed model's integer layers, and what is seen of each layer while one of them runs.

A backend is a name, how exact it must be, why it cannot run here, and a context in which the model's integer layers run
on it. To add one, add an entry to `BACKENDS`; one that only brings another product uses `substituted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.kernels.int8_linear import op, reference
from vit_efficient.quantization.int8_layers import DeployedInt8, to_image, to_patches

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """One integer layer in one forward: M tokens, K inputs, N outputs."""

    name: str
    layer: DeployedInt8
    x: Tensor
    """The layer's input: (..., K), or images (B, C, H, W)."""
    codes: Tensor
    """What entered the product, int8 (M, K)."""
    y: Tensor
    """The layer's output, (M, N)."""


@dataclass(frozen=True)
class Backend:
    """One way to run integer layers.

    Args:
        exact: whether codes and outputs must equal the definition's bit for bit; else `verify` states its bound.
        absent: why it cannot run on a device, or None.
        using: while it lasts, the model's integer layers run on this backend.
    """

    exact: bool
    absent: Callable[[torch.device], str | None]
    using: Callable[[nn.Module], AbstractContextManager[Any]]


def integer_layers(model: nn.Module) -> dict[str, DeployedInt8]:
    """The deployed layers that multiply integers, by name; not those whose weights alone are quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DeployedInt8) and module.scheme.activations != "none"
    }


def in_float32(model: nn.Module) -> nn.Module:
    """Hold the layers that stay floating point in float32, in place: a run in half precision ships them in that."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.float32)
    return model


# -- the definition ---------------------------------------------------------------------------------------------------


def definition(layer: DeployedInt8, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `kernels.int8_linear.reference` makes of a layer's input: codes (M, K) and outputs (M, N) in `dtype`."""
    scheme, weight_NK = layer.scheme, layer.weight_codes()
    with torch.autocast(x.device.type, enabled=False):  # which would round the sums
        tokens = to_patches(x, layer.shape[2:])[0] if layer.deployed == "patches" else x
        x_MK = tokens.reshape(-1, tokens.shape[-1])
        if layer.shift is not None:
            x_MK = x_MK.to(torch.float32) - layer.shift
        if layer.smooth is not None:
            x_MK = x_MK.to(torch.float32) / layer.smooth
        q_MK, scale_M1 = reference.quantize_activations(x_MK, scheme, layer.input_scale)
        if scheme.group is None:
            sum_MN, scale_N = reference.int8_matmul(q_MK, weight_NK), layer.weight_scale.reshape(-1)
        else:
            sum_MN = reference.grouped_matmul(q_MK, weight_NK, layer.weight_scale, scheme.group)
            scale_N = torch.ones_like(layer.weight_scale[:, 0])
        return q_MK, reference.epilogue(sum_MN, scale_M1, scale_N, layer.bias, dtype)


@contextmanager
def defined(model: nn.Module) -> Iterator[None]:
    """Integer layers answer what the definition says, whatever they would have answered themselves."""

    def answer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, DeployedInt8)
        (x,) = inputs
        _, y_MN = definition(layer, x, output.dtype)
        if layer.deployed == "linear":
            return y_MN.view(output.shape)
        return to_image(y_MN.view(output.shape[0], -1, output.shape[1]), (output.shape[2], output.shape[3]))

    with ExitStack() as stack:
        for layer in integer_layers(model).values():
            stack.callback(layer.register_forward_hook(answer).remove)
        yield


# -- products ---------------------------------------------------------------------------------------------------------


class _Substituted(TorchDispatchMode):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vit_efficient.int8_matmul.default:
            return self.product(*args)
        return func(*args, **(kwargs or {}))


def substituted(product: Product) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """A backend's `using` that runs `product` (int8 (M, K) and (N, K) to int32 (M, N)) in the place of our own."""
    return lambda model: _Substituted(product)


def _int_mm_absent(device: torch.device) -> str | None:
    if device.type == "cpu" and not op.cpu_int_mm_is_exact():
        return "torch._int_mm saturates on this processor (no VNNI), so the layers do without it here"
    return None


def _float32_absent(device: torch.device) -> str | None:
    return None if _int_mm_absent(device) else "the layers take torch._int_mm here"


BACKENDS: dict[str, Backend] = {
    "reference": Backend(True, lambda device: None, defined),
    # The model as it is deployed: the operation `int8_matmul` takes `torch._int_mm` where that is exact.
    "torch._int_mm": Backend(True, _int_mm_absent, lambda model: nullcontext()),
    "float32 sums": Backend(True, _float32_absent, lambda model: nullcontext()),
}


# -- observation ------------------------------------------------------------------------------------------------------


class _Operands(TorchDispatchMode):
    """Keeps the activations' codes of every integer product."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vit_efficient.int8_matmul.default:
            self.codes.append(args[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, backend: Backend, see: Callable[[Seen], None]) -> Tensor:
    """Run `model` on `backend` and show every integer layer as it ends.

    The codes shown are those that entered the layer's product: a layer with groups has several, which are joined. A
    backend that does without the operation `int8_matmul` is believed to quantize as `DeployedInt8.codes` does.

    Returns:
        Logits (B, C), float32.
    """
    operands = _Operands()

    def begin(layer: nn.Module, inputs: Any) -> None:
        operands.codes.clear()

    def end(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, DeployedInt8)
            codes = torch.cat(operands.codes, dim=1) if operands.codes else layer.codes(inputs[0])[0]
            tokens = output.flatten(2).transpose(1, 2) if layer.deployed == "patches" else output
            see(Seen(name, layer, inputs[0], codes, tokens.reshape(-1, tokens.shape[-1])))

        return hook

    with ExitStack() as stack:
        stack.enter_context(backend.using(model))
        for name, layer in integer_layers(model).items():
            stack.callback(layer.register_forward_pre_hook(begin).remove)
            stack.callback(layer.register_forward_hook(end(name)).remove)
        stack.enter_context(operands)
        return model(images).float()
