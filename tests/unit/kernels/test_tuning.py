"""Which tiles kernels use: the order of the places they are looked up in, and the shipped table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vit_efficient.errors import UserError
from vit_efficient.kernels import tuning
from vit_efficient.kernels.tuning import Shape, Tile

FORMS = ("plain", "gelu", "gelu_quant", "quant", "residual", "heads", "heads_quant")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path))
    tuning._choose.cache_clear()
    return tmp_path


def test_the_shipped_table_serves_every_form_and_shape() -> None:
    shipped = tuning._shipped()
    for chip in (name for name in shipped if name.startswith("sm_")):  # where a named chip has none, these serve it
        ops = {entry["op"].partition(".")[0] for entry in shipped[chip]}
        for op in ops:
            for form in FORMS:
                for rows in (1, 197, 257, 1024, 1025, 50432, 10**7):
                    tile = tuning.pick(shipped[chip], f"{op}.{form}", Shape(rows, 1024, 4096))
                    assert tile is not None
                    assert tile.parts in (1, 2, 4)
                    assert tile.block_n % (16 * tile.parts) == 0


def test_a_measured_chip_has_its_own_tiles_and_else_those_of_its_architecture() -> None:
    for rows, from_chip in ((50432, True), (2000, False)):
        shape = Shape(rows, 1024, 4096)
        own = tuning.pick(tuning._shipped()["NVIDIA H200"], "int8_linear.gelu_quant", shape)
        assert (own is not None) == from_chip
        expected = own or tuning.pick(tuning._shipped()["sm_90"], "int8_linear.gelu_quant", shape)
        assert tuning._choose("int8_linear.gelu_quant", "NVIDIA H200", "sm_90", shape) == expected


def test_a_forms_own_entry_and_a_near_shape_come_first() -> None:
    wide, narrow, named = ({"block_m": 64, "block_n": n, "block_k": 64} for n in (256, 32, 128))
    table = [
        {"op": "a", "tile": wide},
        {"op": "a", "rows_up_to": 100, "tile": narrow},
        {"op": "a.gelu", "rows": 1000, "inputs": 8, "outputs": 9, "tile": named},
    ]
    for op, shape, expected in (
        ("a", Shape(101, 8, 9), wide),
        ("a", Shape(100, 8, 9), narrow),
        ("a.gelu", Shape(1400, 8, 9), named),
        ("a.gelu", Shape(1600, 8, 9), wide),
        ("a.gelu", Shape(1000, 8, 10), wide),
        ("b", Shape(1, 8, 9), None),
    ):
        found = tuning.pick(table, op, shape)
        assert found == (None if expected is None else Tile.read(expected)), (op, shape)


def test_what_was_measured_here_comes_before_the_table_and_what_is_forced_before_both() -> None:
    shape, measured, asked = Shape(500, 64, 64), Tile(16, 16, 32), Tile(32, 32, 32)
    assert tuning.choose("int8_linear.plain", CPU, shape) not in (measured, asked)
    path = tuning.keep("interpreter", "int8_linear.plain", shape, Tile(128, 16, 32), 2.0, {"triton": "1"})
    tuning.keep("interpreter", "int8_linear.plain", shape, measured, 1.0, {"triton": "1"})
    assert path.is_file()
    assert len(tuning.read_table(path)) == 1
    assert tuning.choose("int8_linear.plain", CPU, shape) == measured
    assert tuning.choose("int8_linear.heads", CPU, shape) != measured
    with tuning.forced(asked):
        assert tuning.choose("int8_linear.plain", CPU, shape) == asked
    assert tuning.choose("int8_linear.plain", CPU, shape) == measured


def test_a_chip_that_is_not_listed_takes_the_architecture_before_it() -> None:
    shipped = tuning._shipped()
    assert tuning._listed("sm_100", shipped) == "sm_90"
    assert tuning._listed("sm_103", shipped) == "sm_90"
    assert tuning._listed("sm_86", shipped) == "sm_80"
    assert tuning._listed("sm_75", shipped) == "sm_80"


@pytest.mark.parametrize("architecture", ["sm_120", "sm_121"])
def test_newer_chips_with_little_shared_memory_take_tiles_that_fit_it(architecture: str) -> None:
    shape = Shape(50432, 1024, 4096)
    tile = tuning._choose("int8_linear.plain", "NVIDIA GeForce RTX 5090", architecture, shape)
    assert tile == tuning._choose("int8_linear.plain", "NVIDIA GeForce RTX 4090", "sm_89", shape)
    assert (tile.block_m + tile.block_n) * tile.block_k * tile.stages < 101_376


def test_a_damaged_file_is_explained(cache: Path) -> None:
    path = tuning.own_file("interpreter")
    path.parent.mkdir(parents=True)
    for text in ("{", '{"tiles": [{"tile": {"width": 3}}]}', '{"tiles": [{}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match="Delete it"):
            tuning.choose("int8_linear.plain", CPU, Shape(1, 2, 3))
