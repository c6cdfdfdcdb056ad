"""Errors that a user can cause and mend.

Every command catches `UserError`, prints its text without a traceback and exits with code 2.
The text says what was asked, what is wrong, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class UserError(Exception):
    """Something that the user asked for cannot be done; the message says why and what to do."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Args:
        path: dotted key, for example ``optim.lr``.
        message: what is wrong.
        origin: the file, or ``command line``, that set the value; empty if nobody did.
        allowed: what would have been accepted; empty if it cannot be listed.
        suggestion: the nearest accepted spelling; empty if none is near.
    """

    path: str
    message: str
    origin: str = ""
    allowed: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        if self.origin:
            text += f"\n    set in   {self.origin}"
        if self.allowed:
            text += f"\n    allowed  {self.allowed}"
        if self.suggestion:
            text += f"\n    did you mean {self.suggestion!r}?"
        return text


class RecipeError(UserError):
    """All mistakes of a recipe at once."""

    def __init__(self, problems: list[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if isinstance(problems, str) else f"{count} mistake{'s' * (count != 1)} in the recipe\n"
        super().__init__(head + "\n".join(f"  {p}" if head else str(p) for p in self.problems))


class DataError(UserError):
    """Shards, manifests or images that cannot be read as they should."""


class CheckpointError(UserError):
    """A checkpoint or weight file that does not fit, is damaged, or is not trusted."""


class CapabilityError(UserError):
    """This machine (GPU, dtype, package) cannot run what was asked for."""
