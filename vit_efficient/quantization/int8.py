"""W8A8 integers: per-channel weights, per-token dynamic activations, trained on the codes that are deployed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vit_efficient.config import Config
from vit_efficient.quantization.base import KEEP, PRECISION, Precision, Report, precision_refusal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine


class Int8Config(Config):
    """W8A8: symmetric int8, one scale a weight row and one a token; the training forward is the deployed one."""

    name: Literal["int8"] = "int8"
    precision: Precision = PRECISION
    keep: tuple[str, ...] = KEEP

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Make the selected layers integer layers that share their float parameters, in place.

        Raises:
            UserError: an entry of `keep` matches nothing, or nothing is left to quantize.
        """
        from vit_efficient.quantization import int8_layers, select

        del compute_dtype  # integers and scales do not depend on it; autocast decides the outputs' dtype
        selection = select.select(model, self.keep)
        report = Report.of(self.name, selection)
        int8_layers.quantize(model, selection.quantized)
        return report

    def finalize(self, model: nn.Module) -> None:
        """Throw the float weights away: codes and scales stay, and the outputs do not change."""
        from vit_efficient.quantization import int8_layers

        int8_layers.finalize(model)

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        for gpu in machine.gpus if device == "cuda" else ():
            if gpu.capability < (7, 5):
                return (
                    f"quantization=int8: {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) has no integer matrix "
                    "units; they came with sm_75 (T4). Use quantization=none."
                )
        return precision_refusal(machine, precision, device)
