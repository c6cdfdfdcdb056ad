"""Attention kernels against every other backend, with the floor that the chip sets beside each.

    python -m vit_efficient.benchmark attention --output attention.json             ViT shapes, short to long
    python -m vit_efficient.benchmark attention --shapes qattn --heads 16           QAttn's figure 2
    python -m vit_efficient.benchmark attention --shapes 1370x64 --tune             choose tiles here, then measure

Each line is one backend at one shape, queries, keys and values being views of one packed projection in bf16: its median
time with a cold cache, all backends of a shape in turn, what it does in TFLOP/s (4 B H N^2 E, whatever number format it
multiplies in, as QAttn counts), and how far its output is from float64. Times of int8 and fp8 attention have
quantization in them, except the line that says ``codes given``.

Shapes: B batch, N tokens, H heads, E head width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_efficient.attention import reference
from vit_efficient.attention.flash2 import Flash2Config
from vit_efficient.attention.sdpa import Kernel, SdpaConfig
from vit_efficient.cli import Parser, run_command
from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_fp8, lacks_triton
from vit_efficient.kernels.fp8_attention.op import fp8_attend
from vit_efficient.kernels.int8_attention.op import int8_attend
from vit_efficient.kernels.quantize.op import quantize
from vit_efficient.kernels.timing import Timed, time_in_turn
from vit_efficient.kernels.tuning import Shape, Tile, chip_of, forced, keep
from vit_efficient.machine import detect
from vit_efficient.measure.kernels import DATASHEET
from vit_efficient.measure.record import environment

SETS = {  # (tokens, images)
    "vit": ((197, 512), (577, 256), (785, 128), (1024, 128), (4096, 16)),
    "qattn": tuple((tokens, 512) for tokens in (197, 577, 785, 1024, 2048, 4096, 8192)),
}
# Exponentials a second: 16 a clock and multiprocessor (CUDA's table of throughputs), at the datasheet's boost clock.
EXPONENTIALS = {
    "NVIDIA H200": 132 * 16 * 1.98e9, "NVIDIA H100 80GB HBM3": 132 * 16 * 1.98e9,
    "NVIDIA A100-SXM4-80GB": 108 * 16 * 1.41e9, "NVIDIA GeForce RTX 4090": 128 * 16 * 2.52e9,
}  # fmt: skip
# Worth trying: queries and keys a step, warps, steps in flight, programs a multiprocessor that registers are kept for.
TILES = tuple(
    Tile(block_m=m, block_n=n, block_k=64, warps=warps, stages=stages, programs=programs)
    for m, n, warps, stages, programs in (
        (64, 128, 4, 2, 3), (64, 128, 4, 3, 3), (64, 128, 4, 2, 1), (64, 64, 4, 3, 4), (64, 64, 4, 2, 1),
        (128, 128, 8, 2, 1), (128, 128, 8, 3, 1), (128, 64, 8, 3, 2), (128, 64, 4, 3, 2), (128, 128, 8, 2, 2),
    )
)  # fmt: skip
Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape."""

    tokens: int
    images: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"N {self.tokens} B {self.images} H {self.heads} E {self.width}"

    @property
    def pairs(self) -> float:
        """Logits."""
        return float(self.images * self.heads * self.tokens**2)

    @property
    def operations(self) -> float:
        """Of both products."""
        return 4 * self.pairs * self.width

    def floors(self, name: str, chip: str) -> dict[str, float]:
        """Milliseconds that the units of a chip need at least; empty of one that is not listed."""
        if chip not in DATASHEET:
            return {}
        rate, memory = DATASHEET[chip]
        first = 2 if name.startswith(("int8", "fp8")) else 4  # operations a logit and channel; 16 bits count twice
        second = 2 if name.endswith("e4m3 values") else 4
        moved = 8.0 * self.images * self.heads * self.tokens * self.width
        return {
            "products": 1e3 * (first + second) * self.pairs * self.width / rate,
            "exponentials": 1e3 * self.pairs / EXPONENTIALS[chip],
            "memory": 1e3 * moved / memory,
        }


@dataclass(frozen=True)
class Line:
    """One backend at one shape; `error` relative to float64, of the first image."""

    case: Case
    backend: str
    time: Timed
    tflops: float
    error: float
    floors: dict[str, float]


