"""Where recipe files are found, and how they are read."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from vit_efficient.errors import CheckpointError, Problem, RecipeError
from vit_efficient.recipe.older import as_it_ran
from vit_efficient.recipe.schema import PROTOCOL_SECTIONS
from vit_efficient.recipe.yaml12 import YamlError, parse

Kind = Literal["variant", "protocol"]
RESOLVED = "resolved"  # the marker of a complete file; its value is the version of that format
VERSION = 1
MODEL_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Document:
    """A recipe file as read: a mapping, not yet judged."""

    path: Path
    content: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    @property
    def shown(self) -> str:
        """The path as a person would write it from here."""
        return show(self.path)

    def origin(self, key: tuple[str, ...]) -> str:
        """`file:line` of a key; of the key above it where a shorthand left it out."""
        line = self.lines.get(key) or self.lines.get(key[:-1])
        return f"{self.shown}:{line}" if line else self.shown


def show(path: Path) -> str:
    """Relative to the working directory where it lies in it."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def packaged() -> Path:
    """The folder of the recipes that ship with the package: inside it (wheel), or beside it (checkout)."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside.resolve() if inside.is_dir() else package.parent / "recipes"


def names(kind: Kind) -> list[str]:
    """Names of the variants or protocols that ship."""
    return sorted(file.stem for file in _folder(packaged(), kind).glob("*.yaml"))


def _folder(recipes: Path, kind: Kind) -> Path:
    return recipes if kind == "variant" else recipes / "protocols"


def find(kind: Kind, text: str, *, start: Path = Path(), names_in: Path | None = None) -> Path:
    """The file that `text` means.

    A name is looked up in the folder `names_in` and then among what ships. A path is taken from `start`, the working
    directory unless a file says it; `recipes/NAME.yaml` and `recipes/protocols/NAME.yaml` also find what ships, so that
    documented commands work from anywhere.

    Raises:
        RecipeError: with one problem, where there is no such file.
    """
    path = Path(text).expanduser()
    shipped = _folder(packaged(), kind)
    is_name = path.name == text and path.suffix not in (".yaml", ".yml")
    candidates = [start / path] if text else []
    if is_name:
        candidates = [folder / f"{text}.yaml" for folder in (names_in, shipped) if folder] + candidates
    elif path.parent == _folder(Path("recipes"), kind):
        candidates.append(shipped / path.name)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise RecipeError([_not_found(kind, text, is_name)])


def _not_found(kind: Kind, text: str, is_name: bool) -> Problem:
    other: Kind = "protocol" if kind == "variant" else "variant"
    key = "protocol" if kind == "protocol" else "--recipe"
    stem = Path(text).stem
    if is_name and text in names(other):
        example = f"`--recipe int8_sdpa protocol={text}`" if other == "protocol" else f"`--recipe {text}`"
        return Problem(key, f"{text!r} is a {other}, not a {kind}: write {example}", "", ", ".join(names(kind)))
    missing = f"there is no {kind} {text!r}" if is_name else f"there is no file {text!r}"
    near = difflib.get_close_matches(stem, names(kind), 1)
    return Problem(key, missing, "", ", ".join(names(kind)) + ", or the path of a file", near[0] if near else "")


def read(path: Path) -> Document:
    """Read one recipe file, or the recipe that a model file carries in its header.

    Raises:
        RecipeError: with one problem, where it cannot be read or is not a YAML mapping with text keys.
        CheckpointError: a model file that is damaged, or holds no recipe.
    """

    def wrong(message: str, line: int | None = None) -> RecipeError:
        return RecipeError([Problem("", message, show(path) + (f":{line}" if line else ""))])

    if path.suffix == MODEL_SUFFIX and path.is_file():
        try:
            with safe_open(path, framework="np") as file:
                inside = (file.metadata() or {}).get("recipe")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{show(path)} is damaged, or no safetensors file: {error}") from None
        if inside is None:
            raise CheckpointError(
                f"{show(path)} holds weights and no recipe: name a recipe, and give this file as `model.weights=`."
            )
        try:
            return Document(path, {RESOLVED: VERSION, **as_it_ran(json.loads(inside))}, {})
        except (json.JSONDecodeError, TypeError) as error:
            raise CheckpointError(f"{show(path)} carries a recipe that cannot be read: {error}") from None

    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.yaml"))
        hint = f"; it holds {', '.join(inside[:5])}: name that file" if inside else ""
        raise wrong(f"is a folder, not a recipe file{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise wrong(f"is not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror or error}") from None
    try:
        content, lines = parse(text)
    except YamlError as error:
        raise wrong(f"is not valid YAML: {error}", error.line) from None
    if content is None:
        raise wrong("is empty: a recipe file holds sections such as `attention: sdpa`")
    if not isinstance(content, dict):
        raise wrong(f"holds {type(content).__name__} data; a recipe file is a mapping such as `attention: sdpa`")
    return Document(path, as_it_ran(content) if RESOLVED in content else content, lines)


def is_protocol(document: Document) -> bool:
    """Whether a file holds what only a protocol holds."""
    return bool(document.content) and set(document.content) <= set(PROTOCOL_SECTIONS)
