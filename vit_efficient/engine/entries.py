"""What the model benchmark is told to measure: recipes and model files; and what else a user could take, as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vit_efficient.errors import UserError

How = Literal["eager", "compiled", "graph", "compiled-graph", "training"]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of `torch.compile`
WITHOUT_GRAPHS: dict[str | None, str | None] = {
    "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the command line names: a recipe with overrides of its own, or a model file, and how it shall run.

    Args:
        source: name or path of a recipe, or a run, model file or checkpoint.
        words: overrides.
        how: the way it runs.
        file: whether `source` is a run, model file or checkpoint.
        name: what to call it; unset: the recipe and its own overrides.
        tf32: whether float32 products may round their operands to TF32.
        stock: timm's model as it is, with nothing of ours in it: of the recipe, only model and precision count.
        mode: of `torch.compile`, where it is compiled; None: its default.
    """

    source: str
    words: tuple[str, ...] = ()
    how: How = "eager"
    file: bool = False
    name: str | None = None
    tf32: bool = False
    stock: bool = False
    mode: str | None = None

    @classmethod
    def of(cls, text: str) -> Entry:
        """A recipe and its own overrides as they stand in one word of the command line: ``"int8_sdpa a=1 b={c: d}"``.

        Split at spaces, but for those inside braces and brackets.
        """
        parts, depth = [""], 0
        for letter in text:
            depth += (letter in "{[") - (letter in "}]")
            if letter.isspace() and depth <= 0:
                parts.append("")
            else:
                parts[-1] += letter
        source, *words = [part for part in parts if part] or [""]
        return cls(source, tuple(words))

    @property
    def title(self) -> str:
        return self.name or " ".join((Path(self.source).name if self.file else self.source, *self.words))

    @property
    def compile_mode(self) -> str | None:
        """What `torch.compile` is told: a program that is captured whole can have no CUDA graphs of its own."""
        if not self.how.startswith("compiled"):
            return None
        return WITHOUT_GRAPHS.get(self.mode, self.mode) if self.how == "compiled-graph" else self.mode


# What a user could take instead: timm's models as they are, and what others quantize, as recipes of ours (so with our
# choice of attention kernel). `--peers` puts them beside the others, `--against` one of them before the others.
PEERS = (
    Entry("fp32_sdpa", name="fp32", stock=True),
    Entry("fp32_sdpa", name="TF32 + compile", how="compiled", tf32=True, stock=True),
    Entry("fp32_sdpa", ("quantization.precision=bf16",), name="bf16", stock=True),
    Entry("fp32_sdpa", ("quantization.precision=bf16",), name="bf16 + graph", how="graph", stock=True),
    Entry("fp32_sdpa", ("quantization.precision=bf16",), name="bf16 + compile", how="compiled", stock=True),
    Entry(
        "fp32_sdpa", ("quantization.precision=bf16",), name="bf16 + compile + graph", how="compiled-graph", stock=True
    ),
    Entry("fp32_sdpa", ("quantization.precision=fp16",), name="fp16 + compile", how="compiled", stock=True),
    Entry(
        "fp32_sdpa",
        (
            "quantization=torchao",
            "quantization.scheme=int8_dynamic_activation_int8_weight",
            "quantization.precision=bf16",
        ),
        name="torchao int8 dynamic + compile",
        how="compiled",
    ),
    Entry(
        "fp32_sdpa",
        (
            "quantization=torchao", "quantization.scheme=float8_dynamic_activation_float8_weight",
            "quantization.precision=bf16",
        ),
        name="torchao fp8 dynamic + compile",
        how="compiled",
    ),
    Entry("fp32_sdpa", ("quantization=bnb_int8", "quantization.precision=fp16"), name="bitsandbytes LLM.int8"),
    Entry("int4_sdpa", ("quantization.lora=null", "quantization.precision=bf16"), name="bitsandbytes nf4"),
)  # fmt: skip


def peer(name: str, *, train: bool) -> Entry:
    """One of `PEERS` by its name, as it is trained if that is asked.

    Raises:
        UserError: none has this name.
    """
    found = next((entry for entry in PEERS if entry.name == name), None)
    if found is None:
        raise UserError(f"--against {name}: no peer has this name. There are: {', '.join(p.title for p in PEERS)}.")
    if not train:
        return found
    compiled = ("strategy.compile=true",) if found.how.startswith("compiled") else ()
    return replace(found, words=(*found.words, *compiled), how="training")


def check_mode(mode: str, entries: Sequence[Entry]) -> str:
    """`--compile-mode`, if it is one and there is somebody that it is for.

    Raises:
        UserError: torch.compile has no such mode, or nothing is compiled.
    """
    if mode not in MODES:
        raise UserError(f"--compile-mode {mode}: torch.compile has {', '.join(MODES)}.")
    if not any(entry.how.startswith("compiled") for entry in entries):
        raise UserError("--compile-mode is for compiled inference, and none of these is. Add `--how compiled`.")
    return mode
