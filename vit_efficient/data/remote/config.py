"""How shards that lie elsewhere are read."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from vit_efficient.config import Config

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class RemoteConfig(Config):
    """Shards at a URL; nothing of it matters to local ones."""

    timeout: PositiveFloat = Field(30.0, description="Seconds to wait for a connection, or for the next bytes of one.")
    attempts: PositiveInt = Field(
        8, description="How often a request is made, waiting twice as long before each (0.5 s at first, 30 s at most)."
    )
    patience: PositiveFloat = Field(
        600.0, description="Seconds that a sample, or 8 MB of a shard, may take, all attempts together."
    )
    connections: PositiveInt = Field(16, description="Samples that one loader process fetches at the same time.")
    cache: Path | None = Field(
        None,
        description="Folder on a local disk to keep whole shards in, checked by sha256 and shared by all processes. "
        "Unset: only the samples that are asked for are fetched, each time.",
    )
    cache_size: str = Field(
        "100GB",
        description="What the folder may hold, for example `2TB`. Shards that nobody has open make room, the ones used "
        "longest ago first; where that is not enough, others are read as if there were no cache.",
    )

    @field_validator("cache_size")
    @classmethod
    def _size(cls, text: str) -> str:
        if parse_bytes(text) is None:
            raise ValueError(f"must be a size such as 500MB, 100GB or 2TB, got {text!r}")
        return text

    @property
    def cache_bytes(self) -> int:
        """`cache_size` as a number."""
        size = parse_bytes(self.cache_size)
        assert size is not None, "the validator has seen it"
        return size


def parse_bytes(text: str) -> int | None:
    """Bytes of `100GB`, `2TiB`, `5000`; None if it is no size above 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT]?)(i?)B)?", text.strip())
    if match is None:
        return None
    unit = match[2] or ""
    factor = 1024 ** "kMGT".index(unit) * 1024 if match[3] and unit else _UNITS[unit]
    return int(float(match[1]) * factor) or None
