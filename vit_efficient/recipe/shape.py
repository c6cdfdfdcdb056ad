"""What the schema looks like from outside: its sections, their keys, and what each key takes, in plain English."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vit_efficient.config import Config
from vit_efficient.recipe.schema import Recipe


@dataclass(frozen=True)
class Section:
    """A mapping in a recipe: one config class, or several of which `name` picks one."""

    members: tuple[type[Config], ...]
    default: str | None = None  # the member that an absent `name` means

    @property
    def discriminated(self) -> bool:
        return len(self.members) > 1

    @property
    def named(self) -> bool:
        """Whether `section: name` is shorthand for `section: {name: ...}`."""
        return all("name" in member.model_fields for member in self.members)

    @property
    def names(self) -> list[str]:
        """What `name` may be, in a discriminated section."""
        return [tag(member) for member in self.members] if self.discriminated else []

    def chosen(self, name: Any) -> Section:
        """The section as it is once `name` is known; itself if that picks nothing."""
        members = tuple(member for member in self.members if self.discriminated and tag(member) == name)
        return Section(members, self.default) if members else self

    def fields(self) -> dict[str, FieldInfo]:
        """Every key that some member has."""
        found: dict[str, FieldInfo] = {}
        for member in self.members:
            for key, info in member.model_fields.items():
                found.setdefault(key, info)
        return found

    def child(self, key: str) -> Section | None:
        """The section under `key`, or None where `key` holds a plain value or does not exist."""
        infos = [member.model_fields[key] for member in self.members if key in member.model_fields]
        members = {cls: None for info in infos for cls in configs(info.annotation)}
        if not members:
            return None
        default = infos[0].get_default(call_default_factory=True) if not infos[0].is_required() else None
        return Section(tuple(members), getattr(default, "name", None))


ROOT = Section((Recipe,))


def tag(member: type[Config]) -> str:
    """The `name` that picks this member of a union."""
    return str(get_args(member.model_fields["name"].annotation)[0])


def configs(annotation: Any) -> tuple[type[Config], ...]:
    """The config classes that an annotation admits: none for a plain value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return configs(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(cls for part in get_args(annotation) for cls in configs(part))
    return ()


def section_at(path: tuple[str, ...]) -> Section | None:
    """The section at a path, all members of unions on the way included; None where there is none."""
    section: Section | None = ROOT
    for key in path:
        section = section.child(key) if section else None
    return section


def all_sections(section: Section = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Section]]:
    """Every section with its path, outermost first; the root itself is left out."""
    for key in section.fields():
        child = section.child(key)
        if child:
            yield (*path, key), child
            yield from all_sections(child, (*path, key))


def all_keys() -> list[tuple[str, ...]]:
    """The path of every key that holds a plain value."""
    sections = dict(all_sections())
    paths = [(*path, key) for path, section in sections.items() for key in section.fields()]
    return [path for path in paths if path not in sections]


def is_mapping(info: FieldInfo) -> bool:
    """Whether a plain value is itself a mapping with free keys, such as `model.kwargs`."""
    return get_origin(info.annotation) is dict


def expected(info: FieldInfo) -> str:
    """What a key takes, to be read after "must be"."""
    return _english(info.annotation, info.metadata)


def _english(annotation: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _english(args[0], [*args[1:], *metadata])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_english(part, metadata) for part in args))
    if origin is Literal:
        return f"{'one of ' * (len(args) > 1)}{', '.join(map(str, args))}"
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f" of {len(args)}"
        return f"a list{count}, each {_english(args[0], [])}"
    if origin is dict:
        return "a mapping"
    if annotation is int:
        return "a whole number" + _bounds(metadata, whole=True)
    if annotation is float:
        return "a number" + _bounds(metadata, whole=False)
    plain = {bool: "true or false", str: "text", Path: "a path", NoneType: "null"}
    return plain.get(annotation) or ("a section" if configs(annotation) else str(annotation))


def _bounds(metadata: list[Any], *, whole: bool) -> str:
    """`` from 0 to 1``, `` of at least 0 and below 1``, `` above 0``, or nothing."""
    bounds: dict[str, Any] = {}
    for item in metadata:
        for word in ("gt", "ge", "lt", "le"):
            if hasattr(item, word):
                bounds[word] = getattr(item, word)
    if whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "of at most {}"}
    said = [text.format(bounds[word]) for word, text in words.items() if word in bounds]
    return f" {' and '.join(said)}" if said else ""
