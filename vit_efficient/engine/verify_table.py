"""What `quantize --verify` prints: a row for each layer and backend, figures of whole runs, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vit_efficient.engine.parts import FP8_UNITS
from vit_efficient.engine.tally import (
    FP8_CHANGED,
    FUSED,
    GELU_SHARE,
    OFF_BY,
    OUTPUT,
    REFERENCE,
    SHARE,
    Tally,
    VerifyResult,
)


def show(result: VerifyResult, console: Console) -> None:
    """Print a result, in 80 columns where sentences may wrap."""
    table = Table(title="digests of the codes entering each layer, and of its output", title_justify="left", box=SIMPLE)
    table.add_column("layer", overflow="fold")
    table.add_column("backend", no_wrap=True)
    table.add_column("codes    output", no_wrap=True)
    table.add_column("equal", justify="right", no_wrap=True)
    table.add_column("off", justify="right")
    broken = {(name, layer) for name, layer, _ in result.failures}
    for layer in result.layers[REFERENCE]:
        for name, tallies in result.layers.items():
            if layer not in tallies:  # integer attention within fused blocks: seen by the codes behind it
                continue
            tally, first = tallies[layer], name == REFERENCE
            mark = "[bold red]" if (name, layer) in broken else ""
            own = ("", "") if first else (f"{mark}{_percent(tally.share)}", f"{mark}{tally.largest}")
            table.add_row(layer if first else "", name, tally.digests(), *own)
    console.print(table)
    console.print(
        "equal, off: codes against the definition's on the same input of the layer (of fp8 in steps of the format). "
        "Bounds: all codes, and all outputs of integer layers, bit for bit; outputs of attention within 1e-5 "
        "(of e4m3 queries and keys 1.5e-2, of e4m3 weights 5e-2), of fp8 "
        f"units 1e-3 (fast: 1e-2); of onnx {100 * SHARE:.2f} % of codes, off by {OFF_BY}, outputs within {OUTPUT:.0e}. "
        f"Of fused blocks: on a CPU all codes; on a GPU {100 * SHARE:.2f} %, behind an MLP's activation "
        f"{100 * GELU_SHARE:.1f} %, off by {OFF_BY}; fp8 {100 * (1 - FP8_CHANGED * FP8_UNITS):.0f} %. "
        "Digests are of whole runs: those of a backend that rounds norms or softmax otherwise, as onnx does, soon "
        "differ.",
        soft_wrap=True,
    )
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(result: VerifyResult) -> Iterator[str]:
    for name, difference in result.logits.items():
        last, (same, total) = list(result.layers[name].values())[-1], result.top1[name]
        yield (
            f"{name}, whole runs: logits differ from the reference's by {difference:.1e} of their norm; "
            f"{_percent(last.running / max(1, last.total))} of the last layer's codes are equal; the same top-1 on "
            f"{same} of {total} images"
        )
    if result.given is not None:
        tallies = result.layers[FUSED]
        lowest = min(tallies, key=lambda name: tallies[name].share)
        yield (
            f"fused, each layer given the same codes: logits differ by {result.given[0]:.1e} of their norm (bound "
            f"{result.given[1]:.0e}); {_percent(_total_share(tallies.values()))} of all codes are equal, fewest at "
            f"{lowest}: {_percent(tallies[lowest].share)}"
        )
    for name, (share, difference) in result.bf16.items():
        what = "reference in fp32" if name == "fp32" else name
        against = "fp32" if name == FUSED else "bf16"
        yield (
            f"bf16, {what} against the reference in {against}: {_percent(share)} of all codes equal, "
            f"logits differ by {difference:.1e} of their norm"
            + ("" if name in ("fp32", FUSED) else f" (bound {result.bf16_bound:.1e})")
        )
    for name, reason in result.absent.items():
        yield f"{name}: absent, {reason}"
    if result.ok:
        yield f"[bold green]verified[/]: {', '.join(result.layers)} keep their bounds in every layer"
        return
    for name, layer, reason in result.failures[:5]:
        yield f"[bold red]broken[/]: {name}, {layer}: {reason}"
    if len(result.failures) > 5:
        yield f"and {len(result.failures) - 5} more"


def _total_share(tallies: Iterable[Tally]) -> float:
    counted = list(tallies)
    return sum(tally.equal for tally in counted) / max(1, sum(tally.total for tally in counted))


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"
