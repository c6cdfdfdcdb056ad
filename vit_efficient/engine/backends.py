"""The ways to run the parts of a deployed model that compute on codes, and what is seen of each while one of them runs.

A backend is a name, how exact it must be, which models it serves, why it cannot run here, and a context in which the
parts run on it. To add one, add an entry to `BACKENDS`; one that only brings another product uses `substituted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.engine.parts import (
    Inputs,
    Layer,
    Part,
    attention_codes,
    attention_dtype,
    code_layers,
    comparable,
    definition,
    fp8_layers,
    integer_layers,
)
from vit_efficient.kernels.capability import lacks_triton
from vit_efficient.kernels.fp8_linear.op import has_units
from vit_efficient.kernels.int8_linear import op, reference
from vit_efficient.quantization.fp8_attention import Fp8Attend
from vit_efficient.quantization.fp8_layers import DeployedFp8
from vit_efficient.quantization.int8_attention import Int8Attend, code_attention
from vit_efficient.quantization.int8_layers import DeployedInt8, to_image

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """One part in one forward."""

    name: str
    part: Part
    inputs: Inputs
    codes: Tensor
    """What entered its product, as `parts.definition` gives it."""
    y: Tensor
    """Its output, of a layer as (M, N)."""


@dataclass(frozen=True)
class Backend:
    """One way to run the parts.

    Args:
        exact: whether codes must equal the definition's bit for bit, and outputs where their sums are exact; else
            `verify` states its bound.
        absent: why it cannot run on a device, or None.
        using: while it lasts, the model's parts run on this backend.
        serves: whether a model has parts that it runs otherwise than the other backends do.
    """

    exact: bool
    absent: Callable[[torch.device], str | None]
    using: Callable[[nn.Module], AbstractContextManager[Any]]
    serves: Callable[[nn.Module], bool] = lambda model: bool(integer_layers(model))


def in_float32(model: nn.Module) -> nn.Module:
    """Hold the layers that stay floating point in float32, in place: a run in half precision ships them in that."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.float32)
    return model


# -- the definition ---------------------------------------------------------------------------------------------------


