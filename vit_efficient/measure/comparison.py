"""Finished runs of several variants and seeds, held against each other under one protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vit_efficient.errors import UserError
from vit_efficient.recipe.schema import PROTOCOL_SECTIONS, VARIANT_SECTIONS, Recipe

# Of these sections, what says where and how fast, not what is trained.
PLACES = (
    "data.shards", "data.eval_shards", "data.workers", "data.audit", "data.eval_batch_size", "data.on_error",
    "data.max_skipped", "data.remote", "quantization.base",
)  # fmt: skip
NEEDED = ("top1", "samples", "weight_bytes", "fp32_bytes", "images_per_second", "peak_memory_bytes")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        recipe: as it was resolved.
        metrics: the keys of ``metrics.json``.
        environment: of ``environment.json``; empty if there is none.
    """

    path: Path
    recipe: Recipe
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def top1(self) -> float:
        """A fraction of 1."""
        return float(self.metrics["top1"])

    @cached_property
    def variant(self) -> Settings:
        """What a study compares, by dotted key."""
        return _settings(self.recipe, VARIANT_SECTIONS)

    @cached_property
    def protocol(self) -> Settings:
        """What it holds equal, by dotted key; the images that were evaluated belong to it."""
        seen = {"images evaluated": self.metrics["samples"], "classes": len(self.metrics.get("per_class", ()))}
        return _settings(self.recipe, PROTOCOL_SECTIONS) | seen


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, in the order of their seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def precision(self) -> str:
        return self.runs[0].recipe.quantization.precision

    @property
    def mean(self) -> float:
        return fmean(run.top1 for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1 in its divisor); None for one run."""
        return stdev(run.top1 for run in self.runs) if len(self.runs) > 1 else None

    def average(self, key: str) -> float:
        """Mean of a key of ``metrics.json``."""
        return fmean(run.metrics[key] for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """What a variant's top-1 lies above the baseline's, run by run of the same seed."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean over seeds (Student's t); None for one pair."""
        count = len(self.by_seed)
        if count < 2:
            return None
        from scipy.stats import t

        return float(t.ppf(0.975, count - 1)) * stdev(self.by_seed.values()) / math.sqrt(count)


def group_runs(runs: Sequence[Run], *, across_protocols: bool = False) -> list[Group]:
    """Groups of runs that differ in their seed only, in the order in which they are first met.

    Args:
        runs: finished ones.
        across_protocols: compare runs of different protocols too; what differs then stands in the labels.

    Raises:
        UserError: the protocols differ, naming every key that does; two runs have the same recipe and the same seed.
    """
    if not across_protocols and (rows := list(_differing(runs))):
        raise UserError(
            "These runs are of different protocols, so what separates them is not the variant alone:\n"
            + "\n".join(f"    {row}" for row in rows)
            + "\n  Leave some of them out, or compare them all the same with --across-protocols."
        )
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps([run.recipe.variant, run.variant, run.protocol], sort_keys=True), []).append(run)
    for same in found.values():
        _check_seeds(same)
    groups = [sorted(same, key=lambda run: run.seed) for same in found.values()]
    return [Group(label, tuple(same)) for label, same in zip(_labels([g[0] for g in groups]), groups, strict=True)]


def find_baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    """The group that the others are held against: the one named, or the only one in plain fp32; None without one.

    Raises:
        UserError: no group has that name, or several do.
    """
    if name is None:
        plain = [
            group
            for group in groups
            if (quantization := group.runs[0].recipe.quantization).name == "none"
            and quantization.precision == "fp32"
            and quantization.lora is None
        ]
        return plain[0] if len(plain) == 1 else None
    exact = [group for group in groups if group.label == name]
    fitting = exact or [group for group in groups if group.runs[0].recipe.variant == name]
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} variants are called" if fitting else "no finished run is of"
    known = "\n".join(f"    {group.label}" for group in groups)
    raise UserError(f"--baseline {name}: {what} {name!r}. There are\n{known}")


def difference(group: Group, baseline: Group) -> Difference | None:
    """By the seeds that both have; None if there is none, or if the group is the baseline."""
    base = {run.seed: run.top1 for run in baseline.runs}
    paired = {run.seed: run.top1 - base[run.seed] for run in group.runs if run.seed in base}
    return Difference(paired) if paired and group is not baseline else None


def _settings(recipe: Recipe, sections: Sequence[str]) -> Settings:
    """Plain values by dotted key, without those of `PLACES`."""
    flat = dict(_flat(recipe.model_dump(mode="json", include=set(sections))))
    return {
        key: value
        for key, value in flat.items()
        if key not in PLACES and not key.startswith(tuple(f"{p}." for p in PLACES))
    }


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _differing(runs: Sequence[Run]) -> Iterator[str]:
    """A line for every key of the protocol in which runs differ: its values, and which runs have them."""
    for key in dict.fromkeys(key for run in runs for key in run.protocol):
        paths: dict[str, list[Path]] = {}
        for run in runs:
            paths.setdefault(_written(run.protocol.get(key)), []).append(run.path)
        if len(paths) > 1:
            yield f"{key}: " + ", ".join(f"{value} in {_named(where)}" for value, where in paths.items())


def _written(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _check_seeds(runs: Sequence[Run]) -> None:
    by_seed: dict[int, Run] = {}
    for run in runs:
        other = by_seed.setdefault(run.seed, run)
        if other is not run:
            raise UserError(
                f"{other.path} and {run.path} are the same recipe with the same seed ({run.seed}): to count both would "
                "make the spread look smaller than it is. Leave one out."
            )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of variants; where several groups share one, with the settings in which they differ."""
    labels = []
    for run in runs:
        name = run.recipe.variant or "(no name)"
        namesakes = [other for other in runs if other.recipe.variant == run.recipe.variant]
        every = [other.variant | other.protocol for other in namesakes]
        own = run.variant | run.protocol
        keys = [key for key in own if any(other.get(key) != own[key] for other in every)]
        labels.append(name + (f" ({', '.join(f'{key}={_written(own[key])}' for key in keys)})" if keys else ""))
    return labels
