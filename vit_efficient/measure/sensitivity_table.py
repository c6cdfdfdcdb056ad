"""A sensitivity measurement in a terminal of 80 columns, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from vit_efficient.measure.logits import tango
from vit_efficient.measure.units import size
from vit_efficient.quantization.sensitivity import Kind, Record, added_bytes

WORST = 12  # single layers shown; a file holds all of them
SECTIONS: tuple[tuple[Kind, str], ...] = (
    ("all", ""),
    ("rest", ""),
    ("role", "one role"),
    ("block", "one block"),
    ("layer", "one layer"),
    ("protect", "all except"),
)


def sensitivity_table(records: Sequence[Record], title: str) -> Table:
    """What is quantized, worst first among single layers and in the model's order elsewhere.

    Names are never cut: `blocks.1.mlp.fc1` and `blocks.1.mlp.fc2` differ in their last letter.

    Args:
        records: of `sensitivity.measure`.
        title: model and scheme.
    """
    n, labelled = records[0].logits.n, records[0].top1 is not None
    whole = next((record for record in records if record.subject.kind == "all"), None)
    table = Table(
        title=f"{title}: sensitivity, {n:,} images",
        title_justify="left",
        title_style="bold",
        caption="size: of these layers, and as a share of float; drop: points of top-1, its interval is in the file"
        if labelled
        else "size: of these layers, and as a share of float",
        caption_justify="left",
    )
    table.add_column("quantized", no_wrap=True)
    for heading in ("size", "SNR dB", "KL nats", "agree", *(("drop",) if labelled else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, heading in SECTIONS:
        own = [record for record in records if record.subject.kind == kind]
        if not own:
            continue
        if kind == "layer":
            heading += f", {WORST} worst of {len(own)}" if len(own) > WORST else ""
            own = worst_first(own)[:WORST]
        if heading:
            table.add_section()
            table.add_row(f"[bold]{heading}[/]")
        for record in own:
            table.add_row(*_cells(record, whole, labelled))
    return table


def worst_first(records: Sequence[Record]) -> list[Record]:
    """By KL divergence, broken ones in front; equal ones stay in the model's order."""
    return sorted(records, key=lambda record: -record.logits.kl)


def plain(records: Sequence[Record]) -> dict[str, Any]:
    """For a JSON file: `images`, and under `records` a flat mapping each.

    With labels, `drop` is in points of top-1 and `drop_interval` its 95 % interval (`tango`); without, the one is in
    points of agreement and the other null. Infinite figures become null: `snr_db` of equal logits, and `snr_db` and
    `kl` of a model that is `broken`.
    """
    return {"images": records[0].logits.n, "records": [_flat(record) for record in records]}


def _flat(record: Record) -> dict[str, Any]:
    whole = asdict(record)
    flat = {**whole.pop("subject"), **whole.pop("logits"), **whole}
    del flat["n"]
    flat["drop"], flat["drop_interval"] = record.drop, None
    if record.lost is not None and record.gained is not None:
        flat["drop_interval"] = [100 * end for end in tango(record.lost, record.gained, record.logits.n)]
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in flat.items()}


def _cells(record: Record, whole: Record | None, labelled: bool) -> list[str]:
    logits = record.logits
    if record.subject.kind == "protect" and whole is not None:
        weight = f"{size(added_bytes(whole, record))} more"
    elif record.float_bytes:
        weight = f"{size(record.weight_bytes)}, {record.weight_bytes / record.float_bytes:.2f}"
    else:
        weight = "no layer"
    cells = [record.subject.name, weight]
    if logits.broken:
        cells += ["NaN", "NaN"]
    else:
        cells += ["equal" if math.isinf(logits.snr_db) else f"{logits.snr_db:.1f}", f"{logits.kl:.2g}"]
    cells.append(f"{100 * logits.agreement:.1f} %")
    if labelled:
        cells.append(f"{record.drop:+.1f}")
    return cells