def by_definition(name: str, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's output (M, N) as the definition has it."""
    return definition(layer, Inputs((x,), {}), dtype)[1]


@contextmanager
def defined(
    model: nn.Module, layers: Callable[[str, Layer, Tensor, torch.dtype], Tensor] = by_definition
) -> Iterator[None]:
    """Every part answers what the definition says, whatever it would have answered itself.

    Args:
        model: deployed; its blocks not fused.
        layers: what layers answer: from name, layer, input and the output's dtype to (M, N).
    """

    def answering(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def answer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(layer, DeployedInt8 | DeployedFp8)
            y_MN = layers(name, layer, inputs[0], output.dtype)
            if layer.deployed == "linear":
                return y_MN.view(output.shape)
            return to_image(y_MN.view(output.shape[0], -1, output.shape[1]), (output.shape[2], output.shape[3]))

        return answer

    def attend(part: Int8Attend | Fp8Attend) -> Callable[..., Tensor]:
        def run(*tensors: Tensor, **options: Any) -> Tensor:
            inputs = Inputs(tensors, options)
            return definition(part, inputs, attention_dtype(inputs))[1]

        return run

    with ExitStack() as stack:
        for name, layer in code_layers(model).items():
            stack.callback(layer.register_forward_hook(answering(name)).remove)
        for part in code_attention(model).values():
            stack.enter_context(_attending(part, attend(part)))
        yield


@contextmanager
def _attending(part: Int8Attend | Fp8Attend, run: Callable[..., Tensor]) -> Iterator[None]:
    """While it lasts, `part.attend` is `run`."""
    own = part.__dict__.get("attend")
    part.__dict__["attend"] = run
    try:
        yield
    finally:
        if own is None:
            del part.__dict__["attend"]
        else:
            part.__dict__["attend"] = own


# -- products ---------------------------------------------------------------------------------------------------------


class _Substituted(TorchDispatchMode):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vit_efficient.int8_matmul.default:
            return self.product(*args)
        if func is torch.ops.vit_efficient.linear.default and args[0].dtype == torch.int8 and not args[5]:
            q_MK, scale_M1, q_NK, scale_N1, bias_N, _, dtype, _ = args
            return reference.epilogue(self.product(q_MK, q_NK), scale_M1, scale_N1.reshape(-1), bias_N, dtype)
        return func(*args, **(kwargs or {}))


def substituted(product: Product) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """A backend's `using` that runs `product` (int8 (M, K) and (N, K) to int32 (M, N)) in the place of our own.

    That is the product of `int8_matmul`, and on a GPU the operation `linear`, whose epilogue is then the definition's.
    """
    return lambda model: _Substituted(product)


def _triton_absent(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels are for GPUs; here the layers do without"
    return lacks_triton(device)


def _takes_linear(model: nn.Module) -> bool:
    return any(layer.scheme.group is None for layer in integer_layers(model).values())


def _int_mm_absent(device: torch.device) -> str | None:
    if device.type == "cpu" and not op.cpu_int_mm_is_exact():
        return "torch._int_mm saturates on this processor (no VNNI), so the layers do without it here"
    return None


def _units_absent(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torch._scaled_mm needs the fp8 matrix units of a GPU from sm_89"
    if not has_units(device.index or 0):
        return f"{torch.cuda.get_device_name(device)} has no fp8 matrix units; they came with sm_89"
    return None


def _float32_fp8_absent(device: torch.device) -> str | None:
    return None if _units_absent(device) else "the layers take torch._scaled_mm here"


def _float32_absent(device: torch.device) -> str | None:
    return None if _int_mm_absent(device) else "the layers take torch._int_mm here"


BACKENDS: dict[str, Backend] = {
    "reference": Backend(True, lambda device: None, defined, lambda model: True),
    # The model as it is deployed on a GPU: layers without groups are the operation `linear`, a kernel with epilogue.
    "Triton": Backend(True, _triton_absent, lambda model: nullcontext(), _takes_linear),
    # As deployed on a CPU, and for layers with groups: `int8_matmul` takes `torch._int_mm` where that is exact.
    "torch._int_mm": Backend(True, _int_mm_absent, substituted(op.int8_matmul)),
    "float32 sums": Backend(True, _float32_absent, lambda model: nullcontext()),
    # Likewise `fp8_matmul`.
    "torch._scaled_mm": Backend(True, _units_absent, lambda model: nullcontext(), lambda m: bool(fp8_layers(m))),
    "fp8 in float32": Backend(True, _float32_fp8_absent, lambda model: nullcontext(), lambda m: bool(fp8_layers(m))),
}


# -- observation ------------------------------------------------------------------------------------------------------


def _products() -> list[Any]:
    """Operations that multiply codes; their first argument is the tokens' codes."""
    ops = torch.ops.vit_efficient
    names = ("linear", "linear_quant", "linear_residual", "linear_heads", "linear_heads_quant")
    return [ops.int8_matmul.default, ops.fp8_matmul.default, *(getattr(ops, name).default for name in names)]


class Operands(TorchDispatchMode):
    """Keeps the tokens' codes of every product of codes, while it is active, whichever operation it is."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[Tensor] = []
        self.products = _products()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.products:
            self.codes.append(args[0])
        return func(*args, **(kwargs or {}))

    def take(self) -> Tensor | None:
        """The codes (M, K) since the last call, joined where a layer multiplied group by group; None: none were."""
        codes, self.codes = self.codes, []
        if len(codes) < 2:
            return codes[0] if codes else None
        return torch.cat(codes, dim=1)


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, backend: Backend, see: Callable[[Seen], None]) -> Tensor:
    """Run `model` on `backend` and show every part as it ends.

    The codes shown are those that entered the layer's product: a layer with groups has several, which are joined. Where
    no operation here multiplies codes (`int4_linear` quantizes inside), the layer is believed to quantize as its own
    `codes` does, and attention as `kernels.int8_attention.op` does.

    Returns:
        Logits (B, C), float32.
    """
    operands = Operands()

    def begin(layer: nn.Module, inputs: Any) -> None:
        operands.take()

    def end(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, DeployedInt8 | DeployedFp8)
            taken = operands.take()
            codes = comparable(layer.codes(inputs[0])[0] if taken is None else taken)
            tokens = output.flatten(2).transpose(1, 2) if layer.deployed == "patches" else output
            see(Seen(name, layer, Inputs(inputs, {}), codes, tokens.reshape(-1, tokens.shape[-1])))

        return hook

    def shown(name: str, part: Int8Attend | Fp8Attend) -> Callable[..., Tensor]:
        run = part.attend

        def attend(*tensors: Tensor, **options: Any) -> Tensor:
            inputs, y = Inputs(tensors, options), run(*tensors, **options)
            see(Seen(name, part, inputs, attention_codes(part, inputs), y))
            return y

        return attend

    with ExitStack() as stack:
        stack.enter_context(backend.using(model))
        for name, layer in code_layers(model).items():
            stack.callback(layer.register_forward_pre_hook(begin).remove)
            stack.callback(layer.register_forward_hook(end(name)).remove)
        for name, part in code_attention(model).items():
            stack.enter_context(_attending(part, shown(name, part)))
        stack.enter_context(operands)
        return model(images).float()
