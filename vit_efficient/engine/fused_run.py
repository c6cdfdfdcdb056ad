"""Runs a copy of a deployed model with fused blocks, and holds the codes that enter each layer against the definition.

A fused block's layers have no inputs of their own: a kernel ends in the next layer's codes. So the definition is run
beside it, unfused and in plain PyTorch, and each of its layers multiplies *the codes that entered the fused one*, after
its own were compared with them. What lies between two layers (product, residual, norm, GELU, attention) is then made by
both of the same input. A fault shows in the codes right behind it, one in the last layer in the logits; an honest
difference of one code is counted once and carried no further.

Shapes: B images, C classes, M tokens, K inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_efficient.engine.backends import Operands, defined
from vit_efficient.engine.parts import Layer, code_layers, comparable, fp8_layers, output_bound, product, quantized
from vit_efficient.engine.tally import FP8_CHANGED, FP8_OFF_BY, GELU_SHARE, SHARE, Tally
from vit_efficient.kernels.device import by_definition
from vit_efficient.model.fused import FusedBlock, fuse_blocks
from vit_efficient.quantization.fp8_layers import DeployedFp8
from vit_efficient.quantization.fused_linear import Codes, FusedLinear
from vit_efficient.quantization.int8_attention import integer_attention
from vit_efficient.quantization.int8_deployed import DeployedInt8

See = Callable[[str, Tensor, Tensor], None]


class FusedRun:
    """A copy of a model, its blocks fused.

    Args:
        model: deployed, in evaluation mode, its blocks not fused; it stays as it is.

    Attributes:
        report: which blocks are fused, and why others are not.
        entered: by layer, the codes (M, K) that entered its product in the last run, and their scales.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.report = fuse_blocks(self.model)
        self.entered: dict[str, Codes] = {}

    def absent(self) -> str | None:
        """Why there is nothing fused to run; None: there is."""
        return None if self.report.fused else "; ".join(self.report.reasons())

    @property
    def exact(self) -> bool:
        """Whether codes and logits must be the definition's bit for bit.

        So it is on a CPU, but for integer attention, which attends without a pass between, and timm's models with
        relative positions, whose mean over tokens adds in the order of their memory.
        """
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.model.state_dict().values())
        return on_cpu and not integer_attention(self.model) and not isinstance(self.model, VisionTransformerRelPos)

    def tally(self, name: str) -> Tally:
        """A count for a layer, with the bounds that hold there: behind an MLP's activation wider ones, as GELU's erf is
        a library's; and in an fp8 model those of sums on fp8 units."""
        least = GELU_SHARE if name in self._views() and name.endswith(".mlp.fc2") else SHARE
        if units := [output_bound(layer) or 0.0 for layer in fp8_layers(self.model).values()]:
            return Tally(self.exact, least=1 - FP8_CHANGED * max(units), off_by=FP8_OFF_BY)
        return Tally(self.exact, least=least)

    def _views(self) -> dict[str, FusedLinear]:
        return {
            f"{name}.{inner}": view
            for name, module in self.model.named_modules()
            if isinstance(module, FusedBlock)
            for inner, view in module.views.items()
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C), float32, of images (B, 3, S, S); fills `entered`."""
        operands = Operands()
        with ExitStack() as stack:
            stack.enter_context(self._watched(operands))
            stack.enter_context(operands)
            return self.model(images).float()

    @torch.no_grad()
    def by_definition(self, images: Tensor, see: See) -> Tensor:
        """Run the fused blocks by the definitions of their kernels, each layer multiplying what it did in the last run.

        In half precision this, and not the unfused layers, rounds to 16 bits where the kernels do.

        Args:
            images: those of the last run.
            see: as in `given_codes`; of layers in fused blocks.

        Returns:
            Logits (B, C), float32.
        """

        def answer(name: str, x: Codes) -> Codes:
            given = self.entered[name]
            see(name, comparable(given.values), comparable(x.values.reshape(given.values.shape)))
            scale = given.scale if given.scale.numel() == 1 else given.scale.view(*x.values.shape[:-1], 1)
            return Codes(given.values.view(x.values.shape), scale)

        with ExitStack() as stack:
            for name, view in self._views().items():
                stack.enter_context(_entering(view, name, answer))
            stack.enter_context(by_definition())
            return self.model(images).float()

    @contextmanager
    def _watched(self, operands: Operands) -> Iterator[None]:
        """While it lasts, `entered` is filled: by the views of fused layers, and by hooks on the layers beside them."""
        begun: list[tuple[str, Codes]] = []
        self.entered = {}

        def begin(name: str, announced: Codes) -> Codes:
            end()
            begun.append((name, announced))
            return announced

        def end() -> None:
            codes = operands.take()
            if begun:
                name, announced = begun.pop()
                values = announced.values if codes is None else codes  # None: `int4_linear` quantizes inside
                self.entered[name] = Codes(values, announced.scale.reshape(-1, 1))

        def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                assert isinstance(layer, DeployedInt8 | DeployedFp8)
                begin(name, Codes(*layer.codes(inputs[0])))

            return hook

        views = self._views()
        with ExitStack() as stack:
            for name, view in views.items():
                stack.enter_context(_entering(view, name, begin))
            for name, layer in code_layers(self.model).items():
                if name not in views:
                    stack.callback(layer.register_forward_pre_hook(before(name)).remove)
            yield
            end()


@contextmanager
def _entering(view: FusedLinear, name: str, answer: Callable[[str, Codes], Codes]) -> Iterator[None]:
    """While it lasts, `answer` is shown what enters a fused layer, by the layer's name, and says what does."""
    methods = ("_operands", "_by_groups")

    def answered(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest: method(answer(name, x), *rest)

    for one in methods:
        view.__dict__[one] = answered(getattr(view, one))
    try:
        yield
    finally:
        for one in methods:
            del view.__dict__[one]


@torch.no_grad()
def given_codes(model: nn.Module, images: Tensor, entered: dict[str, Codes], see: See) -> Tensor:
    """Run the definition, each layer multiplying the codes that it is given.

    Args:
        model: deployed, its blocks not fused.
        images: (B, 3, S, S).
        entered: by layer, codes (M, K) and scales, of another run on the same images.
        see: called at each layer with its name, the codes given, and those that the definition would have multiplied:
            int8 (of fp8 `ordinals`).

    Returns:
        Logits (B, C), float32.
    """

    def answer(name: str, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scale = entered[name]
        see(name, comparable(codes), comparable(quantized(layer, x)[0]))
        return product(layer, codes, scale, dtype)

    with defined(model, answer):
        return model(images).float()
