"""Weights quantized by torchao, under a few of its configurations: to compare with, and for what else builds on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from vit_efficient.config import Config
from vit_efficient.quantization.base import (
    BUDGET,
    KEEP,
    PRECISION,
    AutoKeep,
    Keep,
    Precision,
    Report,
    needs_auto,
    precision_refusal,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine

TorchaoScheme = Literal[
    "int8_weight_only",
    "int8_dynamic_activation_int8_weight",
    "intx_weight_only",
    "int8_dynamic_activation_intx_weight",
    "float8_weight_only",
    "float8_dynamic_activation_float8_weight",
]
TorchaoBits = Literal[2, 3, 4, 5, 6, 7, 8]
# Where the scheme multiplies on units that not every GPU has: from which compute capability, and on which chips first.
UNITS = {
    "int8_dynamic_activation_int8_weight": ((7, 5), "integer", "sm_75 (T4)"),
    "float8_dynamic_activation_float8_weight": ((8, 9), "fp8", "sm_89 (Ada, Hopper)"),
}


class TorchaoConfig(Config):
    """torchao's quantization of a trained model, for inference: nothing is trained."""

    name: Literal["torchao"] = "torchao"
    precision: Precision = PRECISION
    keep: Keep = KEEP
    budget: AutoKeep | None = BUDGET
    scheme: TorchaoScheme = Field(
        "int8_dynamic_activation_int8_weight",
        description="torchao's configuration of that name, with a scale a weight row and a token (`intx`: a group; "
        "`float8_dynamic_activation_float8_weight`: one a tensor, and a GPU from sm_89).",
    )
    bits: TorchaoBits = Field(
        4, description="Bits of a weight under the `intx` schemes. torchao stores a byte each whatever they are."
    )
    group: PositiveInt | None = Field(
        64, description="Inputs that share a weight scale under the `intx` schemes; unset: the whole row."
    )

    _budget = field_validator("budget")(needs_auto)

    @field_validator("bits", "group")
    @classmethod
    def _is_for_intx(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        scheme = info.data.get("scheme", "intx")
        if "intx" not in scheme and value != cls.model_fields[info.field_name].default:
            raise ValueError(f"is for the intx schemes, and quantization.scheme is {scheme}")
        return value

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Quantize the selected layers and freeze the model, in place.

        Raises:
            UserError: `keep` is still `auto`, an entry of it matches nothing, nothing is left to quantize, a
                convolution is selected, or torchao cannot quantize a layer so.
        """
        from vit_efficient.quantization import select, torchao_layers

        del compute_dtype  # weights and scales do not depend on it; autocast decides the outputs' dtype
        selection = select.select(model, self.keep)
        report = Report.of(self.name, selection)
        torchao_layers.quantize(model, selection.quantized, self.scheme, self.bits, self.group)
        model.requires_grad_(False)
        return report

    def finalize(self, model: nn.Module) -> None:
        """Nothing: the weights are quantized from the start."""

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        if machine.version("torchao") is None:
            return "quantization=torchao: the package torchao is not installed. pip install torchao."
        if self.scheme == "float8_dynamic_activation_float8_weight" and device == "cpu":
            return (
                f"quantization.scheme={self.scheme}: torchao multiplies fp8 on GPUs only. "
                "Use quantization.scheme=float8_weight_only, or quantization=fp8, which a CPU computes too."
            )
        capability, units, chips = UNITS.get(self.scheme, ((0, 0), "", ""))
        for gpu in machine.gpus if device == "cuda" else ():
            if gpu.capability < capability:
                return (
                    f"quantization.scheme={self.scheme}: {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) has "
                    f"no {units} matrix units; they came with {chips}. Use quantization.scheme=int8_weight_only."
                )
        return precision_refusal(machine, precision, device)
