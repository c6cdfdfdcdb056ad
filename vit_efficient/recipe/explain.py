"""Mistakes in plain English: unknown keys, keys in the wrong file, and what pydantic found."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vit_efficient.errors import Problem
from vit_efficient.recipe.merge import Layer, dotted
from vit_efficient.recipe.schema import HARDWARE_SECTIONS, HOUSE_SECTIONS, PROTOCOL_SECTIONS, VARIANT_SECTIONS
from vit_efficient.recipe.shape import ROOT, Section, all_keys, expected, is_mapping, section_at, tag

Path = tuple[str, ...]
Origin = Callable[[Path], str]

NOUNS = {"attention": "attention backend", "quantization": "quantization backend", "source": "data source"}
LABELS = ("variant", "protocol")  # set by the loader, not by sections
OWNERS = {
    **dict.fromkeys(VARIANT_SECTIONS, "variant"),
    **dict.fromkeys(PROTOCOL_SECTIONS, "protocol"),
    **dict.fromkeys((*HARDWARE_SECTIONS, *HOUSE_SECTIONS), "command line"),
}
ABSENT = "is missing"


def misplaced(kind: str, content: Mapping[str, Any], origin: Origin) -> tuple[list[Problem], set[str]]:
    """Problems for the sections that a variant or protocol file must not hold although they exist, and their names."""
    own = [section for section, owner in OWNERS.items() if owner == kind]
    problems = []
    for key in content:
        if key not in OWNERS or key in own:
            continue
        reason = f"a {OWNERS[key]} file" if OWNERS[key] in LABELS else "no file, since it depends on where it runs"
        message = f"does not belong in a {kind} file: `{key}` is owned by {reason}. The command line may set anything"
        problems.append(Problem(key, message, origin((key,)), ", ".join(own)))
    return problems, {problem.path for problem in problems}


def unknown_keys(layer: Layer) -> list[tuple[Path, Problem]]:
    """A problem for each path that the schema does not have, given the names that the layer picks."""
    found: dict[Path, Problem] = {}
    for path in layer.values:
        at = _first_unknown(path, layer)
        if at and at not in found:
            found[at] = _unknown(at, path, layer)
    return list(found.items())


def _first_unknown(path: Path, layer: Layer) -> Path | None:
    section: Section | None = ROOT
    info: FieldInfo | None = None
    for depth, key in enumerate(path):
        if section is None:  # below a plain value
            return path[: depth + 1] if info is not None and not is_mapping(info) else None
        section = section.chosen(layer.values.get((*path[:depth], "name"), section.default))
        fields = section.fields()
        if key not in fields:
            return path[: depth + 1]
        info, section = fields[key], section.child(key)
    return None


def _unknown(at: Path, full: Path, layer: Layer) -> Problem:
    above, key = at[:-1], at[-1]
    section = section_at(above)
    origin = layer.origins[full]
    if section is None:
        return Problem(dotted(at), f"does not exist: {dotted(above)} is a single value", origin)
    chosen = section.chosen(layer.values.get((*above, "name"), section.default))
    siblings = [name for name in chosen.fields() if above or name not in LABELS]
    allowed = ", ".join(siblings)
    if section.discriminated and key in section.fields():
        owners = [tag(member) for member in section.members if key in member.model_fields]
        return Problem(
            dotted(at), f"{tag(chosen.members[0])} has no key {key!r}, only {' and '.join(owners)}", origin, allowed
        )
    elsewhere = [path for path in all_keys() if path[-1] == key and path[:-1] != above]
    near = difflib.get_close_matches(key, siblings, 1)
    suggestion, message = "", "unknown key"
    if "." in key and tuple(key.split(".")) in all_keys():
        message += ": a file nests its keys, only the command line joins them by dots"
        suggestion = f"{key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    elif near:
        suggestion = dotted((*above, near[0], *full[len(at) :]))
    elif len(elsewhere) == 1:
        suggestion = dotted(elsewhere[0])
    elif elsewhere:
        message += f"; {key!r} exists as {', '.join(map(dotted, elsewhere))}"
    else:
        suggestion = _nearest(full)
    return Problem(dotted(full if near and not above else at), message, origin, allowed, suggestion)


def _nearest(path: Path) -> str:
    """The key whose dotted path, or whose last part, is spelled most like this one."""
    keys = all_keys()
    whole = difflib.get_close_matches(dotted(path), [dotted(key) for key in keys], 1, 0.75)
    if whole:
        return whole[0]
    last = difflib.get_close_matches(path[-1], [key[-1] for key in keys], 1, 0.75)
    places = [dotted(key) for key in keys if last and key[-1] == last[0]]
    return places[0] if len(places) == 1 else ""


def rewrite(error: ValidationError, raw: Mapping[str, Any], origin: Origin, *, under: Path = ()) -> list[Problem]:
    """Pydantic's findings as problems, one for each path.

    Args:
        error: what it raised.
        raw: the whole recipe's content, as far as it was given.
        origin: the place that set a path.
        under: the section that was validated, where it was not the whole recipe.
    """
    found: dict[Path, Problem] = {}
    for detail in error.errors(include_url=False):
        path, info = _place((*under, *detail["loc"]))
        found.setdefault(path, _problem(detail, path, info, raw, origin(path)))
    return list(found.values())


def is_absence(problem: Problem) -> bool:
    """Whether a problem is that nobody set a value."""
    return problem.message.startswith(ABSENT)


def _place(loc: Iterable[int | str]) -> tuple[Path, FieldInfo | None]:
    """The dotted path of a location. Pydantic's also names union members and positions in lists; those are left out."""
    section: Section | None = ROOT
    path: Path = ()
    info: FieldInfo | None = None
    for part in loc:
        if section is None:
            break
        fields = section.fields()
        if isinstance(part, str) and part in fields:
            path, info, section = (*path, part), fields[part], section.child(part)
        else:
            section = section.chosen(part)
    return path, info


