"""`manifest.json`: what a folder of shards holds. Written last, so its presence says that the folder is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from vit_efficient.config import Config
from vit_efficient.data.files import write_atomically
from vit_efficient.errors import DataError

NAME = "manifest.json"
VERSION = 1  # of the layout; a reader refuses newer ones


class ShardEntry(Config):
    """One shard; `bytes` and `sha256` are those of the file."""

    file: str = Field(pattern=r"^[^/\\\x00]+\.tar$")  # a name, never a path: manifests come from others too
    samples: PositiveInt
    bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LeftOut(Config):
    """An image of the source that is in no shard."""

    name: str
    reason: str


class Manifest(Config):
    """What a folder of shards holds.

    Args:
        version: of the layout.
        written_by: name and version of the program.
        source: `digits`, `cifar10`, ...; `index` for shards that others wrote.
        options: whatever else decided the shards' bytes (seed, validation share, digest of the input ...).
        split: `train` or `val`.
        class_names: by label.
        class_counts: samples of each label.
        left_out: images that could not be read.
    """

    version: Literal[1] = 1
    written_by: str = ""
    source: str
    options: dict[str, Any]
    split: str
    class_names: tuple[str, ...]
    class_counts: tuple[NonNegativeInt, ...]
    shards: tuple[ShardEntry, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the order and the meaning of samples depend on: contents, not file names."""
        identity = [self.class_names, [(shard.sha256, shard.samples) for shard in self.shards]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, atomically."""
        write_atomically(folder / NAME, (self.model_dump_json(indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        DataError: it is absent, damaged, written by a newer version, or names no samples.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {NAME}. For shards that others wrote, make it with\n"
            f"    python -m vit_efficient.prepare index '{folder}/NAME-{{000000..000099}}.tar'"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Prepare these shards again.") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Make sense of a manifest's bytes.

    Args:
        text: of the file.
        where: it came from, for messages.

    Raises:
        DataError: it is damaged, written by a newer version, or names no samples.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} cannot be read: {error}. Prepare these shards again.") from error
    if isinstance(raw, dict) and isinstance(raw.get("version"), int) and raw["version"] > VERSION:
        raise DataError(
            f"{where} has version {raw['version']}, written by a newer vit_efficient; this one reads up to "
            f"{VERSION}. Upgrade, or prepare the shards again."
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{where} is not a manifest: {key}: {first['msg']}. Prepare these shards again.") from error
    if len(manifest.class_counts) != len(manifest.class_names):
        raise DataError(f"{where} is not a manifest: class_names and class_counts differ in length.")
    if not manifest.shards:
        raise DataError(f"{where} names no shards: there is nothing to read.")
    return manifest