def operands(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, E) of one projection (B, N, 3, H, E), bf16."""
    shape = (case.images, case.tokens, 3, case.heads, case.width)
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def others(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Work]:
    """The backends that this machine has, by PyTorch and flash-attn."""
    kernels: tuple[Kernel, ...] = ("flash", "cudnn", "efficient")
    configs: dict[str, Any] = {f"sdpa {kernel}": SdpaConfig(kernel=kernel) for kernel in kernels}
    configs["flash-attn"] = Flash2Config()
    machine, width = detect(), q.shape[-1]
    able = {name: one for name, one in configs.items() if one.refusal(machine, "bf16", width, "cuda") is None}
    return {name: partial(one.build().attend, q, k, v, scale=scale) for name, one in able.items()}


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Work]:
    """The forms of int8 and fp8 attention that this machine runs."""
    whole = partial(int8_attend, q, k, v, scale=scale)
    one = torch.full((), 0.03, device=q.device)
    (q_codes, q_scale), (k_codes, k_scale) = quantize(q), quantize(k)
    given = partial(int8_attend, q_codes, k_codes, v, q_scale, k_scale, scale=scale, values="float")
    works: dict[str, Work] = {
        "int8": whole,
        "int8, float values": partial(whole, values="float"),
        "int8 a block, float values": partial(whole, values="float", keys="block"),
        "int8 static, codes out": partial(int8_attend, q, k, v, one, one, one, scale=scale, out_scale=one),
        "int8, codes given": partial(given, dtype=torch.bfloat16),
    }
    if lacks_fp8(q.device) is None:
        rotated = partial(fp8_attend, q, k, v, scale=scale)
        works |= {
            "int8 a block, e4m3 values": partial(whole, values="fp8", keys="block"),
            "fp8, float values": rotated,
            "fp8, e4m3 values": partial(rotated, values="fp8"),
        }
    return works


def measure_case(case: Case, device: torch.device, repetitions: int) -> list[Line]:
    """All backends at one shape, in turn."""
    q, k, v = operands(case, device)
    scale, chip = case.width**-0.5, chip_of(device)[0]
    works = others(q, k, v, scale) | ours(q, k, v, scale)
    exact = reference.attend(*(x[:1].double() for x in (q, k, v)), scale=scale)
    errors = {}
    for name, work in works.items():
        y = work()[:1].double() * (0.03 if name.endswith("codes out") else 1.0)
        errors[name] = float((y - exact).norm() / exact.norm())
    del exact
    found = time_in_turn(works, device, repetitions=repetitions)
    return [
        Line(case, name, time, case.operations / time.median / 1e9, errors[name], case.floors(name, chip))
        for name, time in found.items()
    ]


def tune_case(case: Case, device: torch.device) -> None:
    """Measure `TILES` with our forms at one shape, and keep the best of each kind for later runs of this user."""
    import triton
    from triton.runtime.errors import OutOfResources

    q, k, v = operands(case, device)
    works = ours(q, k, v, case.width**-0.5)
    kinds = {"int8": "int8 a block, float values"} | ({"fp8": "fp8, float values"} if len(works) > 5 else {})
    for kind, name in kinds.items():
        variants: dict[str, Work] = {}
        for index, tile in enumerate(TILES):
            work = partial(_with_tile, works[name], tile)
            try:
                work()
            except OutOfResources:  # more registers or shared memory than this GPU has
                continue
            variants[str(index)] = work
        found = time_in_turn(variants, device)
        best = min(found, key=lambda index: found[index].median)
        op = f"{kind}_attention_{64 if case.width <= 64 else 128}"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        shape = Shape(case.tokens, case.width, case.width)
        keep(chip_of(device)[0], op, shape, TILES[int(best)], found[best].median, versions)
        for number in sorted(found, key=lambda number: found[number].median):
            words = " ".join(str(value) for value in asdict(TILES[int(number)]).values())
            print(f"{case!s:28} {op:20} {found[number].median:9.4f} ms  tile {words}", flush=True)


def _with_tile(work: Work, tile: Tile) -> Tensor:
    with forced(tile):
        return work()


def render(lines: Sequence[Line]) -> str:
    """A table as text, the best of the others' at each shape being 1."""
    text = [f"{'shape':28} {'backend':28} {'ms':>9} {'spread':>8} {'TFLOP/s':>8} {'speed':>6} {'error':>8}  floor"]
    for line in lines:
        same = [one for one in lines if one.case == line.case]
        best = min(one.time.median for one in same if not one.backend.startswith(("int8", "fp8")))
        share = ""
        if line.floors:
            limit, floor = max((floor, name) for name, floor in line.floors.items())
            share = f"{limit:.4f} {floor}, {100 * limit / line.time.median:.0f} %"
        text.append(
            f"{line.case!s:28} {line.backend:28} {line.time.median:9.4f} {line.time.high - line.time.low:8.4f} "
            f"{line.tflops:8.1f} {best / line.time.median:6.2f} {line.error:8.1e}  {share}"
        )
    return "\n".join(text)


def parser() -> Parser:
    """The command line."""
    words = Parser(
        prog="python -m vit_efficient.benchmark attention",
        description="Time attention kernels against the other backends, quantization included.",
        allow_abbrev=False,
    )
    words.add_argument(
        "--shapes", nargs="+", default=["vit"], metavar="SET|NxB", help="vit (default), qattn, or tokens x images"
    )
    words.add_argument("--heads", type=int, default=16, help="of the attention (default 16)")
    words.add_argument("--width", type=int, default=64, help="of a head (default 64)")
    words.add_argument("--repetitions", type=int, default=30, help="of each (default 30)")
    words.add_argument("--tune", action="store_true", help="measure tiles first, and keep the best on this machine")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file")
    return words


def cases(words: Sequence[str], heads: int, width: int) -> list[Case]:
    """The shapes that were asked for.

    Raises:
        UserError: a word is neither a set nor NxB.
    """
    found: list[Case] = []
    for word in words:
        tokens, cross, images = word.partition("x")
        if word in SETS:
            found += [Case(n, b, heads, width) for n, b in SETS[word]]
        elif cross and tokens.isdecimal() and images.isdecimal():
            found.append(Case(int(tokens), int(images), heads, width))
        else:
            raise UserError(f"--shapes {word}: neither {' nor '.join(SETS)} nor tokens x images, such as 1370x64.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options: argparse.Namespace = parser().parse_args(arguments)
    wanted = cases(options.shapes, options.heads, options.width)
    if not torch.cuda.is_available():
        raise UserError("Attention kernels are timed on a GPU, and there is no CUDA device here.")
    device = torch.device("cuda", torch.cuda.current_device())
    if (why := lacks_triton(device)) is not None:
        raise UserError(f"Attention kernels were to be timed, but {why}")
    lines: list[Line] = []
    for case in wanted:
        if options.tune:
            tune_case(case, device)
        lines += measure_case(case, device, options.repetitions)
        torch.cuda.empty_cache()
    print(render(lines))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(detect()), "lines": [asdict(line) for line in lines]}
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
