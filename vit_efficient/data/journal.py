"""What is finished of a split that is being prepared, so that a killed run goes on where it was.

One JSON object a line: first the settings, then each whole shard with the place in the source's order where the next
one begins, and what was left out on the way. A last line that was cut short by the kill does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_efficient.data.files import partial_path, write_atomically
from vit_efficient.data.manifest import LeftOut, ShardEntry
from vit_efficient.data.shards import index_path
from vit_efficient.errors import DataError

NAME = ".unfinished"


@dataclass
class Journal:
    """State of one unfinished folder.

    Args:
        path: of the journal.
        shards: that are whole.
        position: in the source's order, where the next shard begins.
        left_out: up to there.
    """

    path: Path
    shards: list[ShardEntry] = field(default_factory=list)
    position: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, entry: ShardEntry, position: int, left_out: Sequence[LeftOut]) -> None:
        """Note a shard that is whole on the disk; `left_out` is what was left out since the last."""
        line = {
            "shard": entry.model_dump(),
            "position": position,
            "left_out": [one.model_dump() for one in left_out],
        }
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(entry)
        self.position = position
        self.left_out += left_out

    def remove(self) -> None:
        """All is finished."""
        self.path.unlink()


def open_journal(folder: Path, settings: dict[str, Any]) -> Journal:
    """Begin a folder, or go on in one.

    What the killed run left of a shard that is not whole stays: that shard is written next, under the same names.

    Raises:
        DataError: the folder holds files of another origin, or an unfinished run with other input or options.
    """
    path = folder / NAME
    if not path.exists():
        begun = partial_path(path).name  # left where it was killed while it began the journal
        if any(other.name != begun for other in folder.iterdir()):
            raise DataError(
                f"{folder} is not empty, and was not made by a run of this command that was cut short. "
                "Choose another --out, or empty it first."
            )
        write_atomically(path, json.dumps({"settings": settings}).encode() + b"\n")
        return Journal(path)
    journal, before = _read(path)
    if before != json.loads(json.dumps(settings)):
        differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise DataError(
            f"{folder} holds an unfinished run with other input or options ({', '.join(differing)}). "
            "Finish it with the same command, choose another --out, or remove the folder."
        )
    return _whole(journal, folder)


def _read(path: Path) -> tuple[Journal, dict[str, Any]]:
    """What it says, and the settings that it was begun with."""
    journal, settings, whole = Journal(path), dict[str, Any](), 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # cut short
        try:
            entry = json.loads(line)
            if not whole:
                settings = dict(entry["settings"])
            else:
                journal.shards.append(ShardEntry.model_validate(entry["shard"]))
                journal.left_out += [LeftOut.model_validate(one) for one in entry["left_out"]]
                journal.position = int(entry["position"])
        except (ValueError, KeyError, TypeError) as error:  # pydantic's are ValueErrors
            raise DataError(f"{path} is damaged. Remove the folder {path.parent}, and start again.") from error
        whole += len(line)
    if not settings:  # they were written atomically
        raise DataError(f"{path} is damaged. Remove the folder {path.parent}, and start again.")
    os.truncate(path, whole)
    return journal, settings


def _whole(journal: Journal, folder: Path) -> Journal:
    """The journal, if all its shards are there."""
    for entry in journal.shards:
        shard = folder / entry.file
        if not (shard.is_file() and shard.stat().st_size == entry.bytes and index_path(shard).is_file()):
            raise DataError(
                f"{folder}: {entry.file}, which an unfinished run had written, is not there or has another size. "
                "Remove the folder, and start again."
            )
    return journal
