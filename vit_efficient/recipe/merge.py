"""Files and overrides become one mapping.

Everything is held flat here, a path to a value: `{("attention", "name"): "sdpa"}`. So where a value came from, what an
override replaces and what a changed `name` drops are questions about sets of paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vit_efficient.errors import Problem
from vit_efficient.recipe.shape import ROOT, Section, all_sections, section_at
from vit_efficient.recipe.yaml12 import YamlError, parse

Path = tuple[str, ...]
COMMAND_LINE = "command line"
# What a model's name decides and files set beside it; the rest of `model` (image_size, ...) outlives another name.
MODEL_DETAILS = (("model", "weights"), ("model", "kwargs"))

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


@dataclass
class Layer:
    """Flat values with the place that set each; `whole` lists the mappings that replace instead of adding keys."""

    values: dict[Path, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)
    whole: set[Path] = field(default_factory=set)

    def set(self, path: Path, value: Any, origin: str) -> None:
        self.values[path] = value
        self.origins[path] = origin

    def drop(self, path: Path) -> None:
        del self.values[path]
        del self.origins[path]

    def under(self, path: Path) -> list[Path]:
        """The paths that lie strictly below."""
        return [other for other in self.values if other[: len(path)] == path and other != path]


def dotted(path: Path) -> str:
    return ".".join(path)


def flatten(value: Any, path: Path = (), section: Section | None = ROOT) -> Iterator[tuple[Path, Any]]:
    """The plain values in `value`, with the shorthand `section: name` written out. An empty mapping counts as one."""
    if isinstance(value, str) and section and section.named:
        yield (*path, "name"), value
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, (*path, key), section.child(key) if section else None)
    else:
        yield path, value


def read_overrides(overrides: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """`key=value` words as a layer; their order does not matter, so one key cannot have two values."""
    layer, problems = Layer(), []
    for word in overrides:
        key, equals, text = word.partition("=")
        path = tuple(key.split("."))
        wrong = _malformed(word, key, equals, text)
        if wrong:
            problems.append(wrong)
            continue
        try:
            value, _ = parse(text)
        except YamlError as error:
            problems.append(Problem(key, f"the value {text!r} is not valid YAML: {error}", COMMAND_LINE))
            continue
        if isinstance(value, dict) and section_at(path) is None:
            layer.whole.add(path)
        for leaf, item in flatten(value, path, section_at(path)):
            if leaf in layer.values and layer.values[leaf] != item:
                message = f"is given twice: {layer.values[leaf]!r} and {item!r}"
                problems.append(Problem(dotted(leaf), message, COMMAND_LINE))
            layer.set(leaf, item, COMMAND_LINE)
    for path, value in layer.values.items():
        below = layer.under(path)
        if below and value != {}:
            message = f"is set to {value!r}, and {dotted(below[0])} below it too: only one can hold"
            problems.append(Problem(dotted(path), message, COMMAND_LINE))
    return layer, problems


def _malformed(word: str, key: str, equals: str, text: str) -> Problem | None:
    if word.startswith("-"):
        bare = word.lstrip("-")
        return Problem(
            word, "is no option; overrides have no dashes", COMMAND_LINE, "key=value", bare if equals else ""
        )
    if not equals:
        return Problem(word, "is not an override: it has no `=`", COMMAND_LINE, "key=value, for example optim.lr=1e-3")
    if not _KEY.fullmatch(key):
        return Problem(
            word, f"is not an override: {key!r} is no key", COMMAND_LINE, "key=value with a key such as optim.lr"
        )
    if not text.strip():
        return Problem(key, "has no value; write null to unset it", COMMAND_LINE, "", f"{key}=null")
    return None


def apply(overrides: Layer, files: Layer) -> tuple[Layer, list[str]]:
    """Lay the overrides over what files set. Returns the result and what a person should be told of it."""
    merged = Layer(dict(files.values), dict(files.origins))
    notes = _reset(overrides, merged)
    for path, value in overrides.values.items():
        for above in (path[:length] for length in range(1, len(path))):
            if above in merged.values:
                merged.drop(above)
        if value != {}:
            _drop_below(merged, path)
    for path in overrides.whole:
        _drop_below(merged, path)
    for path, value in overrides.values.items():
        if value != {} or not (merged.under(path) or overrides.under(path)):
            merged.set(path, value, COMMAND_LINE)
    return merged, notes


def _drop_below(merged: Layer, path: Path) -> None:
    for below in merged.under(path):
        merged.drop(below)


def _reset(overrides: Layer, merged: Layer) -> list[str]:
    """Drop what files set for another `name` than the one that an override gives."""
    notes = []
    for section_path, section in all_sections():
        name_path = (*section_path, "name")
        new, old = overrides.values.get(name_path), merged.values.get(name_path, section.default)
        if name_path not in overrides.values or new == old:
            continue
        below = [path for path in merged.under(section_path) if path != name_path]
        if section_path == ("model",):
            below = [path for path in below if path[:2] in MODEL_DETAILS]
        elif not section.discriminated:
            continue
        gone = [path for path in below if path not in overrides.values]
        for path in below:
            source = merged.origins[path]
            merged.drop(path)
        if gone:
            keys = ", ".join(dotted(path) for path in gone)
            notes.append(f"{dotted(name_path)} is {new} instead of {old}, so dropped what {_file(source)} set: {keys}")
    return notes


def _file(origin: str) -> str:
    return re.sub(r":\d+$", "", origin)


def fill_names(layer: Layer) -> None:
    """Write out the `name` that an absent one means, as `strategy.micro_batch=32` leaves it to `strategy`'s default."""
    for path, section in all_sections():
        if section.discriminated and section.default and layer.under(path) and (*path, "name") not in layer.values:
            layer.set((*path, "name"), section.default, "")


def nest(values: dict[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`. Of a value and keys below it (a reported mistake) the keys stay."""
    root: dict[str, Any] = {}
    for path, value in sorted(values.items(), key=lambda item: len(item[0])):
        place = root
        for key in path[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[path[-1]] = value
    return root
