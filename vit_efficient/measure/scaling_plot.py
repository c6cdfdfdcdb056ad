"""Images a second and GPU against the number of GPUs: the curve that the performance model predicts, and what was
measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vit_efficient.measure.gpus import GpuKind
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import step_time

NUMBERS = tuple(2**n for n in range(11))
# Label -> (kind, hybrid).
CURVES = {"DDP": ("ddp", False), "FSDP2, full": ("fsdp", False), "FSDP2, hybrid": ("fsdp", True)}


def layout_of(curve: str, number: int) -> Layout:
    """`number` GPUs, eight to a node."""
    kind, hybrid = CURVES[curve]
    return Layout(kind, min(8, number), max(1, number // 8), hybrid=hybrid)  # type: ignore[arg-type]


def weak_scaling(
    plan: Plan, kind: GpuKind, curve: str, *, images: int = 128, numbers: Sequence[int] = NUMBERS
) -> list[float]:
    """Images a second and GPU, `images` on each whatever their number, blocks compiled, data at hand."""
    speeds = []
    blocks = len(plan.built.blocks)
    for number in numbers:
        layout = layout_of(curve, number)
        weights = plan.weights(layout)
        _, work = plan.count(images, checkpointing=False, narrow=layout.kind == "fsdp")
        gathered = blocks * weights.block + weights.rest
        step = step_time(
            work, layout, weights, kind, images=images, compiled=True, gathered=gathered, blocks=blocks
        )  # fmt: skip
        speeds.append(images / step.seconds)
    return speeds


def scaling_figure(
    plan: Plan, kind: GpuKind, measured: Mapping[str, Mapping[int, float]], *, images: int = 128
) -> Figure:
    """Curves of `CURVES`, and measured points: label -> number of GPUs -> images a second and GPU."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(CURVES):
        axes.plot(
            NUMBERS, weak_scaling(plan, kind, curve, images=images), color=f"C{number}", label=f"{curve}, predicted"
        )
        if points := measured.get(curve):
            axes.plot(
                list(points), list(points.values()), "o", color=f"C{number}", label=f"{curve}, measured"
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUMBERS, [f"{n:,}" for n in NUMBERS])
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs (eight to a node)")
    axes.set_ylabel("images/s a GPU")
    axes.set_title(f"{plan.recipe.model.name}, {images} images a GPU, {kind.name}", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)
    return figure


def draw(
    plan: Plan, kind: GpuKind, measured: Mapping[str, Mapping[int, float]], path: Path, *, images: int = 128
) -> None:
    """Write `scaling_figure` as a PNG."""
    scaling_figure(plan, kind, measured, images=images).savefig(path, dpi=110)
