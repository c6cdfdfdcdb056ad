"""Which tiles the matrix kernels use: chosen by operator, chip and shape; shipped for known chips, measured on request.

Looked up in this order, so a first call never measures anything:

1. what `forced` asks for (the tuner, tests);
2. this machine's file, `$VIT_EFFICIENT_CACHE/tiles-v1/CHIP.json`, which `vit_efficient.kernels.tune` writes;
3. the shipped table `tiles.json` under the chip's name (measured there);
4. the shipped table under its architecture, `sm_90`, `sm_89` or `sm_80` (chosen from what the architecture offers, not
   measured); an architecture that is not listed takes the one before it, and sm_12x, whose programs have as little
   shared memory, sm_89's.

An entry serves the shape that it names, every shape within a range of rows and outputs, or any:

    {"op": "int8_linear.gelu_quant", "rows": 50432, "inputs": 1024, "outputs": 4096, "tile": {...}}
    {"op": "int8_linear", "rows_up_to": 256, "outputs_up_to": 1024, "tile": {...}}
    {"op": "int8_linear", "rows_from": 4097, "tile": {...}}

An operator is named with or without its form, behind a dot; the form's own entries come first. A named shape serves all
with the same inputs and outputs whose rows lie within a factor of 1.5.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vit_efficient.errors import UserError
from vit_efficient.machine import cache_dir

SHIPPED = "tiles.json"
CONSUMER = 120  # sm_12x: shared memory and matrix instructions as of sm_89, and not as of sm_90 or sm_100
NEAR = 1.5  # factor in rows within which a measured tile serves another shape


@dataclass(frozen=True)
class Tile:
    """How a matrix kernel cuts its work.

    Args:
        block_m: rows of a tile of the output.
        block_n: columns of it.
        block_k: inputs that a step takes.
        group: rows of tiles that are worked on together, so that they share the weight in the cache.
        warps: of a program.
        stages: steps whose operands are in flight.
        parts: that a tile is finished in, one after the other (1, 2 or 4): fewer registers and less shared memory.
        programs: on each multiprocessor.
        registers: that a thread may have, so that several programs fit; 0: as many as the compiler wants.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    parts: int = 1
    programs: int = 1
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told of it."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @classmethod
    def read(cls, described: dict[str, Any]) -> Tile:
        """From a mapping with these keys; those that are left out have their defaults."""
        unknown = set(described) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"a tile has no {', '.join(sorted(unknown))}")
        return cls(**described)


@dataclass(frozen=True)
class Shape:
    """Of a product: `rows` x `inputs` times `inputs` x `outputs`."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"


_forced: list[Tile] = []


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every matrix kernel uses `tile` within."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


def chip_of(device: torch.device) -> tuple[str, str]:
    """Name and architecture of a device, `("NVIDIA H200", "sm_90")`; a CPU interprets, and passes for the newest."""
    if device.type != "cuda":
        return "interpreter", "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def choose(op: str, device: torch.device, shape: Shape) -> Tile:
    """The tile of a kernel for a shape."""
    return _forced[-1] if _forced else _choose(op, *_chip(device), shape)


@functools.cache
def _chip(device: torch.device) -> tuple[str, str]:
    return chip_of(device)


@functools.cache
def _choose(op: str, name: str, architecture: str, shape: Shape) -> Tile:
    shipped = _shipped()
    for table in (read_table(own_file(name)), shipped.get(name, []), shipped[_listed(architecture, shipped)]):
        found = pick(table, op, shape)
        if found is not None:
            return found
    raise ValueError(f"{SHIPPED} has no tile for {op} at {shape} on {architecture}")  # a test reads the whole table


def pick(table: list[dict[str, Any]], op: str, shape: Shape) -> Tile | None:
    """The entry that serves a shape: the nearest named one, else the tightest class; the form's own come first."""
    for name in dict.fromkeys((op, op.partition(".")[0])):
        entries = [entry for entry in table if entry["op"] == name]
        found = _nearest(entries, shape) or _tightest(entries, shape)
        if found is not None:
            return Tile.read(found["tile"])
    return None


def _nearest(entries: list[dict[str, Any]], shape: Shape) -> dict[str, Any] | None:
    named = [e for e in entries if (e.get("inputs"), e.get("outputs")) == (shape.inputs, shape.outputs)]
    ratios = [(max(e["rows"] / shape.rows, shape.rows / e["rows"]), e) for e in named if shape.rows]
    near = [(ratio, e) for ratio, e in ratios if ratio <= NEAR]
    return min(near, key=lambda pair: pair[0])[1] if near else None


def _tightest(entries: list[dict[str, Any]], shape: Shape) -> dict[str, Any] | None:
    def limits(entry: dict[str, Any]) -> tuple[float, float]:
        return entry.get("rows_up_to", math.inf), entry.get("outputs_up_to", math.inf)

    classes = [
        e
        for e in entries
        if "rows" not in e and e.get("rows_from", 0) <= shape.rows <= limits(e)[0] and shape.outputs <= limits(e)[1]
    ]
    return min(classes, key=limits, default=None)


def _listed(architecture: str, shipped: dict[str, Any]) -> str:
    """The newest architecture of the table that is not newer than this one; of those with its shared memory."""
    if CONSUMER <= _number(architecture) < CONSUMER + 10:
        return "sm_89"
    known = sorted((name for name in shipped if name.startswith("sm_")), key=_number)
    return max((name for name in known if _number(name) <= _number(architecture)), key=_number, default=known[0])


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


@functools.cache
def _shipped() -> dict[str, list[dict[str, Any]]]:
    text = importlib.resources.files("vit_efficient.kernels").joinpath(SHIPPED).read_text(encoding="utf-8")
    return json.loads(text)["chips"]


def own_file(chip: str) -> Path:
    """Where this machine's tiles for a chip are kept."""
    return cache_dir() / "tiles-v1" / f"{chip.replace(' ', '_').replace('/', '_')}.json"


def read_table(path: Path) -> list[dict[str, Any]]:
    """Entries of a file; none if it is not there.

    Raises:
        UserError: it is there and is no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        entries = json.loads(text)["tiles"]
        for entry in entries:
            Tile.read(entry["tile"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of tiles ({error}). Delete it; `tune` writes a new one.") from None
    return entries


def keep(chip: str, op: str, shape: Shape, tile: Tile, milliseconds: float, versions: dict[str, str]) -> Path:
    """Write a measured tile into this machine's file, in place of an older one for the same shape.

    The file is replaced in one step, so that a reader sees the old one or the new one.
    """
    path = own_file(chip)
    named = {"op": op, **asdict(shape)}
    others = [e for e in read_table(path) if any(e.get(key) != value for key, value in named.items())]
    entry = {**named, "tile": asdict(tile), "ms": round(milliseconds, 5), "versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump({"tiles": [*others, entry]}, file, indent=1)
    os.replace(file.name, path)
    _choose.cache_clear()
    return path
