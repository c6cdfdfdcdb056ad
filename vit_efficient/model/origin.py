"""Which weights a run began from, so that what was trained on them is never laid over others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vit_efficient.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """A weight file.

    Args:
        source: its path, or its name on the hub, for messages.
        sha256: of the file, in hexadecimal.
    """

    source: str
    sha256: str

    def state(self) -> dict[str, str]:
        """For a checkpoint."""
        return asdict(self)


def check_same_base(saved: Mapping[str, Any] | None, now: Origin | None, checkpoint: str) -> None:
    """Refuse to put adapters on another base than the one that they were trained on.

    Args:
        saved: `Origin.state` of the base, from the checkpoint; None where it was random.
        now: the base as it is; None where it is random.
        checkpoint: for the message.

    Raises:
        CheckpointError: the hashes differ, or there is none to compare with.
    """
    if saved is None and now is None:
        return  # random weights, made again from the seed
    if saved is None:
        assert now is not None
        raise CheckpointError(
            f"{checkpoint} holds adapters of random weights (it names no base), not of {now.source}. Train again on it."
        )
    if now is None or now.sha256 != saved["sha256"]:
        have = f"{now.source} is now {now.sha256[:12]}...;" if now else "the weights are random now;"
        raise CheckpointError(
            f"{checkpoint} holds adapters of another base: they were trained on {saved['source']} with sha256 "
            f"{saved['sha256'][:12]}..., but {have} on other weights their answers would be garbage. "
            "Restore that file (to evaluate or merge, its copy can be given as `quantization.base=`), or train again."
        )
