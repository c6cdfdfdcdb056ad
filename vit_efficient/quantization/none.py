"""No quantization: fp32, bf16 or fp16, with or without LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from vit_efficient.config import Config
from vit_efficient.quantization.base import PRECISION, LoraConfig, Precision, Report, precision_refusal

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

    @field_validator("base")
    @classmethod
    def _needs_adapters(cls, base: str | None, info: ValidationInfo) -> str | None:
        if base is not None and info.data.get("lora") is None:
            raise ValueError("is for adapters, and quantization.lora is unset; to train from weights set model.weights")
        return base

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Without `lora`, nothing. With it: freeze the model, its linear layers in `compute_dtype`, and add adapters.

        Raises:
            UserError: a role in `lora.targets` matches no layer.
        """
        if self.lora is None:
            return Report(self.name)
        from vit_efficient.quantization import lora

        lora.freeze(model, compute_dtype)
        return Report(self.name, adapters=lora.add_adapters(model, self.lora))

    def finalize(self, model: nn.Module) -> None:
        """Nothing: the model as it is trained is the model as it is deployed; adapters stay apart."""

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        if self.lora is not None and machine.version("peft") is None:
            return "quantization.lora: the package peft is not installed. pip install peft."
        return precision_refusal(machine, precision, device)
