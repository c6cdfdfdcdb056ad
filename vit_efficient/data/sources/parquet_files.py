"""Which parquet files of a folder are the training images, and which the validation images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vit_efficient.data.sources.classes import some
from vit_efficient.errors import DataError

_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\b")


def find_files(path: Path) -> dict[str, list[Path]]:
    """Files of `train`, `validation` and `test`, in the order of their names; one file alone is `train`.

    The name says it (`train-00000-of-00005.parquet`), or the name of the folder (`train/0000.parquet`).

    Raises:
        DataError: there are none, or of several data sets, or some are missing.
    """
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder.")
    files = [
        file for file in sorted(path.rglob("*.parquet"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]  # fmt: skip
    if not files:
        raise DataError(f"{path} holds no .parquet files. Expected train-00000-of-00005.parquet, or data/ with such.")
    found: dict[str, list[Path]] = {}
    sets = set()
    for file in files:
        own, above = _WORD.search(file.stem), _WORD.search(file.parent.name) if file.parent != path else None
        word = own or above
        found.setdefault(_WORDS[word[1].lower()] if word else "", []).append(file)
        sets.add(file.parent.parent if above else file.parent)
    if len(sets) > 1:
        names = sorted(str(one.relative_to(path)) for one in sets)
        raise DataError(f"{path} holds several data sets: {some(names)}. Name one of these folders.")
    unknown = found.pop("", [])
    if unknown and not found:
        found["train"] = unknown
    elif unknown:
        raise DataError(f"{unknown[0]} does not say what it belongs to, as others do: train, validation or test.")
    if "train" not in found:
        raise DataError(f"{path} has no training files, but {', '.join(found)}. To take a file all the same, name it.")
    for part in found.values():
        _complete(part)
    return found


def _complete(files: Sequence[Path]) -> None:
    """`-00001-of-00005` says how many there must be."""
    numbers = [(int(match[1]), int(match[2])) for file in files if (match := _NUMBERED.search(file.name))]
    counts = {count for _, count in numbers}
    if len(counts) > 1 or len(numbers) != len(set(numbers)):
        raise DataError(
            f"{files[0].parent} holds files of two versions: {files[0].name} to {files[-1].name}. Keep one."
        )
    missing = [number for count in counts for number in range(count) if (number, count) not in numbers]
    if missing:
        raise DataError(
            f"{files[0].parent}: {len(missing)} of {max(counts)} files are missing beside {files[0].name}: number "
            f"{some([f'{number:05d}' for number in missing])}. Get the data set again."
        )
