"""Folders that DeepSpeed itself writes, for the weights in them.

Runs of this package write none (see `parallel.deepspeed`); those of Lightning or of DeepSpeed's own loops do. They are
pickles of DeepSpeed's objects, so code in them runs when they are read.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from vit_efficient.errors import CapabilityError, CheckpointError

LATEST = "latest"  # names the folder in the folder


def is_zero_folder(path: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint there."""
    inside = _inside(path)
    return inside is not None and any(inside.glob("*_model_states.pt"))


def _inside(path: Path) -> Path | None:
    latest = path / LATEST
    return path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


def read_zero_folder(path: Path, *, trust: bool) -> tuple[dict[str, Tensor], int]:
    """The weights in such a folder, float32 where they were trained, and the optimizer steps that they had seen.

    Args:
        path: the folder that holds ``latest``.
        trust: whether the user said that code in it may run.

    Raises:
        CheckpointError: not trusted, or damaged.
        CapabilityError: deepspeed is not installed.
    """
    if not trust:
        raise CheckpointError(
            f"{path} was written by DeepSpeed. Such folders are pickles, and code in them runs when they are read. "
            "If you know who wrote it, say so with `--trust`."
        )
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise CapabilityError(
            f"{path} was written by DeepSpeed, and reading it needs the package deepspeed: "
            "pip install -e '.[deepspeed]' in the checkout"
        ) from error
    inside = _inside(path)
    assert inside is not None, "the caller has looked"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does, line by line
            state = get_fp32_state_dict_from_zero_checkpoint(str(path))
        steps = torch.load(next(inside.glob("*_model_states.pt")), map_location="cpu", weights_only=False)[
            "global_steps"
        ]
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"Cannot read DeepSpeed's folder {path}: {error}. A part is missing or damaged."
        ) from error
    return {name: tensor.clone() for name, tensor in state.items()}, int(steps)
