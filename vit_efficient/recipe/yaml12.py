"""YAML as version 1.2 reads it, and nothing that a recipe does not need.

PyYAML follows YAML 1.1, where `1e-3` is text, `on` is a boolean, `010` is eight and `1:30` is ninety. Here scalars
follow the core schema of YAML 1.2 (section 10.3.2 of its specification). Keys are text and unique; aliases, merge
keys and foreign tags are refused, so that reading a file makes plain values and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

Path = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_NEEDS_QUOTES = "*&!%@`|>?"


class YamlError(ValueError):
    """Text that is not the YAML of a recipe; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def _add_resolvers(cls: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    for name, (pattern, first) in _SCALARS.items():
        cls.add_implicit_resolver(_TAG + name, re.compile(rf"^(?:{pattern})$"), first)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own shape: a table per class, filled below

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"found the alias *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Line breaks of any kind (U+0085 and U+2028 are some) come back as they are from double quotes only.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_add_resolvers(_Loader)
_add_resolvers(_Dumper)


def parse(text: str) -> tuple[Any, dict[Path, int]]:
    """The value of a document, and the line (from 1) of each key by its path.

    Raises:
        YamlError: where the text is not YAML, holds a key twice, an alias, or a tag beyond the core schema.
    """
    try:
        root = yaml.compose(text, _Loader)
        if root is None:
            return None, {}
        lines: dict[Path, int] = {}
        return _value(root, (), lines), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = str(error.problem or error.context)
        found = (
            "*" if "alias" in f"{error.context} {message}" else (mark.buffer or "")[mark.pointer :][:1] if mark else ""
        )
        if found and found in _NEEDS_QUOTES:
            message += f"; text that starts with {found} needs quotes"
        raise YamlError(message, mark.line + 1 if mark is not None else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"holds a character that YAML does not allow (U+{ord(text[error.position]):04X})", line
        ) from None
    except RecursionError:
        raise YamlError("is nested too deep", 1) from None


def _value(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return dict(_items(node, path, lines))
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(item, (*path, str(index)), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith(_TAG):
        try:
            return _scalar(node.tag.removeprefix(_TAG), node.value)
        except ValueError:
            pass
    raise YamlError(f"holds a value of the kind {node.tag!r}, which recipes have no use for", line)


def _items(node: yaml.MappingNode, path: Path, lines: dict[Path, int]) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _value(key_node, path, {})
        if not isinstance(key, str):
            raise YamlError(f"has the key {key!r}, which is not text", line)
        if key in seen:
            where = f" (first on line {seen[key]})" if seen[key] != line else ""
            raise YamlError(f"has the key {'.'.join((*path, key))!r} twice{where}", line)
        seen[key] = line
        lines[*path, key] = line
        yield key, _value(value_node, (*path, key), lines)


def _scalar(kind: str, text: str) -> Any:
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int":
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text.removeprefix("0o").removeprefix("0x"), base)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError(kind)


def dump(value: Any) -> str:
    """Block style with short lists on one line; `parse(dump(x))` gives x back."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return text
