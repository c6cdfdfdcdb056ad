"""`benchmark data`: decoding per core, the loader over workers, the plan at 10^9 samples; measured and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vit_efficient.data.config import DataConfig
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.plan import Plan
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.resolve import open_shards
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.measure.decoding import OURS, USUAL, Speed, compare_decoding
from vit_efficient.measure.device_decoding import measure_device
from vit_efficient.measure.loading import measure_loader
from vit_efficient.measure.planning import plan_cost, shuffle_quality

IMAGENET = 1_281_167  # training images of ImageNet-1k, for the measure of shuffling


def measure_data(
    shards: str | None,
    *,
    size: int = 224,
    mode: str = "bilinear",
    images: int = 500,
    repetitions: int = 5,
    workers: Sequence[int] = (1,),
    batch_size: int = 256,
    seconds: float = 5.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All figures, as plain values.

    Args:
        shards: as `data.shards`; None: the plan alone.
        size: of the images made, in pixels.
        mode: `bilinear` or `bicubic`.
        images: how many are decoded in every repetition.
        repetitions: of each pipeline.
        workers: numbers of loader processes to try.
        batch_size: of the loader.
        seconds: that each loader is timed for.
        progress: told what is being measured.
    """
    progress("the sample plan of 10^9 samples in 100,000 shards, for one of 1,024 ranks with 8 workers each")
    figures: dict[str, Any] = {"plan": asdict(plan_cost()), "shuffle": _shuffles()}
    if shards is None:
        return figures
    train = open_shards(shards, "SHARDS", "train")
    sample = read_images(train, images)
    progress(f"decoding {len(sample)} images on one core, {repetitions} times by each of the pipelines in turn")
    speeds = compare_decoding(sample, size, mode, repetitions)
    figures["decoding"] = {
        "images": len(sample),
        "bytes": int(np.mean([len(data) for data in sample])),
        "size": size,
        "interpolation": mode,
        "rates": {speed.name: list(speed.rates) for speed in speeds},
    }
    spec = ImageSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), mode, 0.875)
    loads = []
    for number in workers:
        progress(f"the loader with {number} worker{'s' * (number > 1)}, for {seconds:g} s")
        folder = train.place
        config = DataConfig(source=DigitsConfig(), shards=folder, eval_shards=folder, batch_size=batch_size)
        loads.append(asdict(measure_loader(config, spec, number, seconds)))
    figures["loader"] = loads
    figures["device"] = measure_device(sample, size, mode, progress)
    return figures


def read_images(shards: ShardSet, count: int) -> list[bytes]:
    """The first images of an epoch's order, as many as there are."""
    counts = [entry.samples for entry in shards.manifest.shards]
    plan = Plan(counts, streams=16)
    places = plan.locate(0, np.arange(min(count, plan.samples)))
    with ShardReader(shards, len(shards.manifest.class_names)) as reader:
        return [reader.read(shard, index).image for shard, index in zip(*(p.tolist() for p in places), strict=True)]


def _shuffles() -> dict[str, Any]:
    labels = np.arange(IMAGENET) * 1000 // IMAGENET
    mixed = np.random.default_rng(0).permutation(labels)
    return {
        "prepared by us": asdict(shuffle_quality(mixed, 2400)),
        "class by class (written by others)": asdict(shuffle_quality(labels, 2400)),
    }


def print_data(console: Console, figures: dict[str, Any]) -> None:
    """The tables."""
    if "decoding" in figures:
        console.print(_decoding_table(figures["decoding"]))
        console.print(_loader_table(figures["loader"]))
        if figures["device"] is not None:
            console.print(_device_table(figures["device"]))
    console.print(_plan_table(figures["plan"]))
    console.print(_shuffle_table(figures["shuffle"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _decoding_table(decoding: dict[str, Any]) -> Table:
    size, rates = decoding["size"], decoding["rates"]
    title = (
        f"One core: {decoding['images']} images of {decoding['bytes'] / 1e3:.0f} kB -> random resized crop "
        f"({decoding['interpolation']}) -> flip -> {size} px uint8"
    )
    table = _table(title, "", "images/s", "lowest to highest", "against the usual")
    speeds = [Speed(name, tuple(values)) for name, values in rates.items()]
    usual = next(speed.median for speed in speeds if speed.name == USUAL)
    for speed in speeds:
        low, high = speed.spread
        style = "bold" if speed.name == OURS else ""
        ratio = f"{speed.median / usual:.2f} x" if "alone" not in speed.name and "evaluation" not in speed.name else ""
        table.add_row(speed.name, f"{speed.median:,.0f}", f"{low:,.0f} to {high:,.0f}", ratio, style=style)
    return table


def _loader_table(loads: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        f"The loader, batches of {loads[0]['batch_size']}", "workers", "images/s", "a worker", "images timed"
    )
    for load in loads:
        each = load["rate"] / load["workers"]
        table.add_row(f"{load['workers']}", f"{load['rate']:,.0f}", f"{each:,.0f}", f"{load['images']:,}")
    return table


def _device_table(device: dict[str, Any]) -> Table:
    table = _table(f"Decoding on the GPU ({device['gpu']}), batches of {device['batch']}", "", "images/s")
    table.add_row("nvJPEG, crop and resize (data.decoder=device)", f"{device['images_per_second']:,.0f}")
    table.add_row("nvJPEG alone", f"{device['decoding_alone']:,.0f}")
    return table


def _plan_table(plan: dict[str, Any]) -> Table:
    table = _table(f"The plan of {plan['samples']:,} samples in {plan['shards']:,} shards", "one rank of 1,024", "")
    table.add_row("read the manifest, make the plan, locate a micro-batch", f"{1e3 * plan['seconds']:.1f} ms")
    table.add_row("memory", f"{plan['peak_bytes'] / 1e6:.1f} MB")
    table.add_row("go to any step of the epoch", f"{1e3 * plan['seek_seconds']:.2f} ms")
    table.add_row("go to any step of another epoch", f"{1e3 * plan['epoch_seconds']:.2f} ms")
    return table


def _shuffle_table(shuffles: dict[str, Any]) -> Table:
    table = _table(
        "The order of an epoch against a perfect shuffle (1.00): ImageNet's size, shards of 2,400, 64 streams, "
        "batches of 1,024",
        "shards",
        "displacement",
        "between epochs",
        "classes in a batch",
        "in the worst one",
    )
    for name, quality in shuffles.items():
        table.add_row(name, *(f"{quality[key]:.2f}" for key in ("displacement", "between_epochs", "classes")),
                      f"{quality['worst_batch']:.2f}")  # fmt: skip
    return table