def _problem(detail: ErrorDetails, path: Path, info: FieldInfo | None, raw: Mapping[str, Any], origin: str) -> Problem:
    section = section_at(path)
    kind, key = detail["type"], dotted(path)
    if kind.startswith("union_tag") and section:
        name = _at(raw, (*path, "name"))
        names, noun = ", ".join(section.names), NOUNS.get(path[-1], path[-1])
        if kind == "union_tag_not_found":
            return Problem(f"{key}.name", f"{ABSENT}: it says which {noun}", origin, names)
        near = difflib.get_close_matches(str(name), section.names, 1)
        return Problem(f"{key}.name", f"unknown {noun} {_shown(name)}", origin, names, near[0] if near else "")
    value = _at(raw, path)
    if kind == "missing" and value is None:  # with a value, it is an item of a list that is missing
        what = "" if section or info is None else f"; it must be {expected(info)}"
        names = ", ".join(section.names or section.fields()) if section else ""
        return Problem(key, f"{ABSENT}{what}", origin, names)
    if kind in ("value_error", "assertion_error"):
        return Problem(key, str(detail["ctx"]["error"]), origin)
    if section:
        names = ", ".join(section.names or section.fields())
        return Problem(key, f"must be a section{' or a name' * section.named}, got {_shown(value)}", origin, names)
    if info is None:
        return Problem(key, detail["msg"], origin)
    return Problem(key, f"must be {expected(info)}, got {_shown(value)}", origin, "", _mended(info, value))


def _mended(info: FieldInfo, value: Any) -> str:
    """The spelling that was probably meant."""
    takes = expected(info)
    if "a list, each" in takes and isinstance(value, str | int | float):
        return f"[{value}]"
    if "whole number" in takes and isinstance(value, float) and value.is_integer():
        return str(int(value))
    if "text" in takes and isinstance(value, int | float):
        return f'"{value}"'
    if "true or false" in takes and str(value).lower() in ("yes", "on", "no", "off"):
        return "true" if str(value).lower() in ("yes", "on") else "false"
    if "one of" in takes and isinstance(value, str):
        options = takes.replace(" or null", "").partition("one of ")[2].split(", ")
        return next(iter(difflib.get_close_matches(value, options, 1)), "")
    return ""


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _at(raw: Any, path: Path) -> Any:
    for key in path:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw
