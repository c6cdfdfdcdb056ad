"""The picture and the table of a sensitivity measurement, from figures made up to be read off again."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from vit_efficient.measure.sensitivity_plot import draw, sensitivity_figure
from vit_efficient.measure.sensitivity_table import plain, sensitivity_table, worst_first
from vit_efficient.quantization.agreement import LogitComparison
from vit_efficient.quantization.sensitivity import Kind, Record, Subject, added_bytes

ROLES = ("qkv", "proj", "fc1", "fc2")


def record(
    kind: Kind, name: str, kl: float, *, agreement: float = 1.0, role: str | None = None, block: int | None = None,
    layers: int = 1, broken: int = 0,
) -> Record:  # fmt: skip
    logits = LogitComparison(-math.inf if broken else 20.0, kl, agreement, 200, broken)
    subject = Subject(kind, name, ("layer",) * layers, role, block)
    return Record(subject, 1000 * layers, 4000 * layers, logits)


def records(depth: int = 4, *, broken: bool = False) -> list[Record]:
    """Layer r of block b has a KL divergence of (r + 1) 10^-(b + 2)."""
    made = [record("float", "full precision", 0.0, layers=0), record("all", "everything", 0.5, layers=20)]
    made.append(record("layer", "patch_embed.proj", 3e-3, role="patch_embed"))
    for block in range(depth):
        for index, role in enumerate(ROLES):
            kl = (index + 1) * 10.0 ** -(block + 2)
            made.append(record("layer", f"blocks.{block}.{role}", kl, agreement=1 - kl, role=role, block=block))
    made.append(record("layer", "head", math.inf if broken else 2e-3, role="head", broken=7 * broken))
    made += [record("role", role, 0.05, layers=depth) for role in ROLES]
    made += [record("block", f"blocks.{block}", 0.1 / (block + 1), block=block) for block in range(depth)]
    made.append(record("protect", "first_block, last_block", 0.2, agreement=0.91, layers=12))
    return made


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_lines_hold_the_figures() -> None:
    figure = sensitivity_figure(records(), "title")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert axes.get_yscale() == "log"
    assert list(lines["fc2"].get_xdata()) == [0, 1, 2, 3]
    assert [round(value, 9) for value in lines["fc2"].get_ydata()] == [4e-2, 4e-3, 4e-4, 4e-5]
    assert list(lines["patch_embed"].get_xdata()) == [-1]
    assert list(lines["head"].get_xdata()) == [4]
    assert list(lines["everything"].get_ydata()) == [0.5, 0.5]
    assert set(ROLES) < set(lines)


def test_bars_say_what_protection_buys_and_costs() -> None:
    figure = sensitivity_figure(records(), "title")
    lengths = [bar.get_width() for bar in figure.axes[3].patches]
    assert lengths == [0.5, 0.2]
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == [
        "nothing",
        "first_block\nand last_block",
    ]
    assert "91.0 %, +24 kB" in texts(figure)  # 8 of 20 layers, of 1,000 and 4,000 bytes
    assert "200 images" in figure.get_suptitle()


def test_agreement_is_written_in_cells() -> None:
    shown = texts(sensitivity_figure(records(), "title"))
    assert {"96.0", "97.0", "98.0", "99.0"} <= set(shown), "block 0"
    assert "100" in shown


def test_broken_layer_is_marked_and_does_not_stretch_the_axis(tmp_path: Path) -> None:
    figure = sensitivity_figure(records(broken=True), "title")
    assert "NaN" in texts(figure)
    assert figure.axes[0].get_ylim()[1] == 1.0
    draw(records(broken=True), "title", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        picture.verify()
        assert picture.format == "PNG"


def test_one_block_and_nothing_but_zeros() -> None:
    """A model of one block whose quantization changed nothing can be drawn too."""
    made = [record("all", "everything", 0.0), record("layer", "blocks.0.fc1", 0.0, role="fc1", block=0)]
    low, high = sensitivity_figure(made, "title").axes[0].get_ylim()
    assert 0 < low < high


def test_table_shows_the_worst_layers_first() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sensitivity_table(records(broken=True), "vit, int8"))
    printed = console.export_text()
    rows = [line for line in printed.splitlines() if "blocks." in line or "head" in line]
    assert "one layer, 12 worst of 18" in printed
    first = next(row for row in rows if "head" in row)
    assert first.count("NaN") == 2
    assert rows.index(first) < rows.index(next(row for row in rows if "blocks.0.fc2" in row))
    assert "blocks.3.qkv" not in printed
    assert "24 kB more" in printed
    assert worst_first(records(broken=True))[0].subject.name == "head"


def test_table_of_a_real_model_fits_80_columns() -> None:
    """Names whole, so that no two layers look alike; the longest figures that a ViT-L gives."""
    names = [f"blocks.{block}.{part}" for block in (9, 23) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    large = {"weight_bytes": 312_000_000, "float_bytes": 1_217_000_000, "top1": 0.8, "lost": 30, "gained": 5}
    made = [
        replace(record(kind, name, 1.234e-5, layers=2), **large)
        for kind, name in [
            ("all", "everything"), *(("layer", name) for name in names), ("role", "patch_embed"),
            ("block", "blocks.23"), ("protect", "first_block, last_block"),
        ]
    ]  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sensitivity_table(made, "vit_large_patch16_224, int8"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in "".join(lines)
    for name in (*names, "first_block, last_block"):
        row = [line for line in lines if f" {name} " in line]
        assert len(row) == 1, name
        assert "+12.5" in row[0]
        assert "1.2e-05" in row[0]
    low, high = plain(made)["records"][0]["drop_interval"]
    assert low < 12.5 < high


def test_plain_data_is_json_without_infinities() -> None:
    made = records(broken=True)
    data = json.loads(json.dumps(plain(made), allow_nan=False))
    assert data["images"] == 200
    by_name = {(entry["kind"], entry["name"]): entry for entry in data["records"]}
    head = by_name["layer", "head"]
    assert (head["kl"], head["snr_db"], head["broken"], head["role"]) == (None, None, 7, "head")
    layer = by_name["layer", "blocks.2.fc1"]
    assert layer["kl"] == pytest.approx(3e-4)
    assert (layer["block"], layer["weight_bytes"], layer["top1"]) == (2, 1000, None)


def test_added_bytes() -> None:
    everything, protected = record("all", "everything", 0.5, layers=20), record("protect", "head", 0.2, layers=12)
    assert added_bytes(everything, protected) == 8 * (4000 - 1000)
