"""What every quantization backend has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo

from vit_efficient.config import Config
from vit_efficient.errors import UserError

if TYPE_CHECKING:
    from vit_efficient.machine import Machine
    from vit_efficient.quantization.select import Selection

Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISION: Any = Field(
    "auto",
    description="Arithmetic of everything that is not quantized. "
    "`auto`: bf16 on GPUs from sm_80, fp16 on older ones, fp32 on a CPU.",
)
Keep = tuple[str, ...] | Literal["auto"]
KEEP: Any = Field(
    ("patch_embed", "head"),
    description="Layers left in high precision: roles (`patch_embed`, `head`, `qkv`, `proj`, `fc1`, `fc2`), "
    "`first_block`, `last_block`, or patterns of module names such as `blocks.3.*`. "
    "`auto`: those that `python -m vit_efficient.quantize` finds on calibration images, within `budget`.",
)
BUDGET: Any = Field(None, description="What `keep: auto` may spend; unset: 0.3 point of top-1.")
Train = Literal["lora", "critical", "all"]
TRAIN: Any = Field(
    "lora",
    description="What is trained where there are adapters. `lora`: the adapters, and the head if `lora.train_head`. "
    "`critical`: the layers that `critical` names besides, whole and in full precision: they are not quantized and "
    "need no adapter. `all`: the adapters and everything that is in floating point (of a quantized base, what is not "
    "quantized; of a float base, every weight). Checkpoints hold what is trained.",
)
CRITICAL: Any = Field(
    ("patch_embed", "first_block", "last_block", "norms", "head"),
    description="Layers that `train: critical` trains whole: entries as in `keep`, and `norms` for all normalisation.",
)


class AutoKeep(Config):
    """Limits within which `keep: auto` chooses. With neither set, `max_drop` is 0.3."""

    max_drop: float | None = Field(
        None,
        ge=0,
        description="Points of top-1 that may be lost on the calibration images, or of agreement with full precision "
        "where these have no labels. As few bytes as possible are kept for it.",
    )
    max_bytes: PositiveInt | None = Field(
        None,
        description="What the tensors of the model file may weigh. Alone: the closest model that fits.",
    )

    @property
    def drop_limit(self) -> float | None:
        """`max_drop`, or its default where no limit is set at all."""
        return 0.3 if self.max_drop is None and self.max_bytes is None else self.max_drop


def needs_auto(budget: AutoKeep | None, info: ValidationInfo) -> AutoKeep | None:
    """Validator of `budget`: it is a limit for `keep: auto` and would mean nothing beside a list."""
    if budget is not None and info.data.get("keep", "auto") != "auto":
        raise ValueError("is for `keep: auto`, and quantization.keep is a list; leave one of the two out")
    return budget


def named(keep: Sequence[str]) -> Sequence[str]:
    """The entries of a `keep` that is a list.

    Raises:
        UserError: it is still `auto`.
    """
    if keep == "auto":
        raise UserError(
            "quantization.keep=auto is chosen on calibration images, by `python -m vit_efficient.quantize`. The recipe "
            "that it writes lists the layers: use that one, or name them."
        )
    return keep


class LoraConfig(Config):
    """Low-rank adapters, through peft."""

    rank: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(
        16, description="Adapters are scaled by alpha / rank, with `rslora` by alpha / sqrt(rank)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(
        ("qkv", "proj", "fc1", "fc2"), description="Roles that get adapters."
    )
    dora: bool = Field(
        False,
        description="DoRA: the length of each weight row is trained apart from its direction. Better at low ranks; "
        "slower, as each step needs the lengths of all rows.",
    )
    rslora: bool = Field(False, description="rsLoRA: scaled by alpha / sqrt(rank), so that high ranks keep learning.")
    train_head: bool = Field(True, description="Train the classification head besides the adapters.")
    lr_scale: PositiveFloat = Field(1.0, description="Multiplier of `optim.lr`: adapters want another rate.")


def needs_adapters(value: str | None, info: ValidationInfo) -> str | None:
    """Refuses a key that is for adapters where there are none. A validator of keys that come after `lora`.

    Raises:
        ValueError: `quantization.lora` is unset.
    """
    default = "lora" if info.field_name == "train" else None
    if value != default and info.data.get("lora", value) is None:
        without = "to train from weights set model.weights" if info.field_name == "base" else "all weights are trained"
        raise ValueError(f"is for adapters, and quantization.lora is unset; {without}")
    return value


def needs_critical(critical: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Refuses `critical` where nothing reads it. A validator of the key, which comes after `train`.

    Raises:
        ValueError: it is set, and `train` is something else; or it is empty.
    """
    train = info.data.get("train", "critical")
    if train != "critical" and critical != CRITICAL.default:
        raise ValueError(f"is for quantization.train=critical, and that is {train}")
    if not critical:
        raise ValueError("names no layer; quantization.train=lora trains the adapters alone")
    return critical


class DistillConfig(Config):
    """Distillation from a full-precision teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

    teacher: str = Field(
        "base",
        description="A weight file or an fp32 run's folder; `base`: the full-precision weights that the run itself "
        "starts from.",
    )
    temperature: PositiveFloat = Field(2.0, description="Both sides' logits are divided by it; 1 leaves them as is.")
    alpha: float = Field(
        0.5, ge=0, le=1, description="Weight of the teacher: loss = (1 - alpha) CE + alpha T^2 KL(teacher || student)."
    )


DISTILL: Any = Field(None, description="Learn from a full-precision teacher besides the labels; unset: labels alone.")


@dataclass(frozen=True)
class Report:
    """What a backend did to a model.

    Args:
        scheme: name of the backend.
        quantized: (module name, role, kind) of each layer that was quantized; kind is ``linear`` or ``patches``.
        kept: (module name, role, reason) of each layer that was not; the reason is the entry of `keep`, or ``other``.
        quantized_parameters: how many weights are stored in fewer bits.
        adapters: names of the modules that got low-rank adapters.
        trained: (module name, entry of `critical`, or ``all``) of what is trained whole besides them.
    """

    scheme: str
    quantized: list[tuple[str, str, str]] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)
    quantized_parameters: int = 0
    adapters: list[str] = field(default_factory=list)
    trained: list[tuple[str, str]] = field(default_factory=list)

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
        if self.kept:
            lines[0] += "; kept " + _by_reason((name, reason) for name, _, reason in self.kept)
        if self.adapters:
            lines.append(f"adapters on {len(self.adapters)} layers")
        if self.trained:
            lines.append("trained whole, in full precision: " + _by_reason(self.trained))
        return lines


def _by_role(layers: list[tuple[str, str, str]]) -> str:
    return ", ".join(f"{role} {count}" for role, count in Counter(role for _, role, _ in layers).items())


def _by_reason(names: Iterable[tuple[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in names:
        reasons.setdefault(reason, []).append(name)
    return ", ".join(f"{reason} ({_shortened(names)})" for reason, names in reasons.items())


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
