"""A float model and its quantized twin, whose layers change places: every mixture of the two without a copy of either.

Legend: B images, C classes, P pixels a side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.deploy import deployed_state
from vit_efficient.quantization.select import Layer, find_layers
from vit_efficient.quantization.stored import QuantizedLayer
from vit_efficient.quantization.surgery import swapped


class Mixture:
    """Two models of the same names, one in floating point, one with quantized layers. Both go into evaluation mode.

    Args:
        float_model: the full-precision model.
        quantized: the same model, some layers quantized. It may differ elsewhere too (integer attention).
        dtype: the precision in which layers that stay in floating point are stored.

    Raises:
        UserError: nothing is quantized; a layer has no float counterpart; there are adapters, which are parts of
            neither model.
    """

    def __init__(self, float_model: nn.Module, quantized: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        _refuse_adapters(quantized)
        self.float_model, self.quantized_model = float_model.eval(), quantized.eval()
        self.layers: list[Layer] = [layer for layer in find_layers(quantized) if is_quantized(layer.module)]
        if not self.layers:
            raise UserError("No layer of this model is quantized, so there is nothing to compare. Keep fewer layers.")
        theirs = {layer.name: layer.module for layer in find_layers(float_model)}
        strangers = [name for name in map(_name, self.layers) if name not in theirs or is_quantized(theirs[name])]
        if strangers:
            raise UserError(
                f"The full-precision model has no float layer {strangers[0]} to compare with. "
                "Give the model that was quantized."
            )
        self._quantized: dict[str, nn.Module] = {layer.name: layer.module for layer in self.layers}
        self._float = {name: theirs[name] for name in self._quantized}
        tensors, float_tensors = deployed_state(quantized, dtype)[0], deployed_state(float_model, dtype)[0]
        self.total_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.quantized_bytes = {name: _bytes_under(name, tensors) for name in self._quantized}
        self.float_bytes = {name: _bytes_under(name, float_tensors) for name in self._quantized}

    @property
    def differs_elsewhere(self) -> bool:
        """Whether more is quantized than layers, which shows in modules of other names: integer attention."""
        ours = {name for name, _ in self.quantized_model.named_modules()}
        theirs = {name for name, _ in self.float_model.named_modules()}
        return any(not name.startswith(tuple(f"{layer}." for layer in self.names)) for name in ours - theirs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantized layers, in the order of the model."""
        return tuple(self._quantized)

    def only(self, names: Sequence[str]) -> Mixed:
        """The float model with these layers quantized and nothing else."""
        return Mixed(self.float_model, {name: self._quantized[name] for name in names})

    def without(self, names: Sequence[str]) -> Mixed:
        """The quantized model with these layers in floating point."""
        return Mixed(self.quantized_model, {name: self._float[name] for name in names})

    def bytes_with(self, kept: Sequence[str]) -> int:
        """What all tensors of the quantized model weigh in a file if these layers stay in floating point."""
        return self.total_bytes + sum(self.float_bytes[name] - self.quantized_bytes[name] for name in kept)


class Mixed:
    """One mixture: a model, and the modules that take places in it while it runs."""

    def __init__(self, host: nn.Module, guests: Mapping[str, nn.Module]) -> None:
        self.host, self.guests = host, guests

    @torch.no_grad()
    def __call__(self, images_B3PP: Tensor, trace: Trace | None = None) -> Tensor:
        """Logits (B, C).

        Args:
            images_B3PP: normalised images, on the device of the models.
            trace: the host's run on the same images: blocks before the first guest are not computed again.
        """
        known = trace.before(self.guests) if trace is not None else {}
        with swapped(self.host, {**known, **self.guests}) as model:
            logits: Tensor = model(images_B3PP)
        return logits


class Trace:
    """What each block of a model gave for a batch."""

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Record the runs of `model` in this context."""
        handles = [
            module.register_forward_hook(partial(self._keep, name))
            for name, module in model.named_modules()
            if _BLOCK.fullmatch(name)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs[name] = output

    def before(self, guests: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Stand-ins, which give the recorded output, for the blocks that run before the first guest."""
        places = [_BLOCK.match(name) for name in guests]
        # A guest outside the blocks may run before them (the patch embedding): then nothing is known.
        hosts = {place[0] if place else None for place in places}
        order = list(self._outputs)
        if not hosts or not hosts <= set(order):
            return {}
        return {name: _Recalled(self._outputs[name]) for name in order[: min(map(order.index, hosts))]}  # type: ignore[arg-type]


class _Recalled(nn.Module):
    """Gives what was recorded, whatever it is asked."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")


def _name(layer: Layer) -> str:
    return layer.name


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer is one of a quantization backend, in its trained or its deployed form."""
    return isinstance(module, QuantizedLayer)


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise UserError(
                f"{name} has a low-rank adapter. Sensitivity is that of quantized layers alone: "
                "leave `quantization.lora` out."
            )


def _bytes_under(name: str, tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}."))
