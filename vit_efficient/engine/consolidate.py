"""One safetensors file of weights from a checkpoint, whichever strategy wrote it, for `model.weights` and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vit_efficient.engine.checkpoint import atomic_write, read_checkpoint
from vit_efficient.engine.rundir import RunDir
from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.folder import is_folder
from vit_efficient.parallel.zero_folder import is_zero_folder, read_zero_folder


@dataclass(frozen=True)
class Consolidated:
    """What was written, and what it is.

    Args:
        path: the checkpoint that was read.
        step: optimizer steps that it had seen.
        tensors: how many were written.
        size: bytes of the file.
        averaged: whether the trained weights are their moving average, which is what a run evaluates and ships.
        base: where the frozen base of adapters is; None: the file holds the whole model.
    """

    path: Path
    step: int
    tensors: int
    size: int
    averaged: bool
    base: str | None


def consolidate(
    target: str, out: Path, *, live: bool = False, trust: bool = False, say: Callable[[str], None] = lambda line: None
) -> Consolidated:
    """Write the weights of a checkpoint as one file, by timm's names.

    Of a run with adapters a checkpoint holds what is trained, adapters and head, and so does the file; `export merge`
    makes one model of adapters and base.

    Args:
        target: a run's folder (its newest checkpoint that is whole), or a checkpoint, file or folder.
        out: the file to write.
        live: take the weights as they were trained, not their moving average.
        trust: whether code in a folder that DeepSpeed itself wrote may run; no other checkpoint has any.
        say: is told of each newer checkpoint of a run's folder that is damaged.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or there is a file of that name already.
    """
    if is_zero_folder(Path(target)):
        return _of_deepspeed(Path(target), out, trust=trust)
    path = _find(Path(target), say)
    checkpoint = read_checkpoint(path)
    average: dict[str, Any] = {} if live else checkpoint.get("average") or {}
    averaged = bool(average.get("steps"))
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    if averaged:
        state |= {name: value.to(state[name].dtype) for name, value in average["average"].items()}
    own: dict[str, Tensor] = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    base = checkpoint.get("base")
    described = {"step": str(checkpoint["global_step"]), "averaged": str(averaged).lower()}
    atomic_write(out, lambda temporary: save_file(own, temporary, metadata=described))
    source = None if "base" not in checkpoint else (base or {}).get("source", "its initial weights")
    return Consolidated(path, checkpoint["global_step"], len(own), out.stat().st_size, averaged, source)


def _of_deepspeed(path: Path, out: Path, *, trust: bool) -> Consolidated:
    state, step = read_zero_folder(path, trust=trust)
    prefix = "model." if all(name.startswith("model.") for name in state) else ""  # as a LightningModule has it
    own = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in state.items()}
    described = {"step": str(step), "averaged": "false"}
    atomic_write(out, lambda temporary: save_file(own, temporary, metadata=described))
    return Consolidated(path, step, len(own), out.stat().st_size, averaged=False, base=None)


def _find(path: Path, say: Callable[[str], None]) -> Path:
    if path.is_file() or is_folder(path):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is one file already. Consolidate makes such files of checkpoints.")
        return path
    if not path.is_dir():
        raise CheckpointError(f"There is no run folder or checkpoint at {path}.")
    found = RunDir(path).whole_checkpoint(say)
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint in checkpoints/. Give a run's folder or one of its checkpoints."
        )
    return found
