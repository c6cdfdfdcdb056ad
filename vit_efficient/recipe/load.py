"""From files and overrides to a Recipe, or to all mistakes at once; and from a Recipe back to one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from vit_efficient.errors import Problem, RecipeError
from vit_efficient.recipe import explain, files
from vit_efficient.recipe.files import RESOLVED, VERSION, Document
from vit_efficient.recipe.merge import COMMAND_LINE, Layer, apply, dotted, fill_names, flatten, nest, read_overrides
from vit_efficient.recipe.schema import PROTOCOL_SECTIONS, VARIANT_SECTIONS, Recipe
from vit_efficient.recipe.shape import section_at
from vit_efficient.recipe.yaml12 import dump


@dataclass(frozen=True)
class Loaded:
    """A recipe with what a person should be told of how it came about.

    Args:
        recipe: the validated recipe.
        notes: what a changed `name` dropped, one line each.
        origins: `file:line` or ``command line`` of each key that somebody set, by dotted key.
    """

    recipe: Recipe
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Loaded:
    """Load a variant (with its protocol) or a complete recipe, lay overrides over it, and validate the whole.

    Args:
        recipe: name or path of a variant file, or the path of a file that `dump_recipe` wrote.
        overrides: ``key=value`` words in any order; ``protocol=NAME|PATH`` picks another protocol.

    Raises:
        RecipeError: with every mistake in the files and overrides.
        CheckpointError: `recipe` is a model file that is damaged or holds no recipe.
    """
    given, problems = read_overrides(overrides)
    protocol = _take_labels(given, problems)
    base = _Base(problems)
    base.read(recipe, protocol)
    merged, notes = apply(given, base.layer)
    fill_names(merged)
    result = _validate(merged, base)
    if problems or result is None:
        raise RecipeError(list(dict.fromkeys(problems)))
    return Loaded(result, notes, {dotted(path): origin for path, origin in merged.origins.items() if origin})


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML. `load_recipe` of a file with this text gives an equal Recipe."""
    head = "# A complete recipe: nothing is left to defaults. `--recipe THIS_FILE` runs it again.\n"
    return head + dump({RESOLVED: VERSION, **_name_first(recipe.model_dump(mode="json"))})


def _name_first(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda key: key != "name")  # stable: the others stay in the schema's order
    return {key: _name_first(value[key]) for key in keys}


def _take_labels(given: Layer, problems: list[Problem]) -> str | None:
    """Remove the overrides that name files from those that set values. Returns the protocol's name or path."""
    if ("variant",) in given.values:
        given.drop(("variant",))
        problems.append(Problem("variant", "is what --recipe names", COMMAND_LINE))
    if ("protocol",) not in given.values:
        return None
    value = given.values[("protocol",)]
    given.drop(("protocol",))
    if isinstance(value, str):
        return value
    problems.append(Problem("protocol", f"must be a name or a path, got {json.dumps(value)}", COMMAND_LINE))
    return None


@contextmanager
def _gather(problems: list[Problem], origin: str = "") -> Iterator[None]:
    """Note the problems of a RecipeError instead of raising it; `origin` is theirs where they have none."""
    try:
        yield
    except RecipeError as error:
        problems += [problem if problem.origin else replace(problem, origin=origin) for problem in error.problems]


class _Base:
    """What the files say. `owners` has the file of each section that could be read; mistakes go to `problems`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.layer = Layer()
        self.owners: dict[str, str] = {}
        self.problems = problems

    def read(self, recipe: str, protocol: str | None) -> None:
        """Read the file that `--recipe` means, and the protocol: the one asked for, or else the one the file names."""
        variant: Document | None = None
        with _gather(self.problems):
            variant = files.read(files.find("variant", recipe))
        if variant and RESOLVED in variant.content:
            self._add_complete(variant, protocol)
            return
        if variant and files.is_protocol(variant):
            message = f"this is a protocol, not a variant: write `--recipe int8_sdpa protocol={recipe}`"
            self.problems.append(Problem("--recipe", message, variant.shown, ", ".join(files.names("variant"))))
            return
        if variant:
            self._add("variant", variant)
        self._read_protocol(variant, protocol)

    def _read_protocol(self, variant: Document | None, asked: str | None) -> None:
        folder = variant.path.parent if variant else None
        names_in = folder / "protocols" if folder else None
        if asked is not None:
            with _gather(self.problems, COMMAND_LINE):
                self._add("protocol", files.read(files.find("protocol", asked, names_in=names_in)))
        elif variant and folder:
            origin = variant.origin(("protocol",))
            named = variant.content.get("protocol")
            if isinstance(named, str):
                with _gather(self.problems, origin):
                    self._add("protocol", files.read(files.find("protocol", named, start=folder, names_in=names_in)))
                return
            wrong = f"must be a name or a path, got {json.dumps(named)}" if named is not None else "is missing"
            message = f"{wrong}; name one in the file, or write protocol=NAME"
            self.problems.append(Problem("protocol", message, origin, ", ".join(files.names("protocol"))))

    def _add(self, kind: files.Kind, document: Document) -> None:
        wrong, skip = explain.misplaced(kind, document.content, document.origin)
        self.problems += wrong
        for path, value in flatten(document.content):
            if path[0] not in skip and not (kind == "variant" and path[0] == "protocol"):
                self.layer.set(path, value, document.origin(path))
        self.layer.set((kind,), document.path.stem, document.shown)
        self.owners |= dict.fromkeys(VARIANT_SECTIONS if kind == "variant" else PROTOCOL_SECTIONS, document.shown)

    def _add_complete(self, document: Document, protocol: str | None) -> None:
        version = document.content[RESOLVED]
        if version != VERSION:
            message = f"is {json.dumps(version)}; this version of vit_efficient reads {VERSION}"
            self.problems.append(Problem(RESOLVED, message, document.origin((RESOLVED,))))
        if protocol is not None and protocol != document.content.get("protocol"):
            message = f"is part of {document.shown}, which is a complete recipe; start from a variant instead"
            self.problems.append(Problem("protocol", message, COMMAND_LINE, ", ".join(files.names("variant"))))
        for path, value in flatten(document.content):
            if path != (RESOLVED,):
                self.layer.set(path, value, document.origin(path))
        self.owners |= dict.fromkeys((*VARIANT_SECTIONS, *PROTOCOL_SECTIONS), document.shown)


def _validate(merged: Layer, base: _Base) -> Recipe | None:
    accounted = set()  # keys that are missing because of a mistake that is told already
    for path, problem in explain.unknown_keys(merged):
        base.problems.append(problem)
        accounted.add(problem.suggestion)
        if section_at(path[:-1]) is None:  # a key below a single value took that value's place
            accounted.add(dotted(path[:-1]))
        for leaf in [leaf for leaf in merged.values if leaf[: len(path)] == path]:
            merged.drop(leaf)

    def origin(path: tuple[str, ...]) -> str:
        """The place that set a value, or something below or above it; else the file that should have."""
        above = [path[:length] for length in range(len(path) - 1, 0, -1)]
        found = [merged.origins[other] for other in (path, *merged.under(path), *above) if merged.origins.get(other)]
        return found[0] if found else base.owners.get(path[0], "")

    raw = nest(merged.values)
    try:
        # Strict JSON: lists become tuples and text becomes paths, but "3" is no number and true is not 1.
        return Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        for problem in explain.rewrite(error, raw, origin):
            section = problem.path.split(".")[0]
            unread = explain.is_absence(problem) and section not in base.owners
            if not unread and problem.path not in accounted:
                base.problems.append(problem)
    return None
