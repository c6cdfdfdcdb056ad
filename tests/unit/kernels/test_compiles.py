"""The kernels are compiled for GPUs that are not here: they use the matrix units, and the shipped tiles fit the memory.

Triton needs no GPU to compile. What cannot be seen so is whether the results are right: tests/kernels.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.layernorm_quant.triton import _kernel as norm_kernel
from vit_efficient.kernels.linear.launch import PROMOTE, Form, fit
from vit_efficient.kernels.linear.triton import linear_kernel
from vit_efficient.kernels.quantize.triton import _dequantize_kernel as dequantize_kernel
from vit_efficient.kernels.quantize.triton import _kernel as quantize_kernel
from vit_efficient.kernels.tuning import Shape, Tile, _listed, _shipped, pick

pytestmark = pytest.mark.slow
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376}
"""Bytes that a program may have."""
OF_A_PROCESSOR = {chip: size + 1024 for chip, size in SHARED.items()}  # each program takes 1,024 besides
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_120": 170}
ALIGNED = ("M", "N", "K", "D", "a_stride", "b_stride", "residual_stride", "x_stride")
INTEGERS = (*ALIGNED, "tokens")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    chip: str,
    warps: int,
    stages: int,
    registers: int = 0,
) -> Any:
    """A kernel for a chip. Arguments without a type or a value are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = types | {name: "i32" for name in INTEGERS if name in names}
    constants = {name: None for name in names if name not in types} | constants
    known = [name for name in names if name not in constants]
    aligned = [name for name in known if name in ALIGNED or types[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    options |= {"maxnreg": registers} if registers else {}
    return triton.compile(source, target=GPUTarget("cuda", int(chip[3:]), 32), options=options)


LINEAR = [
    ("sm_90", "int8_linear", "plain"), ("sm_90", "int8_linear", "gelu_quant"), ("sm_90", "int8_linear", "residual"),
    ("sm_90", "int8_linear", "gelu_quant smooth"), ("sm_80", "int8_linear", "gelu_quant smooth"),
    ("sm_90", "int8_linear", "heads_quant"), ("sm_90", "fp8_linear_fast", "gelu_quant"),
    ("sm_90", "fp8_linear", "residual"), ("sm_89", "fp8_linear", "gelu_quant"), ("sm_89", "int8_linear", "heads_quant"),
    ("sm_80", "int8_linear", "gelu_quant"), ("sm_80", "int8_linear", "residual"), ("sm_90", "half_linear", "gelu"),
]  # fmt: skip


MANY = Shape(50432, 1024, 3072)


def form_of(name: str) -> Form:
    """What follows the product, of heads that are 64 wide."""
    return Form(
        layout="heads" if "heads" in name else "rows", gelu="gelu" in name, heads=16, width=64, tokens=197,
        quant="none" if "quant" not in name else "token" if "heads" in name else "static",
    )  # fmt: skip


def is_alone(tile: Tile, step: int, shape: Shape, chip: str) -> bool:
    """Whether each program has one tile, as a launch finds it."""
    tiles = -(-shape.rows // tile.block_m) * -(-shape.outputs // step)
    return tiles <= PROCESSORS[chip] * tile.programs and tile.parts == 1


def linear_layer(
    chip: str, op: str, name: str, full: bool = True, shape: Shape = MANY, table: str = ""
) -> tuple[Any, Tile, bool]:
    """The kernel with the shipped tile, of fp8 sums `full`, if the operator's are; and whether it asks for its weights
    before it waits, as a launch would have it.

    Args:
        table: the chip by name, if it has tiles of its own.
    """
    name, _, vectors = name.partition(" ")
    tables, op_name = _shipped(), f"{op}.{name}"
    found = pick(tables.get(table, []), op_name, shape) or pick(tables[_listed(chip, tables)], op_name, shape)
    assert found is not None
    form = form_of(name)
    tile, step, head_block = fit(found, form)
    alone = is_alone(tile, step, shape, chip)
    described, half = int(chip[3:]) >= 90, op.startswith("half")
    fp8 = half or op.startswith("fp8")  # as the kernel calls what is summed up in float32
    code = "bf16" if half else "fp8e4nv" if fp8 else "i8"
    out = code if form.quant != "none" else "bf16"
    types = {"row_scale": "*fp32", "column_scale": "*fp32", "bias": "*bf16", "a": f"*{code}", "b": f"*{code}"}
    types["out"] = f"*{out}"
    if described:
        types["a"] = f"tensordesc<{code}[{tile.block_m}, {tile.block_k}]>"
        types["b"] = f"tensordesc<{code}[{tile.block_n}, {tile.block_k}]>"
        if form.layout == "rows":
            types["out"] = f"tensordesc<{out}[{tile.block_m}, {tile.block_n // tile.parts}]>"
    early = described and alone
    if early:
        types["weights"] = f"*{code}"
    if form.quant != "none":
        types["scales"] = "*fp32"
    if form.quant == "static":
        types["out_scale"] = "*fp32"
    if vectors:
        types |= dict.fromkeys(("shift", "smooth", "reciprocal"), "*fp32")
    if name == "residual":
        part = f"[{tile.block_m}, {tile.block_n // tile.parts}]"
        through = described and not alone
        types |= {"residual": f"tensordesc<bf16{part}>" if through else "*bf16", "gamma": "*bf16"}
    constants = {
        "FP8": fp8, "PROMOTE": min(PROMOTE, tile.block_k) if op == "fp8_linear" and full else 0,
        "LAYOUT": form.layout, "GELU": form.gelu, "QUANT": form.quant, "LARGEST": 448 if fp8 else 127,
        "INTEGER": not fp8, "ROW_SCALES": not half, "COLUMN_SCALES": not half,
        "DESCRIPTORS": described, "STORE_DESCRIPTOR": described and form.layout == "rows",
        "RESIDUAL_DESCRIPTOR": described and not alone, "ALONE": alone, "OVERLAP": described,
        "EVEN_K": True, "HEADS": 16, "WIDTH": 64, "HEAD_BLOCK": head_block, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STEP_N": step, "GROUP": tile.group, "PARTS": tile.parts,
    }  # fmt: skip
    return compiled(linear_kernel, types, constants, chip, tile.warps, tile.stages, tile.registers), tile, early


LAYERS = (  # of a ViT-L block, those that take most shared memory first; the fourth is q of a split projection
    ("heads_quant", 1024, 3072), ("residual", 4096, 1024), ("gelu_quant", 1024, 4096), ("heads_quant", 1024, 1024),
    ("residual", 1024, 1024), ("plain", 1024, 3072), ("gelu", 1024, 4096),
)  # fmt: skip


def shipped_tiles() -> list[Any]:
    """Every tile of the table that a layer of a ViT-L takes, at one image and at many, in the first form with it."""
    cases: dict[Any, Any] = {}
    for chip, table in (("sm_90", "NVIDIA H200"), *((chip, "") for chip in SHARED)):
        entries = _shipped()[table or _listed(chip, _shipped())]
        # The slower sums take more registers and no less memory, so they stand for the fast ones.
        for op in ("int8_linear", "fp8_linear", "fp8_linear_fast"):
            for rows in (197, 1000, 4000, 50432):
                for name, inputs, outputs in LAYERS:
                    shape = Shape(rows, inputs, outputs)
                    found = pick(entries, f"{op}.{name}", shape)
                    if found is None or (op.startswith("fp8") and int(chip[3:]) < 89):
                        continue
                    tile, step, _ = fit(found, form_of(name))
                    key = chip, op.removesuffix("_fast"), replace(tile, group=1), is_alone(tile, step, shape, chip)
                    case = pytest.param(chip, table, op, name, shape, id=f"{table or chip}-{op}-{name}-{shape}")
                    cases.setdefault(key, case)
    return list(cases.values())


@pytest.mark.parametrize(("chip", "table", "op", "name", "shape"), shipped_tiles())
def test_every_shipped_tile_fits(chip: str, table: str, op: str, name: str, shape: Shape) -> None:
    fits(chip, *linear_layer(chip, op, name, shape=shape, table=table), measured=bool(table))


def spills(ptx: str, folder: Path) -> list[int]:
    """Bytes that the assembler for sm_89 stores and loads because registers do not suffice."""
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(89).path, "-v", "--gpu-name=sm_89", str(folder / "kernel.ptx"), "-o", str(folder / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(size) for size in re.findall(r"(\d+) bytes spill", said)]


@pytest.mark.parametrize("name", ["plain", "gelu_quant", "heads_quant"])
def test_full_sums_are_added_outside_the_matrix_units_of_ada(name: str, tmp_path: Path) -> None:
    """One addition more for each number that a thread sums, every block of inputs; and registers for both."""
    added = []
    for full in (False, True):
        kernel, tile, _ = linear_layer("sm_89", "fp8_linear", name, full)
        assert tile.block_k <= PROMOTE
        assert spills(kernel.asm["ptx"], tmp_path) == [0, 0]
        added.append(len(re.findall(r"add(?:\.rn)?\.f32", kernel.asm["ptx"])))
    assert added[1] - added[0] == tile.block_m * tile.block_n // (tile.warps * 32)


FETCH = r"cp\.async\.bulk\.prefetch\.L2\.global \["  # into the cache: nothing is read


def waits_first(ptx: str, overlapped: bool, early: bool = False) -> None:
    """Of a kernel that starts while the one before it runs: nothing is read or written before it has waited; it asks
    for its weights before, if `early`, and never after."""
    assert bool(re.search(FETCH, ptx)) == early
    assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == overlapped
    if overlapped:
        body = ptx[ptx.index("{", ptx.index(".entry")) :]
        before, _, after = body.partition("griddepcontrol.wait")
        assert bool(re.search(FETCH, before)) == early
        assert not re.search(FETCH, after)
        assert not re.search(r"\b(ld|st)\.global|cp\.async|\batom\b|\bred\.", re.sub(FETCH, "", before))


@pytest.mark.parametrize(("chip", "op", "name"), LINEAR)
def test_linear_layers(chip: str, op: str, name: str) -> None:
    fits(chip, *linear_layer(chip, op, name))


@pytest.mark.parametrize("op", ["int8_linear", "fp8_linear", "fp8_linear_fast"])
@pytest.mark.parametrize(("name", "inputs", "outputs"), LAYERS)
def test_one_image_asks_for_its_weights_before_it_waits(op: str, name: str, inputs: int, outputs: int) -> None:
    kernel, tile, early = linear_layer("sm_90", op, name, shape=Shape(197, inputs, outputs), table="NVIDIA H200")
    assert early
    fits("sm_90", kernel, tile, early, measured=True)


def fits(chip: str, kernel: Any, tile: Tile, early: bool, measured: bool = False) -> None:
    """A kernel has its memory, as many times as programs share a multiprocessor, and uses what the chip has.

    A tile that was `measured` may name more programs than fit at once: the rest starts when they have ended.
    """
    described = int(chip[3:]) >= 90
    assert kernel.metadata.shared <= SHARED[chip]
    assert measured or (kernel.metadata.shared + 1024) * tile.programs <= OF_A_PROCESSOR[chip]
    assert ("wgmma.mma_async" if chip == "sm_90" else "mma.sync") in kernel.asm["ptx"]
    assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == described
    waits_first(kernel.asm["ptx"], described, early)


@pytest.mark.parametrize("ones", [("M", "tokens"), ("N", "residual_stride"), ("K", "a_stride", "b_stride")])
def test_sizes_of_one_which_triton_takes_for_constants(ones: tuple[str, ...]) -> None:
    heads, one_column = "tokens" in ones, "N" in ones
    types = dict.fromkeys(("row_scale", "column_scale", "bias", "scales"), "*fp32")
    types |= {"a": "*i8", "b": "*i8", "out": "*i8" if heads else "*bf16"}
    if one_column:
        types["residual"] = "*bf16"
    constants = {
        "FP8": False, "PROMOTE": 0, "LAYOUT": "heads" if heads else "rows", "GELU": False,
        "QUANT": "token" if heads else "none", "LARGEST": 127, "INTEGER": True, "ROW_SCALES": not heads,
        "COLUMN_SCALES": not one_column, "DESCRIPTORS": False, "STORE_DESCRIPTOR": False,
        "RESIDUAL_DESCRIPTOR": False, "ALONE": False, "OVERLAP": False, "EVEN_K": False, "HEADS": 2,
        "WIDTH": 32, "HEAD_BLOCK": 32, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "STEP_N": 64, "GROUP": 2,
        "PARTS": 2,
    }  # fmt: skip
    compiled(linear_kernel, types, constants | dict.fromkeys(ones, 1), "sm_90", 4, 2)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("quant", ["none", "token", "static"])
def test_norms(quant: str, chip: str) -> None:
    pointers = ("x", "residual", "gamma", "weight", "bias", "y", "new")
    types = dict.fromkeys(pointers, "*bf16") | {"eps": "fp32", "residual_stride": "i32"}
    if quant != "none":
        types |= {"y": "*i8", "scales": "*fp32"}
    if quant == "static":
        types["given"] = "*fp32"
    constants = {"QUANT": quant, "LARGEST": 127, "INTEGER": True, "ROWS": 4, "BLOCK": 1024, "OVERLAP": chip == "sm_90"}
    ptx = compiled(norm_kernel, types, constants, chip, 4, 3).asm["ptx"]
    waits_first(ptx, chip == "sm_90")
    assert "ld.global.v4" in ptx  # 16 bytes at once


@pytest.mark.parametrize(("chip", "fp8"), [("sm_80", False), ("sm_89", True), ("sm_90", True)])
def test_quantization(chip: str, fp8: bool) -> None:
    types = dict.fromkeys(("x", "shift", "smooth", "reciprocal", "scales"), "*fp32")
    types["codes"] = "*fp8e4nv" if fp8 else "*i8"
    constants = {"QUANT": "token", "LARGEST": 448 if fp8 else 127, "INTEGER": not fp8, "ROWS": 4, "BLOCK": 1024}
    constants["OVERLAP"] = chip == "sm_90"
    kernel = compiled(quantize_kernel, types, constants, chip, 4, 3)
    waits_first(kernel.asm["ptx"], chip == "sm_90")
    assert ("cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]) == fp8


@pytest.mark.parametrize(("chip", "code"), [("sm_80", "i8"), ("sm_89", "fp8e4nv"), ("sm_90", "fp8e4nv")])
def test_what_codes_stand_for(chip: str, code: str) -> None:
    types = {"codes": f"*{code}", "scales": "*fp32", "y": "*bf16", "stride": "i32"}
    constants = {"ROW_SCALES": True, "ROWS": 1, "BLOCK": 1024, "OVERLAP": chip == "sm_90"}
    kernel = compiled(dequantize_kernel, types, constants, chip, 1, 3)
    waits_first(kernel.asm["ptx"], chip == "sm_90")
    assert "st.global.v4" in kernel.asm["ptx"]  # 16 bytes at once
