"""What runs did before a key of the recipe existed: a saved recipe that lacks it means that, not today's default."""

from __future__ import annotations

from typing import Any

DEPTH = "stochastic_depth"


def as_it_ran(saved: Any) -> Any:
    """A complete recipe as a plain mapping, with a key that it is too old for; the mapping itself is not changed."""
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or DEPTH in model:
        return saved
    return saved | {"model": model | {DEPTH: "mask"}}


def without_effect(recipe: dict[str, Any]) -> tuple[str, ...]:
    """Keys that change nothing in this recipe: how branches are dropped, where none are."""
    rate = recipe.get("model", {}).get("kwargs", {}).get("drop_path_rate")
    return () if rate else (f"model.{DEPTH}",)
