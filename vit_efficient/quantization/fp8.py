"""W8A8 in fp8 (e4m3): scaled weights and activations, trained on the codes that are deployed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from vit_efficient.config import Config
from vit_efficient.quantization.base import (
    BUDGET,
    DISTILL,
    KEEP,
    PRECISION,
    AutoKeep,
    DistillConfig,
    Keep,
    Precision,
    Report,
    needs_auto,
    precision_refusal,
)
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8 import STATIC_ROLES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.kernels.fp8_linear.reference import Scheme
    from vit_efficient.machine import Machine
    from vit_efficient.quantization.select import Layer


# Keys of `calibration` that this scheme has no use for.
OF_INTEGERS = ("observer", "percentile", "smooth")


class Fp8Config(Config):
    """W8A8 in fp8 (e4m3), scales from the largest magnitude; the training forward is the deployed one."""

    name: Literal["fp8"] = "fp8"
    precision: Precision = PRECISION
    keep: Keep = KEEP
    budget: AutoKeep | None = BUDGET
    weights: Literal["channel", "tensor"] = Field(
        "channel", description="Scales of a weight: one an output row, or one in all."
    )
    activations: Literal["token", "tensor", "static", "hybrid"] = Field(
        "token",
        description="Scales of activations. Chosen anew in each forward: one a token, or one for all tokens of the "
        "batch (`tensor`), so that an image's outputs depend on those beside it. Or calibrated (`static`), or "
        "calibrated for `proj` and `fc2` and one a token for the others (`hybrid`: what the fast kernels quantize in "
        "the epilogue of another kernel).",
    )
    accumulation: Literal["full", "fast"] = Field(
        "full", description="Sums in float32, or in the fewer bits of the GPU's matrix units; a CPU has float32 only."
    )
    attention: Literal["none", "fp8"] = Field(
        "none",
        description="`fp8`: queries and keys in e4m3 after a rotation that spreads outliers (incoherent processing), "
        "scales chosen in each forward.",
    )
    attention_values: Literal["float", "fp8"] = Field(
        "float",
        description="Of `attention: fp8`: values multiplied as they are, or in e4m3 like the attention weights.",
    )
    calibration: CalibrationConfig | None = Field(
        None,
        description="What is found on images before training or deployment: shift, rounding and bias. Unset: nothing.",
    )
    distill: DistillConfig | None = DISTILL

    _budget = field_validator("budget")(needs_auto)

    @field_validator("attention_values")
    @classmethod
    def _of_attention(cls, values: str, info: ValidationInfo) -> str:
        if values == "fp8" and info.data.get("attention") == "none":
            raise ValueError("is fp8, and quantization.attention=none attends in floating point; leave one out")
        return values

    @field_validator("calibration")
    @classmethod
    def _is_read(cls, calibration: CalibrationConfig | None) -> CalibrationConfig | None:
        for key in OF_INTEGERS if calibration is not None else ():
            if getattr(calibration, key) != CalibrationConfig.model_fields[key].default:
                raise ValueError(
                    f"has {key}, which is for integers: fp8 takes its static range from the largest magnitude, and "
                    "smoothing changes nothing where errors are relative; leave it out"
                )
        return calibration

    @property
    def needs_calibration(self) -> bool:
        """Whether images are wanted before the model answers."""
        return self.calibration is not None or self.activations in ("static", "hybrid")

    def scheme(self, layer: Layer) -> Scheme:
        """The arithmetic of one layer."""
        from vit_efficient.kernels.fp8_linear.reference import Scheme

        activations = self.activations
        if activations == "hybrid":
            activations = "static" if layer.role in STATIC_ROLES else "token"
        return Scheme(weights=self.weights, activations=activations, accumulation=self.accumulation)

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Make the selected layers fp8 layers that share their float parameters, in place.

        Raises:
            UserError: `keep` is still `auto`, an entry of it matches nothing, or nothing is left to quantize.
        """
        from vit_efficient.quantization import fp8_layers, int8_attention, select

        del compute_dtype  # codes and scales do not depend on it; autocast decides the outputs' dtype
        selection = select.select(model, self.keep)
        report = Report.of(self.name, selection)
        fp8_layers.quantize(model, selection.quantized, self.scheme)
        if self.attention != "none":
            int8_attention.quantize_attention_fp8(model, self.attention_values)
        return report

    def finalize(self, model: nn.Module) -> None:
        """Throw the float weights away: codes and scales stay, and the outputs do not change."""
        from vit_efficient.quantization import fp8_layers

        fp8_layers.finalize(model)

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        for gpu in machine.gpus if device == "cuda" else ():
            if gpu.capability < (8, 9):
                return (
                    f"quantization=fp8: {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) has no fp8 matrix "
                    "units; they came with sm_89 (Ada, Hopper). Plain arithmetic would be slower there than no "
                    "quantization. Use quantization=int8, or strategy.accelerator=cpu to look at accuracy."
                )
        return precision_refusal(machine, precision, device)
