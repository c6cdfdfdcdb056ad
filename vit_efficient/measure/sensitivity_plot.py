"""The picture of a sensitivity measurement: which layers suffer, over depth, and what protecting some buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_efficient.measure.units import size
from vit_efficient.quantization.sensitivity import Record, added_bytes

# Okabe and Ito's colours, which colour-blind people can tell apart; the markers tell the same in grey.
STYLES = {
    "qkv": ("#0072B2", "o"),
    "proj": ("#E69F00", "s"),
    "fc1": ("#009E73", "^"),
    "fc2": ("#D55E00", "D"),
    "patch_embed": ("#CC79A7", "P"),
    "head": ("#56B4E9", "X"),
}
GREY, LIGHT, PLAIN, ALARM = "#6E6E6E", "#DDDDDD", "#4C72B0", "#B00000"
FLOOR = 1e-9  # nats: below it, two models differ by rounding only


def draw(records: Sequence[Record], title: str, path: Path) -> None:
    """Write the picture as PNG; `path` is replaced."""
    sensitivity_figure(records, title).savefig(path, dpi=140, format="png")


def sensitivity_figure(records: Sequence[Record], title: str) -> Figure:
    """Left, over depth, parts quantized alone: KL divergence and agreement. Right: roles alone, and protection.

    Args:
        records: of `sensitivity.measure`; the quantized model itself is drawn beside the parts where it is among them.
        title: what was measured: model and scheme. The number of images is added.
    """
    depth = 1 + max((record.subject.block for record in records if record.subject.block is not None), default=0)
    figure = Figure(figsize=(max(11.5, 8.0 + 0.32 * depth), 7.0), layout="constrained")
    figure.suptitle(f"{title} against full precision, {records[0].logits.n:,} images", fontweight="bold", fontsize=12)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(1.25, 1))
    parts = [record for record in records if record.subject.kind in ("layer", "block")]
    whole = [record for record in records if record.subject.kind == "all"]
    lines = figure.add_subplot(grid[0, 0])
    _lines(lines, parts, whole, depth)
    _cells(figure.add_subplot(grid[1, 0], sharex=lines), parts, depth)
    for row, kind, heading in ((0, "role", "one role quantized"), (1, "protect", "everything quantized, except")):
        _bars(figure.add_subplot(grid[row, 1]), records, whole, kind, heading)
    return figure


def _place(record: Record, depth: int) -> int:
    """Where a part stands over depth: -1 before the blocks, `depth` behind them."""
    if record.subject.block is not None:
        return record.subject.block
    return -1 if record.subject.role == "patch_embed" else depth


def _lines(axes: Axes, parts: Sequence[Record], whole: Sequence[Record], depth: int) -> None:
    """KL divergence, a line a role through the blocks."""
    finite = [record.logits.kl for record in (*parts, *whole) if FLOOR <= record.logits.kl < math.inf] or [FLOOR]
    low, high = min(finite) / 2, max(2 * max(finite), 5 * min(finite))
    for role in dict.fromkeys(part.subject.role for part in parts):  # None: whole blocks
        own = sorted((part for part in parts if part.subject.role == role), key=lambda part: _place(part, depth))
        places = [_place(part, depth) for part in own]
        heights = [min(max(part.logits.kl, low), high) for part in own]
        if role is None:
            axes.plot(places, heights, color=GREY, linewidth=4, alpha=0.4, label="whole block", zorder=1)
        else:
            colour, marker = STYLES[role]
            split = len(set(places)) < len(places)  # q, k and v apart: a line would jump between them
            axes.plot(
                places, heights, color=colour, marker=marker, linestyle="" if split else "-", linewidth=1.3,
                markersize=5, label=role,
            )  # fmt: skip
        for part, place, height in zip(own, places, heights, strict=True):
            if part.logits.broken:
                axes.annotate("NaN", (place, height), ha="center", va="bottom", fontsize=8, color=ALARM)
    for record in whole:
        axes.axhline(min(record.logits.kl, high), color="black", linestyle="--", linewidth=1, label="everything")
    axes.set(yscale="log", ylim=(low, high), ylabel="KL divergence (nats)")
    axes.set_title("one layer or one block quantized", fontsize=10)
    axes.legend(ncols=8, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.04), columnspacing=1.2)
    axes.tick_params(labelbottom=False)
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _cells(axes: Axes, parts: Sequence[Record], depth: int) -> None:
    """Agreement, a cell a layer; the lowest where q, k and v are layers of their own."""
    rows = list(dict.fromkeys(_row(part) for part in parts))
    table = [[math.nan] * (depth + 2) for _ in rows]
    for part in parts:
        row, column = table[rows.index(_row(part))], _place(part, depth) + 1
        lost = 100 * (1 - part.logits.agreement)
        row[column] = max(lost, row[column]) if row[column] == row[column] else lost
    most = max((lost for row in table for lost in row if lost == lost), default=0.0)
    axes.imshow(
        table,
        aspect="auto",
        cmap="Oranges",
        vmin=0,
        vmax=max(most, 0.5),
        extent=(-1.5, depth + 0.5, len(rows) - 0.5, -0.5),
    )
    for y, row in enumerate(table):
        for x, lost in enumerate(row, start=-1):
            if lost == lost:
                colour = "white" if lost > 0.65 * max(most, 0.5) else "black"
                text = "100" if lost == 0 else f"{100 - lost:.1f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    columns = {_place(part, depth) for part in parts}
    step = max(1, depth // 16)
    ticks = [(-1, "embed")] * (-1 in columns) + [(block, str(block)) for block in range(0, depth, step)]
    ticks += [(depth, "head")] * (depth in columns)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(min(columns) - 0.5, max(columns) + 0.5)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("block")
    axes.set_title("top-1 agreement (%)", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _row(part: Record) -> str:
    """Layers outside the blocks have columns of their own, so one row serves all of them."""
    if part.subject.kind == "block":
        return "whole block"
    return str(part.subject.role) if part.subject.block is not None else "outside"


def _bars(axes: Axes, records: Sequence[Record], whole: Sequence[Record], kind: str, title: str) -> None:
    """KL divergence a bar, the shorter the better, with the agreement written at its end."""
    kinds = ("role", "rest") if kind == "role" else (kind,)
    shown = [*whole, *(record for record in records if record.subject.kind in kinds)]
    finite = [record.logits.kl for record in shown if record.logits.kl < math.inf]
    longest = max([*finite, FLOOR])
    for place, record in enumerate(shown):
        length = min(record.logits.kl, longest)
        colour = GREY if record.subject.kind == "all" else STYLES.get(record.subject.name, (PLAIN, ""))[0]
        axes.barh(place, length, color=colour, alpha=0.85)
        figures = "NaN" if record.logits.broken else f"{100 * record.logits.agreement:.1f} %"
        if record.subject.kind == "protect" and whole:
            figures += f", +{size(added_bytes(whole[0], record))}"
        inside = length > 0.6 * longest  # the figures stand inside a long bar, and behind a short one
        axes.annotate(
            figures, (length, place), (-4 if inside else 4, 0), textcoords="offset points", va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    names = {"all": "everything" if kind == "role" else "nothing"}
    labels = [names.get(record.subject.kind, record.subject.name.replace(", ", "\nand ")) for record in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.04 * longest)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("KL divergence (nats)" + ("; agreement, bytes added" if kind == "protect" else ""), fontsize=9)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
