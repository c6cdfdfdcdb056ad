"""Scalars as YAML 1.2 reads them, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_efficient.recipe.yaml12 import YamlError, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("-2E+3", -2000.0), ("1", 1), ("010", 10), ("0o10", 8), ("0xff", 255),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("true", True), ("False", False),
        ("null", None), ("~", None), ("", None), ("1:30", "1:30"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
        ("'1'", "1"), ('"null"', "null"), ("e3", "e3"), ("=", "="), ("[a, 1e2]", ["a", 100.0]), (".inf", math.inf),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found, _ = parse(text)
    assert found == value
    assert type(found) is type(value)


def test_line_of_every_key() -> None:
    _, lines = parse("a: 1\nb:\n  c: 2\n  d: {e: 3}\n")
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", "e"): 4}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' twice .first on line 1"),
        ("a: {b: 1, b: 2}\n", 1, "'a.b' twice"),
        ("a: 1\n1: b\n", 2, "1, which is not text"),
        ("a: &x 1\nb: *x\n", 2, "alias .*needs quotes"),
        ("keep: [*.attn]\n", 1, "needs quotes"),
        ("a: 1\n b: 2\n", 2, "mapping values"),
        ("a: [1\n", 2, "expected"),
        ("a: !!python/object/apply:os.system [true]\n", 1, "python/object"),
        ("a: !!timestamp 2024-01-01\n", 1, "timestamp"),
        ("a: !!int x\n", 1, "int"),
        ("a: 1\n---\nb: 2\n", 2, "document"),
        ("a: 1\nb: \x00\n", 2, "U.0000"),
        ("a: " + "[" * 5000, 1, "nested"),
    ],
)
def test_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        parse(text)
    assert caught.value.line == line


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LOOKALIKES = st.sampled_from(
    [
        "1e-3",
        "on",
        "null",
        "0o10",
        "1:30",
        "",
        " a",
        "*x",
        "- b",
        "a: b",
        "#",
        "~",
        "=",
        "<<",
        "\x85",
        "a\nb",
        "\u2028 ",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | LOOKALIKES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | LOOKALIKES, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    found, _ = parse(dump(value))
    assert found == value
    assert repr(found) == repr(value)  # 1 and 1.0 and True are told apart
