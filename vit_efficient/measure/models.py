"""Models held against each other: latency, images a second, memory, at every batch size, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit_efficient.measure.timing import Timing, speedup, time_in_turn

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
    """

    name: str
    how: str
    dtype: torch.dtype
    size: int
    weight_bytes: int
    prepare: Callable[[Tensor], Step]
    words: list[str] = field(default_factory=list)
    computes: torch.dtype | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size; seconds and bytes. A reason where it could not run."""

    name: str
    how: str
    dtype: str
    batch: int
    weight_bytes: int
    failed: str | None = None
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
    words: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As a mapping for a JSON file."""
        return asdict(self)


def measure_models(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    device: torch.device,
    *,
    rounds: int = 5,
    seconds: float = 0.5,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time every contender at every batch size on random images, those of one batch size in turn.

    A contender that does not fit, or cannot run a batch size, gets a row that says so; the others go on.

    Args:
        contenders: the first that runs is what the others are held against.
        batches: images in a call.
        device: where they all are.
        rounds: turns of each.
        seconds: of a turn, about.
        progress: told what is being measured.
    """
    rows: list[Row] = []
    for batch in batches:
        progress(f"batch {batch}: {', '.join(contender.name for contender in contenders)}")
        steps: dict[int, tuple[Step, Tensor]] = {}
        peaks: dict[int, int | None] = {}
        failed: dict[int, str] = {}
        for number, contender in enumerate(contenders):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            try:
                generator = torch.Generator().manual_seed(batch)
                images = torch.randn(batch, 3, contender.size, contender.size, generator=generator)
                images = images.to(device, contender.dtype)
                step = contender.prepare(images)
                peaks[number] = _peak(step, images, contender.weight_bytes - before, device)
                steps[number] = step, images
            except torch.OutOfMemoryError as error:
                failed[number] = f"out of memory: {str(error).splitlines()[0]}"
            _collect(device)
        calls = {str(number): _bound(step, images) for number, (step, images) in steps.items()}
        timings = time_in_turn(calls, device, rounds=rounds, seconds=seconds) if calls else {}
        base = next(iter(timings.values()), None)
        for number, contender in enumerate(contenders):
            if number in failed:
                rows.append(_failed(contender, batch, failed[number]))
            else:
                assert base is not None, "this one ran"
                rows.append(_row(contender, batch, timings[str(number)], base, peaks[number]))
        del steps, calls
        _collect(device)
    return rows


def _bound(step: Step, images: Tensor) -> Callable[[], object]:
    return lambda: step(images)


def _peak(step: Step, images: Tensor, offset: int, device: torch.device) -> int | None:
    """Bytes allocated at most while one step runs, plus `offset`; None on a CPU, which does not count them."""
    for _ in range(2):  # compiles, and allocates what stays, such as optimizer states
        step(images)
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() + offset


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _failed(contender: Contender, batch: int, reason: str) -> Row:
    return Row(
        contender.name, contender.how, _dtype(contender), batch, contender.weight_bytes,
        failed=reason, words=tuple(contender.words),
    )  # fmt: skip


def _row(contender: Contender, batch: int, timing: Timing, base: Timing, peak: int | None) -> Row:
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
        peak_bytes=peak,
        words=tuple(contender.words),
    )


def _dtype(contender: Contender) -> str:
    return str(contender.computes or contender.dtype).removeprefix("torch.")
