"""No quantization: fp32, bf16 or fp16, with or without LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from vit_efficient.config import Config
from vit_efficient.quantization.base import (
    CRITICAL,
    DISTILL,
    PRECISION,
    TRAIN,
    DistillConfig,
    LoraConfig,
    Precision,
    Report,
    Train,
    needs_adapters,
    needs_critical,
    precision_refusal,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine


class NoneConfig(Config):
    """No quantization: plain floating point, optionally with LoRA adapters on a trained base."""

    name: Literal["none"] = "none"
    precision: Precision = PRECISION
    lora: LoraConfig | None = Field(None, description="Adapters on a frozen base; unset: train every weight.")
    base: str | None = Field(
        None,
        description="Checkpoint, run folder or weight file that the adapters start from. Unset: `model.weights`, "
        "or else the protocol's own fp32 base, trained once.",
    )
    train: Train = TRAIN
    critical: tuple[str, ...] = CRITICAL
    distill: DistillConfig | None = DISTILL

    _adapters = field_validator("base", "train")(needs_adapters)
    _critical = field_validator("critical")(needs_critical)

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Without `lora`, nothing. With it: freeze the model, its linear layers in `compute_dtype`, and add adapters.

        What `train` unfreezes besides stays in float32.

        Raises:
            UserError: a role in `lora.targets` or an entry of `critical` matches no layer, or no layer is left for an
                adapter.
        """
        if self.lora is None:
            return Report(self.name)
        from vit_efficient.quantization import lora, unfreeze

        critical = unfreeze.critical_layers(model, self.critical) if self.train == "critical" else {}
        if self.train != "all":
            lora.store_in(model, compute_dtype, but=critical)
        adapters = lora.add_adapters(model, self.lora, but=critical)
        trained = unfreeze.unfreeze_all(model) if self.train == "all" else unfreeze.unfreeze(model, critical)
        return Report(self.name, adapters=adapters, trained=trained)

    def finalize(self, model: nn.Module) -> None:
        """Nothing: the model as it is trained is the model as it is deployed; adapters stay apart."""

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        if self.lora is not None and machine.version("peft") is None:
            return "quantization.lora: the package peft is not installed. pip install peft."
        return precision_refusal(machine, precision, device)
