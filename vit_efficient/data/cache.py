"""Data that is prepared on first use, and kept for every later run of this user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vit_efficient.data import manifest as manifests
from vit_efficient.data.files import make_folder, sync_folder
from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.preparation import prepare_source
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import read_index
from vit_efficient.data.sources.base import Inputs
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.errors import DataError
from vit_efficient.machine import cache_dir


def ensure_digits(cache: Path | None = None) -> Path:
    """Prepare the digits once; safe when several processes do so at the same time.

    Returns:
        the folder with `train` and `val`.
    """
    cache = cache_dir() if cache is None else cache
    folder = cache / f"digits-v{manifests.VERSION}"
    if _complete(folder):
        return folder
    make_folder(cache)
    with tempfile.TemporaryDirectory(prefix=".digits-", dir=cache) as made:
        built = Path(made) / "digits"
        prepare_source(DigitsConfig().open(Inputs()), built)
        built.chmod(0o755)
        if folder.exists() and not _complete(folder):  # damaged: out of the way, atomically
            os.rename(folder, Path(made) / "damaged")
        try:
            os.rename(built, folder)
        except OSError:
            if not _complete(folder):  # somebody else was faster, otherwise
                raise
        sync_folder(cache)
    return folder


def _complete(folder: Path) -> bool:
    if not all((folder / split / manifests.NAME).is_file() for split in ("train", "val")):
        return False
    try:
        for split in ("train", "val"):
            shards = ShardSet(folder / split, read_manifest(folder / split))
            shards.check()
            for number, entry in enumerate(shards.manifest.shards):
                read_index(shards.path(number), entry.samples)
    except DataError:
        return False
    return True
