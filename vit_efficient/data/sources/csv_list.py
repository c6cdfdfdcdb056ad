"""Your own images: a CSV file that lists files and labels."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
import sys
from pathlib import Path
from typing import Literal

import numpy as np

from vit_efficient.config import Config
from vit_efficient.data.sources.base import BadImage, Inputs, Labels, RawImage, Source
from vit_efficient.data.sources.classes import order_classes, some
from vit_efficient.errors import DataError

SPLITS = ("train", "val")


class CsvConfig(Config):
    """Your own images: a CSV file of paths and labels."""

    name: Literal["csv"] = "csv"

    def open(self, inputs: Inputs) -> Source:
        """A file with the header `path,label` and, optionally, a column `split` of `train` and `val`.

        Paths are relative to the file's own folder, or absolute. Labels are class names, numbered as `order_classes`
        does. Files are looked for now, and read later.
        """
        inputs.only(self.name, "path", "image_column", "label_column")
        if inputs.path is None:
            raise DataError("csv needs the file: `python -m vit_efficient.prepare csv FILE.csv --out DIR`.")
        rows = _read(inputs.path, inputs.image_column or "path", inputs.label_column or "label")
        sizes = _sizes(inputs.path, [file for file, _, _ in rows])
        classes = order_classes(label for _, label, split in rows if split == "train")
        rank = {name: label for label, name in enumerate(classes)}
        foreign = sorted({label for _, label, _ in rows} - rank.keys())
        if foreign:
            raise DataError(f"{inputs.path}: val has class {some(foreign)}, which train does not have.")
        splits, digest = {}, hashlib.sha256()
        for name in SPLITS:
            chosen = [index for index, row in enumerate(rows) if row[2] == name]
            if chosen:
                labels = np.asarray([rank[rows[index][1]] for index in chosen], np.int64)
                splits[name] = Files(inputs.path.parent, [rows[index][0] for index in chosen], labels)
        for (file, label, split), size in zip(rows, sizes, strict=True):
            digest.update(f"{split}/{file}\0{label}\0{size}\0".encode(errors="surrogateescape"))
        return Source(self.name, classes, splits, {"images": len(rows), "listing": digest.hexdigest()[:32]})


class Files:
    """Images that are a file each; names are relative to `root`, or absolute."""

    def __init__(self, root: Path, files: list[str], labels: Labels) -> None:
        self.root, self.files, self.labels = root, files, labels

    def name(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int) -> RawImage:
        try:
            data = (self.root / self.files[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        return RawImage(self.name(index), data)


def _read(path: Path, image_column: str, label_column: str) -> list[tuple[str, str, str]]:
    """File, label and split of every row."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            image, label = (_column(header, name, flag, path) for name, flag in
                            ((image_column, "--image-column"), (label_column, "--label-column")))  # fmt: skip
            split = header.index("split") if "split" in header else None
            for row in reader:
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                if len(cells) != len(header) or not cells[image] or not cells[label]:
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(cells)} columns, the header {len(header)}."
                        if len(cells) != len(header)
                        else f"{path}: line {reader.line_num} has no {label_column if cells[image] else image_column}."
                    )
                part = "train" if split is None else cells[split]
                if part not in SPLITS:
                    raise DataError(f"{path}: line {reader.line_num} has split {part!r}; known are train and val.")
                rows.append((cells[image], sys.intern(cells[label]), sys.intern(part)))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    if not any(part == "train" for _, _, part in rows):
        raise DataError(f"{path} lists no {'training ' if rows else ''}images.")
    return rows


def _column(header: list[str], name: str, flag: str, path: Path) -> int:
    if header.count(name) != 1:
        raise DataError(
            f"{path} has {header.count(name) or 'no'} column{'s' * (name in header)} {name!r}. The first line names "
            f"{', '.join(map(repr, header)) or 'none'}; choose with {flag}."
        )
    return header.index(name)


def _sizes(path: Path, files: list[str]) -> list[int]:
    """Bytes of every file.

    Raises:
        DataError: some are absent, or listed twice; all absent ones are counted at once.
    """
    sizes, missing, seen = [], [], set()
    for file in files:
        place = os.path.normpath(path.parent / file)
        if place in seen:
            raise DataError(f"{path} lists {file} twice.")
        seen.add(place)
        try:
            status = os.stat(place)
        except OSError:
            missing.append(file)
            continue
        if not stat.S_ISREG(status.st_mode):
            missing.append(file)
        sizes.append(status.st_size)
    if missing:
        raise DataError(
            f"{path}: {len(missing):,} of {len(files):,} files are not there: {some(missing)}. "
            f"Paths are relative to {path.parent}, or absolute."
        )
    return sizes
