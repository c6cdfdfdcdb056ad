"""Integer weights and activations of 8 or 4 bits, trained on the codes that are deployed, or calibrated on images."""

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
    named,
    needs_auto,
    precision_refusal,
)
from vit_efficient.quantization.calibration import CalibrationConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.kernels.int8_linear.scheme import Scheme
    from vit_efficient.machine import Machine
    from vit_efficient.quantization.select import Layer

Activations = Literal["dynamic", "static", "hybrid"]
# What `hybrid` makes static: inputs that no single program holds a whole row of when it produces them.
STATIC_ROLES = ("proj", "fc2")


class Int8Config(Config):
    """Integer products: symmetric codes of weights and activations; the training forward is the deployed one."""

    name: Literal["int8"] = "int8"
    precision: Precision = PRECISION
    keep: Keep = KEEP
    budget: AutoKeep | None = BUDGET
    weight_bits: Literal[8, 4] = Field(8, description="Bits of a weight.")
    activation_bits: Literal[8, 4] = Field(8, description="Bits of an activation.")
    weights: Literal["channel", "tensor"] = Field(
        "channel", description="One weight scale for each output channel, or one for the whole tensor."
    )
    group: Literal[32, 64, 128] | None = Field(
        None, description="Inputs that share a weight scale within an output channel; unset: all of them."
    )
    zero_point: bool = Field(
        False, description="Of 4-bit weights: codes from 0 to 15 with a zero point a scale, not -7 to 7."
    )
    activations: Activations = Field(
        "dynamic",
        description="Scales of activations: chosen in each forward, calibrated, or calibrated for `proj` and `fc2` "
        "(`hybrid`: what the fast kernels quantize in the epilogue of another kernel) and dynamic for the others.",
    )
    dynamic_scale: Literal["token", "tensor"] = Field(
        "token", description="One dynamic scale for each token, or one for the whole tensor (and so for the batch)."
    )
    attention: Literal["none", "dynamic", "static"] = Field(
        "none", description="Mixed-precision attention: the product of queries and keys in integers (QAttn)."
    )
    attention_values: Literal["int8", "float", "fp8"] = Field(
        "int8",
        description="Of mixed-precision attention: values are quantized and multiplied in floating point (`int8`, "
        "QAttn), multiplied as they are (`float`, faster), or in e4m3 like the attention weights (`fp8`, from sm_89).",
    )
    attention_keys: Literal["token", "block"] = Field(
        "token", description="Of `attention: dynamic`: one scale for each key, or one for each head's 128 keys."
    )
    calibration: CalibrationConfig | None = Field(
        None,
        description="What is found on images before training or deployment. Unset: the defaults where it is needed.",
    )
    learn_scales: bool = Field(
        False, description="Train the steps of weights and of static activations (learned step size)."
    )
    freeze_ranges: float = Field(
        0.0, ge=0, le=1, description="Share of the training, at its end, in which learned steps do not move any more."
    )
    distill: DistillConfig | None = DISTILL

    _budget = field_validator("budget")(needs_auto)

    @field_validator("group")
    @classmethod
    def _one_kind_of_scale(cls, group: int | None, info: ValidationInfo) -> int | None:
        if group is not None and info.data.get("weights") == "tensor":
            raise ValueError("is for quantization.weights=channel, and that is tensor; leave one of the two out")
        return group

    @field_validator("zero_point")
    @classmethod
    def _of_four_bits(cls, zero_point: bool, info: ValidationInfo) -> bool:
        if zero_point and (info.data.get("weight_bits") != 4 or info.data.get("weights") == "tensor"):
            raise ValueError("is for quantization.weight_bits=4 with quantization.weights=channel; leave it out")
        return zero_point

    @field_validator("dynamic_scale")
    @classmethod
    def _is_read(cls, dynamic_scale: str, info: ValidationInfo) -> str:
        if dynamic_scale == "tensor" and info.data.get("activations") == "static":
            raise ValueError("is tensor, and quantization.activations=static has no dynamic scale; leave it out")
        return dynamic_scale

    @field_validator("attention_values", "attention_keys")
    @classmethod
    def _of_attention(cls, form: str, info: ValidationInfo) -> str:
        mode, default = info.data.get("attention"), cls.model_fields[str(info.field_name)].default
        if form != default and mode == "none":
            raise ValueError(f"is {form}, and quantization.attention=none attends in floating point; leave one out")
        if form == "block" and mode == "static":
            raise ValueError("is block, and quantization.attention=static has one calibrated scale; leave one out")
        return form

    @field_validator("freeze_ranges")
    @classmethod
    def _learned(cls, share: float, info: ValidationInfo) -> float:
        if share and not info.data.get("learn_scales"):
            raise ValueError("is for quantization.learn_scales=true: other ranges do not move in training")
        return share

    @property
    def needs_calibration(self) -> bool:
        """Whether images are needed before the model can answer."""
        return self.calibration is not None or self.activations != "dynamic" or self.attention == "static"

    def scheme(self, layer: Layer) -> Scheme:
        """The arithmetic of one layer."""
        from vit_efficient.kernels.int8_linear.scheme import Scheme

        static = self.activations == "static" or (self.activations == "hybrid" and layer.role in STATIC_ROLES)
        return Scheme(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            weights=self.weights,
            group=self.group,
            zero_point=self.zero_point,
            activations="static" if static else self.dynamic_scale,
        )

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Make the selected layers integer layers that share their float parameters, in place.

        Raises:
            UserError: an entry of `keep` matches nothing, or nothing is left to quantize.
        """
        from vit_efficient.quantization import int8_attention, int8_layers, select

        del compute_dtype  # integers and scales do not depend on it; autocast decides the outputs' dtype
        selection = select.select(model, named(self.keep))
        report = Report.of(self.name, selection)
        int8_layers.quantize(model, selection.quantized, self.scheme)
        if self.attention != "none":
            int8_attention.quantize_attention(
                model, self.attention, values=self.attention_values, keys=self.attention_keys
            )
        if self.learn_scales and not self.needs_calibration:  # else calibration says where they start
            int8_layers.learn_scales(model)
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
            if self.attention_values == "fp8" and gpu.capability < (8, 9):
                return (
                    f"quantization.attention_values=fp8: {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) has no "
                    "fp8 matrix units; they came with sm_89 (Ada, Hopper). Take quantization.attention_values=float."
                )
        return precision_refusal(machine, precision, device)
