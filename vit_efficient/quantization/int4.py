"""4-bit weights: by bitsandbytes, frozen, with LoRA adapters (QLoRA); or calibrated integers, for deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from vit_efficient.config import Config
from vit_efficient.quantization.base import (
    BUDGET,
    CRITICAL,
    DISTILL,
    KEEP,
    PRECISION,
    TRAIN,
    AutoKeep,
    DistillConfig,
    Keep,
    LoraConfig,
    Precision,
    Report,
    Train,
    named,
    needs_adapters,
    needs_auto,
    needs_critical,
    precision_refusal,
)
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.imports import without_notices

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine


class Int4Config(Config):
    """4-bit weights in floating-point arithmetic; with nf4 and fp4, LoRA adapters on a frozen base (QLoRA)."""

    name: Literal["int4"] = "int4"
    precision: Precision = PRECISION
    keep: Keep = KEEP
    budget: AutoKeep | None = BUDGET
    type: Literal["nf4", "fp4", "int"] = Field(
        "nf4",
        description="Code book of the 4-bit weights: those of bitsandbytes, or integers with one scale a group, "
        "calibrated on images (for deployment: they take no adapters).",
    )
    double_quant: bool = Field(True, description="Of nf4 and fp4: quantize the scales too.")
    group: Literal[32, 64, 128] = Field(64, description="Of `int`: inputs that share a scale in a row of weights.")
    zero_point: bool = Field(True, description="Of `int`: codes from 0 to 15 with a zero point; else -7 to 7.")
    calibration: CalibrationConfig | None = Field(
        None, description="Of `int`: what is found on images. Unset: the defaults."
    )
    lora: LoraConfig | None = Field(
        default_factory=LoraConfig,
        description="The adapters, which are what is trained. Unset: none, to quantize a model without training it.",
    )
    base: str | None = Field(
        None,
        description="Checkpoint, run folder or weight file to quantize. Unset: `model.weights`, "
        "or else the protocol's own fp32 base, trained once.",
    )
    train: Train = TRAIN
    critical: tuple[str, ...] = CRITICAL
    distill: DistillConfig | None = DISTILL

    @field_validator("group", "zero_point", "calibration")
    @classmethod
    def _of_integers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if info.data.get("type", "int") != "int" and value != cls.model_fields[info.field_name].default:
            raise ValueError(f"is for quantization.type=int, and that is {info.data['type']}; leave it out")
        return value

    @field_validator("double_quant")
    @classmethod
    def _of_bitsandbytes(cls, double_quant: bool, info: ValidationInfo) -> bool:
        if not double_quant and info.data.get("type") == "int":
            raise ValueError("is for nf4 and fp4, and quantization.type is int, whose scales are not quantized")
        return double_quant

    @field_validator("lora")
    @classmethod
    def _on_bitsandbytes(cls, lora: LoraConfig | None, info: ValidationInfo) -> LoraConfig | None:
        if info.data.get("type") != "int":
            return lora
        if lora is not None and lora.model_fields_set:  # the default has none
            raise ValueError(
                "is for nf4 and fp4, and quantization.type is int, which takes no adapters; set it to null"
            )
        return None

    _budget = field_validator("budget")(needs_auto)
    _adapters = field_validator("train")(needs_adapters)
    _critical = field_validator("critical")(needs_critical)

    @property
    def needs_calibration(self) -> bool:
        """Whether images are needed before the model can answer."""
        return self.type == "int"

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Quantize the selected layers to 4 bits, freeze everything, and add the adapters, in place.

        Layers that `train: critical` names are kept as if `keep` named them, and trained.

        Raises:
            UserError: an entry of `keep` or `critical` matches nothing, nothing is left to quantize or to adapt, a
                convolution is selected, or a role in `lora.targets` matches no layer.
        """
        with without_notices():
            from vit_efficient.quantization import int4_layers, lora, select, unfreeze

        critical = unfreeze.critical_layers(model, self.critical) if self.train == "critical" else {}
        kept = [entry for entry in self.critical if critical and entry != unfreeze.NORMS]
        selection = select.select(model, [*named(self.keep), *kept])
        report = Report.of(self.name, selection)
        if self.type == "int":
            from vit_efficient.kernels.int8_linear.scheme import Scheme
            from vit_efficient.quantization import int8_layers

            scheme = Scheme(weight_bits=4, group=self.group, zero_point=self.zero_point, activations="none")
            int8_layers.quantize(model, selection.quantized, lambda layer: scheme)
            model.requires_grad_(False)
            return report
        int4_layers.quantize(
            model, selection.quantized, type=self.type, double_quant=self.double_quant, compute_dtype=compute_dtype
        )
        model.requires_grad_(False)
        if self.lora is not None:
            report.adapters.extend(lora.add_adapters(model, self.lora, but=critical))
            trained = unfreeze.unfreeze_all(model) if self.train == "all" else unfreeze.unfreeze(model, critical)
            report.trained.extend(trained)
        return report

    def finalize(self, model: nn.Module) -> None:
        """Of `int`, throw the float weights away. Of nf4 and fp4 nothing: the base is in 4 bits from the start, and
        merging adapters into it would change the answers."""
        if self.type == "int":
            from vit_efficient.quantization import int8_layers

            int8_layers.finalize(model)

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        for package in ("bitsandbytes", "peft") if self.type != "int" else ():
            if machine.version(package) is None:
                return f"quantization=int4: the package {package} is not installed. pip install {package}."
        return precision_refusal(machine, precision, device)
