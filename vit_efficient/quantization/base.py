"""What every quantization backend has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vit_efficient.config import Config

if TYPE_CHECKING:
    from vit_efficient.machine import Machine
    from vit_efficient.quantization.select import Selection

Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISION: Any = Field(
    "auto",
    description="Arithmetic of everything that is not quantized. "
    "`auto`: bf16 on GPUs from sm_80, fp16 on older ones, fp32 on a CPU.",
)
KEEP = Field(
    ("patch_embed", "head"),
    description="Layers left in high precision: roles (`patch_embed`, `head`, `qkv`, `proj`, `fc1`, `fc2`), "
    "`first_block`, `last_block`, or patterns of module names such as `blocks.3.*`.",
)


class LoraConfig(Config):
    """Low-rank adapters, through peft."""

    rank: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(16, description="Adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(
        ("qkv", "proj", "fc1", "fc2"), description="Roles that get adapters."
    )
    train_head: bool = Field(True, description="Train the classification head besides the adapters.")
    lr_scale: PositiveFloat = Field(1.0, description="Multiplier of `optim.lr`: adapters want another rate.")


@dataclass(frozen=True)
class Report:
    """What a backend did to a model.

    Args:
        scheme: name of the backend.
        quantized: (module name, role, kind) of each layer that was quantized; kind is ``linear`` or ``patches``.
        kept: (module name, role, reason) of each layer that was not; the reason is the entry of `keep`, or ``other``.
        quantized_parameters: how many weights are stored in fewer bits.
        adapters: names of the modules that got low-rank adapters.
    """

    scheme: str
    quantized: list[tuple[str, str, str]] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)
    quantized_parameters: int = 0
    adapters: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scheme: str, selection: Selection, adapters: list[str] | None = None) -> Report:
        """The report of quantizing a selection. Take it before the layers are replaced: it counts their weights."""
        return cls(
            scheme,
            [(layer.name, layer.role, layer.kind) for layer in selection.quantized],
            [(kept.layer.name, kept.layer.role, kept.reason) for kept in selection.kept],
            sum(layer.parameters for layer in selection.quantized),
            adapters or [],
        )

    def lines(self) -> list[str]:
        """For a person to read."""
        lines = []
        if self.quantized:
            total = len(self.quantized) + len(self.kept)
            lines.append(f"{self.scheme}: {len(self.quantized)} of {total} layers ({_by_role(self.quantized)})")
        else:
            lines.append(f"{self.scheme}: no layer is quantized")
        reasons: dict[str, list[str]] = {}
        for name, _, reason in self.kept:
            reasons.setdefault(reason, []).append(name)
        if reasons:
            lines[0] += "; kept " + ", ".join(f"{reason} ({_shortened(names)})" for reason, names in reasons.items())
        if self.adapters:
            lines.append(f"adapters on {len(self.adapters)} layers")
        return lines


def _by_role(layers: list[tuple[str, str, str]]) -> str:
    return ", ".join(f"{role} {count}" for role, count in Counter(role for _, role, _ in layers).items())


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def precision_refusal(machine: Machine, precision: str, device: str) -> str | None:
    """Why the arithmetic of the layers that stay in floating point cannot run on `device`, and what can; or None."""
    if device == "cpu":
        if precision == "fp16":
            return (
                "quantization.precision=fp16: a CPU trains fp16 slowly and without loss scaling. "
                "Use quantization.precision=fp32 or bf16."
            )
        return None
    if not machine.gpus:
        return "strategy: this machine has no GPU that torch can use. Run on the CPU, or check the driver."
    oldest = min(machine.gpus, key=lambda gpu: gpu.capability)
    if precision == "bf16" and oldest.capability < (8, 0):
        return (
            f"quantization.precision=bf16: {oldest.name} (sm_{oldest.capability[0]}{oldest.capability[1]}) has no "
            "bfloat16 units; they came with sm_80. Use quantization.precision=fp16."
        )
    return None
