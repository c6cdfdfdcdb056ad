"""Pretrained weights of timm, from the Hugging Face hub or its local cache."""

from __future__ import annotations

from pathlib import Path

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from vit_efficient.errors import CheckpointError

FILES = ("model.safetensors", "pytorch_model.bin")
TIMEOUT_S = 10


def fetch(model_name: str, tag: str = "") -> tuple[str, Path]:
    """Download a model's pretrained weights, or take them from the cache, and return (name of the source, file).

    Args:
        model_name: timm's name, such as ``vit_tiny_patch16_224`` or ``vit_tiny_patch16_224.augreg_in21k``.
        tag: which of the model's weights; empty for the name's own tag, or timm's default.

    Raises:
        CheckpointError: no such tag, none on the hub, or the hub cannot be reached; always in one line.
    """
    config = timm.models.get_pretrained_cfg(pretrained_name(model_name, tag))
    repo = config.hf_hub_id if config is not None else None
    if not repo:
        raise CheckpointError(
            f"timm has no pretrained weights of {model_name} on the hub. Give `model.weights` a file, or leave it out."
        )
    files = (config.hf_hub_filename,) if config.hf_hub_filename else FILES
    for name in files:
        try:
            return repo, Path(hf_hub_download(repo, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    for name in files:
        try:
            # Asked first because it fails at once without a network; the download itself retries for a minute.
            get_hf_file_metadata(hf_hub_url(repo, name), timeout=TIMEOUT_S)
            return repo, Path(hf_hub_download(repo, name))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client passes on whatever its HTTP library raises
            raise CheckpointError(
                f"The pretrained weights {repo} are not in the local cache, and the hub cannot be reached "
                f"({type(error).__name__}). Go online once, or give `model.weights` a local .safetensors file."
            ) from error
    raise CheckpointError(f"The hub's {repo} has none of {', '.join(files)}. Give `model.weights` a local file.")


def pretrained_name(model_name: str, tag: str = "") -> str:
    """``NAME.TAG`` as timm writes it, the default tag left out.

    Raises:
        CheckpointError: the model has no such tag.
    """
    name, _, own = model_name.partition(".")
    tag = tag or own
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in known:
        raise CheckpointError(
            f"timm has no pretrained weights {tag!r} of {name}; it has {', '.join(known) or 'none at all'}."
        )
    return f"{name}.{tag}" if tag else name
