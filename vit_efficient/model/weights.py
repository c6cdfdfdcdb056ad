"""Read weights from a file, a run's folder or the hub. Nothing in a file can run: safetensors or `weights_only`."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vit_efficient.errors import CheckpointError
from vit_efficient.model.hub import fetch
from vit_efficient.parallel.folder import is_folder
from vit_efficient.quantization.deploy import FORMAT, VERSION, digest
from vit_efficient.quantization.dequantize import float_state

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
# Where training programs put the weights in their checkpoints; averaged weights first, as in timm.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Weights:
    """Named tensors, where they came from, and the sha256 of the file that held them."""

    state: dict[str, Tensor]
    source: str
    digest: str


def read_weights(spec: str, model_name: str) -> Weights:
    """The weights that ``model.weights`` names.

    Args:
        spec: a file, a run's folder, ``timm``, or ``timm:TAG``.
        model_name: timm's name, with or without a tag; says which weights ``timm`` means.

    Raises:
        CheckpointError: missing, damaged, hostile, not weights, or not on the hub.
    """
    if from_hub(spec):
        source, path = fetch(model_name, tag=spec.partition(":")[2])
    else:
        path = locate(spec)
        source = str(path)
    return Weights(load_state(path), source, file_digest(path))


def from_hub(spec: str) -> bool:
    """Whether ``model.weights`` means timm's weights on the hub, and no file."""
    return spec == "timm" or spec.startswith("timm:")


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it; None if there is none."""
    floats = ((name, tensor) for name, tensor in state.items() if tensor.is_floating_point() and tensor.itemsize > 1)
    return next((name for name, tensor in floats if not bool(tensor.isfinite().all())), None)


def locate(spec: str, *, key: str = "model.weights") -> Path:
    """The file that a path means: itself, or in a run's folder its final model, or else its newest checkpoint.

    Args:
        spec: the path.
        key: the recipe's key that it is the value of, for messages.

    Raises:
        CheckpointError: nothing is there.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if is_folder(path):
        raise _in_parts(path, key)
    if not path.is_dir():
        raise CheckpointError(
            f"`{key}` is {spec!r}, and there is no such file or folder. "
            "Give a .safetensors or .pth file, a run's folder, or `timm` for pretrained weights of the hub."
        )
    checkpoints = path / "checkpoints"
    steps = {int(m[1]): p for p in checkpoints.glob("*.ckpt") if (m := re.fullmatch(r"step-(\d+)\.ckpt", p.name))}
    candidates = [path / "model.safetensors", checkpoints / "best.ckpt"] + [steps[n] for n in sorted(steps)[-1:]]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if is_folder(candidate):
            raise _in_parts(candidate, key)
    raise CheckpointError(
        f"`{key}` is the folder {spec}, and it holds neither model.safetensors nor a checkpoint in "
        "checkpoints/. Give a run's folder or a weight file."
    )


def _in_parts(path: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"`{key}` is {path}, a checkpoint in parts. Make one file of it: "
        f"`python -m vit_efficient.export consolidate {path} --out weights.safetensors`."
    )


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Weights by name from one file, without the wrappers that training programs add.

    Understands safetensors; state dicts of torch, bare or nested as timm, DeiT and Lightning do; and this package's
    own checkpoints, of which it takes the moving average where there is one, since that is what was evaluated.

    Raises:
        CheckpointError: missing, damaged, code inside (which is not run), or no weights inside.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no weight file at {path}.")
    if path.suffix == ".safetensors":
        return clean(_read_safetensors(path))
    if path.suffix not in PICKLED:
        raise CheckpointError(
            f"{path} is no weight file that can be read here: known are .safetensors, {', '.join(PICKLED)}."
        )
    return clean(unnest(_read_torch(path), path))


def file_digest(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a plain file; of a model file of this package, its weights in floating point again."""
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {_first_line(error)}") from error
    if description.get("format") != FORMAT:
        return tensors
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a model file of version {description.get('version')!r}; this program reads {VERSION}."
        )
    if digest(tensors, description) != description.get("digest"):
        raise CheckpointError(f"{path} was altered: its content does not have the digest that it was written with.")
    return float_state(tensors, description)


def is_quantized(spec: str | None) -> bool:
    """Whether ``model.weights`` names a model file of this package whose weights are rounded already."""
    if spec is None or from_hub(spec):
        return False
    path = locate(spec)
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
    except (SafetensorError, OSError):
        return False  # `read_weights` says what is wrong
    return description.get("format") == FORMAT and description.get("layers", "{}") != "{}"


def _read_torch(path: Path) -> Any:
    try:
        # Checkpoints of timm and DeiT carry their command line as a Namespace, which can do nothing by itself.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := _globals(path):
            raise CheckpointError(
                f"{path} was refused: it asks Python to load {unsafe}, and a weight file could run code that way. "
                "Nothing in it was run. Convert it to safetensors where you trust it."
            ) from error
        raise CheckpointError(f"{path} is damaged, or no checkpoint of torch: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # A truncated or garbled pickle fails in any of these ways.
        raise CheckpointError(f"{path} is damaged, or no checkpoint of torch: {_first_line(error)}") from error


def _globals(path: Path) -> str:
    """What a refused checkpoint wanted to import, read from its opcodes without running them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        return ""  # not one of torch's zip files; the caller reports torch's own words
    return ", ".join(f"`{name}`" for name in sorted(names)[:5])


def unnest(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        if "pytorch-lightning_version" in checkpoint:
            return _from_lightning(checkpoint)
        state = next((checkpoint[key] for key in NESTS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(state)[:10])) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{path} holds no weights that can be found: it has {keys or 'nothing'} in it.")
    return dict(state)


def _from_lightning(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network of a LightningModule, without its metrics; averaged where an average was kept."""
    state = checkpoint["state_dict"]
    network = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    average = checkpoint.get("average") or {}
    return (network or dict(state)) | average.get("average", {})


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel, torch.compile and wrapping modules."""
    while prefix := next((p for p in WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
