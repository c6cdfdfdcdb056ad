"""Models held against each other: latency, images a second, memory, at every batch size, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit_efficient.measure.timing import Timing, speedup, time_in_turn
from vit_efficient.measure.trouble import EXPECTED, said, works

Step = Callable[[Tensor], object]


@dataclass
class Contender:
    """One model on its device, ready to be called.

    Args:
        name: what people call it.
        how: in which way it runs: ``eager``, ``compiled``, ``graph``; or ``training``.
        dtype: of the images that it takes.
        size: pixels a side of these images.
        weight_bytes: of its weights as they lie on the device.
        prepare: images (B, 3, S, S) on the device to a step that works on such images; called once a batch size.
        words: the recipe and its overrides, or whatever else says how to make it again.
        computes: dtype of what is not quantized, where it is not that of the images.
        compile_mode: of `torch.compile`; None: its default, or not compiled.
    """

    name: str
    how: str
    dtype: torch.dtype
    size: int
    weight_bytes: int
    prepare: Callable[[Tensor], Step]
    words: list[str] = field(default_factory=list)
    computes: torch.dtype | None = None
    compile_mode: str | None = None


@dataclass(frozen=True)
class Absent:
    """A contender that could not be built.

    Args:
        name: what people call it.
        how: in which way it should have run.
        dtype: that it should have computed in.
        failed: type and message of the error.
        words: the recipe and its overrides.
        compile_mode: that was asked for.
    """

    name: str
    how: str
    dtype: str
    failed: str
    words: tuple[str, ...] = ()
    compile_mode: str | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size; seconds and bytes."""

    name: str
    how: str
    dtype: str
    batch: int
    weight_bytes: int
    failed: str | None = None
    """Type and message of the error where it could not be built or run."""
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    calls: int = 0
    rounds: tuple[float, ...] = ()
    """Median of each round."""
    images_per_second: float | None = None
    speedup: float | None = None
    """Times as fast as the first contender that ran: median over the rounds."""
    speedup_range: tuple[float, float] | None = None
    peak_bytes: int | None = None
    """Of its weights, the images, and all that is allocated beside them, at most; None on a CPU."""
    steady_bytes: int | None = None
    """What it keeps between two steps: weights, images, the memory of a CUDA graph, optimizer states; None on a CPU."""
    words: tuple[str, ...] = ()
    compile_mode: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a mapping for a JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class _Ready:
    step: Step
    images: Tensor
    peak: int | None
    steady: int | None


class _BrokeError(Exception):
    """A contender failed in its turn."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__(str(error))
        self.number, self.error = number, error


def measure_models(
    contenders: Sequence[Contender | Absent],
    batches: Sequence[int],
    device: torch.device,
    *,
    rounds: int = 5,
    seconds: float = 0.5,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Time every contender at every batch size on random images, those of one batch size in turn.

    A contender that does not fit, or cannot run a batch size, gets a row that says so; the others go on. An error after
    which the device does nothing any more is raised.

    Args:
        contenders: the first that runs is what the others are held against.
        batches: images in a call.
        device: where they all are.
        rounds: turns of each.
        seconds: of a turn, about.
        progress: told what is being measured.
        keep: given all rows so far after each batch size.
    """
    rows: list[Row] = []
    for batch in batches:
        progress(f"batch {batch}: {', '.join(contender.name for contender in contenders)}")
        rows += _measure_batch(contenders, batch, device, rounds, seconds)
        keep(rows)
    return rows


