"""Writes docs/recipes.md from the schema: every key, what it takes, its default and its meaning.

python -m vit_efficient.recipe.document [--check]
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vit_efficient.config import Config
from vit_efficient.recipe import files
from vit_efficient.recipe.explain import LABELS, OWNERS
from vit_efficient.recipe.shape import ROOT, Section, configs, expected, tag
from vit_efficient.recipe.support import page

TARGET = Path(__file__).parents[2] / "docs" / "recipes.md"
SUPPORT = TARGET.with_name("support.md")

INTRO = """\
# Recipes

<!-- Written by `make docs` (python -m vit_efficient.recipe.document) from the schema. Do not edit by hand. -->

A recipe decides everything that a run does. It has three parts, which lie in different places because they change for
different reasons:

| word | owns | where |
|---|---|---|
| **variant** | `attention`, `quantization`: what a study compares | `recipes/*.yaml` |
| **protocol** | `model`, `data`, `augment`, `optim`: what it holds equal | `recipes/protocols/*.yaml` |
| **hardware** | `strategy`: what depends on the machine | defaults by machine; the command line |

`checkpoint` and `run` are housekeeping, and come from the command line too. A file may hold only what it owns: so two
variants under one protocol differ in nothing else. The command line may set anything.

    python -m vit_efficient.fit --recipe int8_sdpa
    python -m vit_efficient.fit --recipe int8_sdpa protocol=cifar10 data.shards=data/cifar10 optim.epochs=50

## Where files are found

`--recipe` takes the name or the path of a variant. A variant names the protocol that it runs on when none is given;
`protocol=` takes a name or a path as well. What ships:

- variants: {variants}
- protocols: {protocols}

- A **name** (`int8_sdpa`, `protocol=digits`) finds what ships, from any folder. A protocol is looked for in
  `protocols/` beside the variant file first, so that your own files work as these do.
- A **path** (with a `/`, or ending in `.yaml`) is taken from the working folder; one that a file names, from the folder
  of that file. Where there is no such file, `recipes/NAME.yaml` and `recipes/protocols/NAME.yaml` find what ships.
- A run writes its **complete recipe** to `recipe.yaml` in its folder, marked `resolved: 1`. It holds every section, and
  `--recipe runs/RUN/recipe.yaml` runs it again.

## Overrides

`key=value` words may stand anywhere among the options, in any order. They are laid over the files before anything is
checked, and one key cannot have two values. Values are YAML 1.2: `1e-3` is a number, `on` is text, `null` unsets,
`[head, blocks.0.*]` is a list. Text that starts with `*` needs quotes: `quantization.keep='["*.attn.qkv"]'`.

- `section: name` and `section=name` are **shorthand** for `section: {{name: ...}}`, wherever a section has a `name`:
  `attention=flash2`, `data.source=folder`, `model=vit_small_patch16_224`.
- Changing the `name` of {unions} drops the other keys that files set in that
  section, since they were meant for another name, and says which. Keys that overrides set stay.
- `model.name=` drops only `model.weights` and `model.kwargs`.
- `model.kwargs={{depth: 6}}` replaces the whole mapping, `model.kwargs.depth=6` one key of it.

Every mistake in the files and on the command line is reported at once, with its key, its place, what is allowed and
the nearest spelling.

## Every key

A required key has no default. "Unset" is written `null`.
"""


_HEAD = "\n| key | takes | default | meaning |\n|---|---|---|---|\n"


def document() -> str:
    """The whole page."""
    unions = [f"`{path}`" for path, section in _sections(ROOT, "") if section.discriminated]
    head = INTRO.format(
        variants=", ".join(f"`{name}`" for name in files.names("variant")),
        protocols=", ".join(f"`{name}`" for name in files.names("protocol")),
        unions=", ".join(unions[:-1]) + f" or {unions[-1]}",
    )
    parts = [head]
    for key in ROOT.fields():
        section = ROOT.child(key)
        if key not in LABELS and section:
            by = f"a {OWNERS[key]} file" if OWNERS[key] in LABELS else "the command line, or a complete recipe"
            parts += [f"\n### `{key}`\n\nSet by {by}.\n", *_describe(key, section)]
    return "".join(parts)


def _sections(section: Section, path: str) -> Iterator[tuple[str, Section]]:
    for key in section.fields():
        child = section.child(key)
        if child:
            yield f"{path}{key}", child
            yield from _sections(child, f"{path}{key}.")


def _describe(path: str, section: Section) -> Iterator[str]:
    """The keys of a section: those that all members share, those of each member, then the sections inside."""
    shared = _shared(section)
    if section.discriminated:
        default = f"`{section.default}`" if section.default else "required"
        names = ", ".join(section.names)
        yield f"{_HEAD}| `{path}.name` | one of {names} | {default} | Which one, and so which other keys. |\n"
        yield from (_row(path, key, info) for key, info in shared.items() if not configs(info.annotation))
        for member in section.members:
            own = {key: info for key, info in member.model_fields.items() if key not in ("name", *shared)}
            yield f"\n**`{path}: {tag(member)}`** {_summary(member)}\n"
            yield from _table(path, own)
    else:
        yield f"\n{_summary(section.members[0])}\n" if _summary(section.members[0]) else ""
        yield from _table(path, shared)
    for key in section.fields():
        child = section.child(key)
        if child:
            yield f"\n#### `{path}.{key}`\n\n{_meaning(section, key)}\n"
            yield from _describe(f"{path}.{key}", child)


def _shared(section: Section) -> dict[str, FieldInfo]:
    """The keys that every member has and describes alike."""
    first, *others = (member.model_fields for member in section.members)
    return {key: info for key, info in first.items() if all(repr(other.get(key)) == repr(info) for other in others)}


def _table(path: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    rows = [_row(path, key, info) for key, info in fields.items() if not configs(info.annotation)]
    if rows:
        yield _HEAD
        yield from rows


def _row(path: str, key: str, info: FieldInfo) -> str:
    cells = (f"`{path}.{key}`", expected(info), _default(info), info.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _meaning(section: Section, key: str) -> str:
    """What a section inside another is for; told apart by member where they differ."""
    told = {
        tag(member): member.model_fields[key].description or ""
        for member in (section.members if section.discriminated else ())
        if key in member.model_fields
    }
    if told:
        return "\n".join(f"- Of `{name}`: {text}" for name, text in told.items())
    return section.fields()[key].description or ""


def _summary(member: type[Config]) -> str:
    """The first paragraph of a class's own docstring, on one line."""
    text = (member.__dict__.get("__doc__") or "").strip().split("\n\n")[0]
    return " ".join(text.split())


def _default(info: FieldInfo) -> str:
    value: Any = info.get_default(call_default_factory=True)
    if value is PydanticUndefined or info.is_required():
        return "required"
    if value is None:
        return "unset"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def main() -> int:
    """Write the pages, or with ``--check`` compare them. Returns 1 where one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m vit_efficient.recipe.document", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    checked, stale = parser.parse_args().check, 0
    for target, wanted in ((TARGET, document()), (SUPPORT, page())):
        if not checked:
            target.write_text(wanted, encoding="utf-8")
            continue
        found = target.read_text(encoding="utf-8") if target.is_file() else ""
        for line in difflib.unified_diff(found.splitlines(), wanted.splitlines(), str(target), "now", lineterm=""):
            print(line)
        if found != wanted:
            print(f"docs/{target.name} is out of date; run `make docs`.", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
