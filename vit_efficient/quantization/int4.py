"""4-bit weights by bitsandbytes, frozen, with LoRA adapters: QLoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vit_efficient.config import Config
from vit_efficient.quantization.base import KEEP, PRECISION, LoraConfig, Precision, Report, precision_refusal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine


class Int4Config(Config):
    """QLoRA: bitsandbytes NF4 weights, frozen, plus LoRA adapters on a trained base."""

    name: Literal["int4"] = "int4"
    precision: Precision = PRECISION
    keep: tuple[str, ...] = KEEP
    type: Literal["nf4", "fp4"] = Field("nf4", description="Code book of the 4-bit weights.")
    double_quant: bool = Field(True, description="Quantize the scales too.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="The adapters, which are what is trained.")
    base: str | None = Field(
        None,
        description="Checkpoint, run folder or weight file to quantize. Unset: `model.weights`, "
        "or else the protocol's own fp32 base, trained once.",
    )

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Quantize the selected layers to 4 bits, freeze everything, and add the adapters, in place.

        Raises:
            UserError: an entry of `keep` matches nothing, nothing is left to quantize, a convolution is selected, or a
                role in `lora.targets` matches no layer.
        """
        from vit_efficient.quantization import int4_layers, lora, select

        selection = select.select(model, self.keep)
        report = Report.of(self.name, selection)
        int4_layers.quantize(
            model, selection.quantized, type=self.type, double_quant=self.double_quant, compute_dtype=compute_dtype
        )
        report.adapters.extend(lora.add_adapters(model, self.lora))
        return report

    def finalize(self, model: nn.Module) -> None:
        """Nothing: the base is in 4 bits from the start, and merging adapters into it would change the answers."""

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        for package in ("bitsandbytes", "peft"):
            if machine.version(package) is None:
                return f"quantization=int4: the package {package} is not installed. pip install {package}."
        return precision_refusal(machine, precision, device)
