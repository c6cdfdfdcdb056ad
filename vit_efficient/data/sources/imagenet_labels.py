"""The classes of ImageNet's validation images: from the development kit, or from a table."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from vit_efficient.errors import DataError

_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_IMAGE_COLUMNS = ("imageid", "image_id", "image", "filename", "file_name", "file", "name", "path")
_LABEL_COLUMNS = ("predictionstring", "synset", "synset_id", "wnid", "label", "class")


def official_name(number: int) -> str:
    """Of the validation image with this number, from 1."""
    return f"ILSVRC2012_val_{number:08d}"


def from_devkit(path: Path) -> dict[str, str]:
    """WordNet id by image name, from `ILSVRC2012_devkit_t12.tar.gz` or the folder that it unpacks to.

    `meta.mat` gives the number (`ILSVRC2012_ID`) and the WordNet id of every synset, the ground truth the number of
    every image. Numbers are the kit's own: neither in the order of the ids, nor the labels of the shards.

    Raises:
        DataError: it is no such kit, or it contradicts itself.
    """
    files = _devkit_files(path)
    wnids = _leaf_synsets(files[_META], path)
    found = {}
    for number, line in enumerate(files[_TRUTH].decode("ascii", errors="replace").split(), 1):
        if not line.isdecimal() or int(line) not in wnids:
            raise DataError(
                f"{path}: line {number} of {_TRUTH} is {line!r}, which {_META} does not have as the number of one of "
                f"its {len(wnids):,} classes. Get the kit again."
            )
        found[official_name(number)] = wnids[int(line)]
    return found


def from_table(path: Path) -> dict[str, str]:
    """WordNet id by image name, without folder and ending, from a text file.

    Three kinds are known: Kaggle's `LOC_val_solution.csv` (`ImageId,PredictionString`, whose second column is the id
    and boxes), two columns such as `filename,synset` with or without a header, and one column of ids, line *k* for
    image *k*.

    Raises:
        DataError: it is none of them.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except FileNotFoundError:
        raise DataError(f"--labels {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--labels {path} is not a CSV file: {error}.") from error
    if not rows:
        raise DataError(f"--labels {path} is empty.")
    header = [cell.strip().lower() for cell in rows[0][1]]
    image, label = _column(header, _IMAGE_COLUMNS), _column(header, _LABEL_COLUMNS)
    if label is not None:
        rows = rows[1:]
    else:
        image, label = (None, 0) if len(header) == 1 else (0, 1)
    if image is None and len(header) > 1:
        raise DataError(
            f"--labels {path}: no column of images among {', '.join(header)}. Known names: {', '.join(_IMAGE_COLUMNS)}."
        )
    found: dict[str, str] = {}
    for place, (number, row) in enumerate(rows, 1):
        wnid = row[label].split()[0] if label < len(row) and row[label].strip() else ""
        cell = official_name(place) if image is None else row[image].strip() if image < len(row) else ""
        if not re.fullmatch(r"n\d+", wnid) or not cell:
            raise DataError(
                f"--labels {path}: line {number} is {','.join(row)!r}; expected an image and a WordNet id such as "
                "n01440764. Example: `ILSVRC2012_val_00000001.JPEG,n01751748` under the header `filename,synset`."
            )
        name = re.sub(r"\.\w+$", "", cell.rsplit("/", 1)[-1])
        if name in found:
            raise DataError(f"--labels {path}: line {number} names {name} a second time.")
        found[name] = wnid
    return found


def _column(header: Sequence[str], known: Sequence[str]) -> int | None:
    return next((header.index(name) for name in known if name in header), None)


def _devkit_files(path: Path) -> dict[str, bytes]:
    """The two files that matter."""
    found = {}
    try:
        if path.is_dir():
            found = {file.name: file.read_bytes() for name in (_META, _TRUTH) for file in path.glob(f"**/{name}")}
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = member.name.rsplit("/", 1)[-1]
                    reader = archive.extractfile(member) if member.isreg() and name in (_META, _TRUTH) else None
                    if reader is not None:
                        found[name] = reader.read()
    except FileNotFoundError:
        raise DataError(f"--devkit {path}: there is no such archive or folder.") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"--devkit {path} is not a whole tar archive: {error}. Get it again.") from error
    for name in (_META, _TRUTH):
        if name not in found:
            raise DataError(f"--devkit {path} has no {name}. Expected ILSVRC2012_devkit_t12.tar.gz.")
    return found


def _leaf_synsets(data: bytes, path: Path) -> dict[int, str]:
    """WordNet id by number of the synsets that have no children: the classes."""
    import numpy as np
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"])
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        found = {int(number): str(wnid) for number, wnid, children in rows if int(children) == 0}
    except (
        MatReadError, OSError, KeyError, ValueError, TypeError, IndexError, NotImplementedError, zlib.error,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: {_META} is not the kit's table of synsets: {error}. Get the kit again.") from error
    if not found:
        raise DataError(f"{path}: {_META} lists no class (no synset without children). Get the kit again.")
    return found