def _measure_batch(
    contenders: Sequence[Contender | Absent], batch: int, device: torch.device, rounds: int, seconds: float
) -> list[Row]:
    ready: dict[int, _Ready] = {}
    failed: dict[int, str] = {}
    for number, contender in enumerate(contenders):
        if isinstance(contender, Absent):
            failed[number] = contender.failed
            continue
        try:
            ready[number] = _ready(contender, batch, device)
        except EXPECTED as error:
            if not works(device):
                raise
            failed[number] = said(error)
        collect(device)
    timings = _in_turn(ready, failed, device, rounds, seconds)
    base = next(iter(timings.values()), None)
    rows = []
    for number, contender in enumerate(contenders):
        if number in failed:
            rows.append(_failed(contender, batch, failed[number]))
        else:
            assert base is not None, "this one ran"
            assert isinstance(contender, Contender), "it was built"
            rows.append(_row(contender, batch, timings[number], base, ready[number]))
    ready.clear()
    collect(device)
    return rows


def _in_turn(
    ready: dict[int, _Ready], failed: dict[int, str], device: torch.device, rounds: int, seconds: float
) -> dict[int, Timing]:
    """Time those that are ready. Who fails goes from `ready` to `failed`, and the others start again."""
    while ready:
        calls = {str(number): _call(number, one) for number, one in ready.items()}
        try:
            found = time_in_turn(calls, device, rounds=rounds, seconds=seconds)
        except _BrokeError as broke:
            if not works(device):
                raise broke.error from None
            failed[broke.number] = said(broke.error)
            del ready[broke.number]
        else:
            return {int(name): timing for name, timing in found.items()}
        del calls
        collect(device)
    return {}


def _call(number: int, one: _Ready) -> Callable[[], object]:
    def call() -> object:
        try:
            return one.step(one.images)
        except EXPECTED as error:
            raise _BrokeError(number, error) from error

    return call


def _ready(contender: Contender, batch: int, device: torch.device) -> _Ready:
    """Prepare a contender for a batch size, and see how much memory it takes."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, contender.size, contender.size, generator=generator)
    images = images.to(device, contender.dtype)
    step = contender.prepare(images)
    for _ in range(2):  # compiles, and allocates what stays, such as optimizer states
        step(images)
    if not on_gpu:  # a CPU's cannot be told apart from the rest of the process
        return _Ready(step, images, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(images)
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    collect(device)
    peak, steady = footprint(contender.weight_bytes, highest - allocated, torch.cuda.memory_reserved() - reserved)
    return _Ready(step, images, peak, steady)


def footprint(weights: int, allocated: int, reserved: int) -> tuple[int, int]:
    """Peak and steady bytes of a contender whose weights were there before.

    A CUDA graph works in memory that was set apart when it was captured: it stays reserved, and a replay allocates
    nothing. So what is reserved counts too.

    Args:
        weights: bytes.
        allocated: at most in a step, beyond what was allocated before the images were.
        reserved: after the steps, the cache being empty, beyond what was reserved before.
    """
    steady = weights + max(0, reserved)
    return max(weights + allocated, steady), steady


def collect(device: torch.device) -> None:
    """Give back all memory that nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _failed(contender: Contender | Absent, batch: int, reason: str) -> Row:
    dtype, held = (contender.dtype, 0) if isinstance(contender, Absent) else (_dtype(contender), contender.weight_bytes)
    return Row(
        contender.name, contender.how, dtype, batch, held, failed=reason, words=tuple(contender.words),
        compile_mode=contender.compile_mode,
    )  # fmt: skip


def _row(contender: Contender, batch: int, timing: Timing, base: Timing, ready: _Ready) -> Row:
    ratio, low, high = speedup(timing, base)
    return Row(
        contender.name,
        contender.how,
        _dtype(contender),
        batch,
        contender.weight_bytes,
        mean=timing.mean,
        p50=timing.percentile(50),
        p95=timing.percentile(95),
        p99=timing.percentile(99),
        calls=len(timing.calls),
        rounds=tuple(timing.medians),
        images_per_second=batch / timing.median,
        speedup=ratio,
        speedup_range=(low, high),
        peak_bytes=ready.peak,
        steady_bytes=ready.steady,
        words=tuple(contender.words),
        compile_mode=contender.compile_mode,
    )


def _dtype(contender: Contender) -> str:
    return str(contender.computes or contender.dtype).removeprefix("torch.")
