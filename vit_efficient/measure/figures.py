"""A JSON file of figures that grows as they come in, so that a run that is cut short keeps what it measured."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Figures:
    """What a run has measured so far, and the file that holds it, whole after every addition.

    Args:
        path: the file, replaced in one step each time; None: there is none.
        head: what is known before anything is measured, such as `record.environment`.
        lists: names of the lists that grow.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any], lists: Iterable[str]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, **{name: [] for name in lists}}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write()  # so that a path that cannot be written is known before anything is measured

    def add(self, name: str, *entries: Mapping[str, Any]) -> None:
        """Append plain values to a list, and write the file anew."""
        self.content[name].extend(entries)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)
        os.replace(name, self.path)
