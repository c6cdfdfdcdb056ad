"""LLM.int8 by bitsandbytes: int8 weights, frozen, and the outliers of activations in floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

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

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vit_efficient.machine import Machine


class BnbInt8Config(Config):
    """LLM.int8 (Dettmers et al. 2022): frozen int8 weights, outlier columns in floating point, adapters if wanted."""

    name: Literal["bnb_int8"] = "bnb_int8"
    precision: Precision = PRECISION
    keep: Keep = KEEP
    budget: AutoKeep | None = BUDGET
    threshold: float = Field(
        6.0,
        ge=0,
        description="Inputs of a layer in whose column of the batch any magnitude reaches this are multiplied in "
        "floating point, so that an image's outputs depend a little on those beside it; 0: none are.",
    )
    lora: LoraConfig | None = Field(
        None, description="Adapters, which are what is trained. Unset: none, to quantize a model without training it."
    )
    base: str | None = Field(
        None,
        description="Checkpoint, run folder or weight file that the adapters start from. Unset: `model.weights`, "
        "or else the protocol's own fp32 base, trained once.",
    )
    train: Train = TRAIN
    critical: tuple[str, ...] = CRITICAL
    distill: DistillConfig | None = DISTILL

    _budget = field_validator("budget")(needs_auto)
    _adapters = field_validator("base", "train")(needs_adapters)
    _critical = field_validator("critical")(needs_critical)

    def apply(self, model: nn.Module, *, compute_dtype: torch.dtype) -> Report:
        """Quantize the selected layers to int8, freeze everything, and add the adapters if any, in place.

        Layers that `train: critical` names are kept as if `keep` named them, and trained.

        Raises:
            UserError: an entry of `keep` or `critical` matches nothing, nothing is left to quantize or to adapt, a
                convolution is selected, or a role in `lora.targets` matches no layer.
        """
        from vit_efficient.quantization import bnb_int8_layers, select, unfreeze

        del compute_dtype  # weights and scales do not depend on it; autocast decides the outputs' dtype
        critical = unfreeze.critical_layers(model, self.critical) if self.train == "critical" else {}
        kept = [entry for entry in self.critical if critical and entry != unfreeze.NORMS]
        selection = select.select(model, [*named(self.keep), *kept])
        report = Report.of(self.name, selection)
        bnb_int8_layers.quantize(model, selection.quantized, threshold=self.threshold)
        model.requires_grad_(False)
        if self.lora is not None:
            from vit_efficient.quantization import lora

            report.adapters.extend(lora.add_adapters(model, self.lora, but=critical))
            trained = unfreeze.unfreeze_all(model) if self.train == "all" else unfreeze.unfreeze(model, critical)
            report.trained.extend(trained)
        return report

    def finalize(self, model: nn.Module) -> None:
        """Nothing: the base is in int8 from the start, and merging adapters into it would change the answers."""

    def refusal(self, machine: Machine, precision: str, device: str) -> str | None:
        """Why this cannot run on `device` (``cpu`` or ``cuda``) of `machine`, and what to do; None if it can."""
        for package in ("bitsandbytes", *(("peft",) if self.lora is not None else ())):
            if machine.version(package) is None:
                return f"quantization=bnb_int8: the package {package} is not installed. pip install {package}."
        for gpu in machine.gpus if device == "cuda" else ():
            if gpu.capability < (7, 5):
                return (
                    f"quantization=bnb_int8: {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) has no integer "
                    "matrix units; they came with sm_75 (T4). Use quantization=none."
                )
        return precision_refusal(machine, precision, device)
