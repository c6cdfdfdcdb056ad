"""Image data sets of the Hugging Face kind: parquet files with a column of encoded images and one of labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vit_efficient.config import Config
from vit_efficient.data.sources.base import Inputs, Source
from vit_efficient.data.sources.classes import order_classes, some
from vit_efficient.data.sources.parquet_columns import Columns, read_columns, read_labels
from vit_efficient.data.sources.parquet_files import find_files
from vit_efficient.data.sources.parquet_images import ParquetImages
from vit_efficient.errors import CapabilityError, DataError

log = logging.getLogger(__name__)

_SECRET = -1  # the label of every test image, where Hugging Face's data sets keep labels secret


class ParquetConfig(Config):
    """Image data sets of Hugging Face, as parquet files."""

    name: Literal["parquet"] = "parquet"

    def open(self, inputs: Inputs) -> Source:
        """A folder with `train-*.parquet` and so on, or one file; validation images are `validation-*`, else `test-*`.

        Images are bytes, or structs with a field `bytes`. Labels are numbers, whose names stand in the metadata of the
        schema (`ClassLabel`), or names; numbers without names are taken for names, and ordered by `order_classes`.
        The images are decoded from their row groups in one pass, for which see `staging`.
        """
        inputs.only(self.name, "path", "image_column", "label_column")
        if inputs.path is None:
            raise DataError(
                "parquet needs a folder or a file: `python -m vit_efficient.prepare parquet PATH --out DIR`."
            )
        if find_spec("pyarrow") is None:
            raise CapabilityError(
                "parquet needs the package pyarrow, which is not here. In the checkout: pip install -e '.[parquet]'"
            )
        files = _parts(find_files(inputs.path))
        columns = _same_columns(files, inputs.image_column or "image", inputs.label_column or "label")
        labels = {split: read_labels(paths, columns.label) for split, paths in files.items()}
        if "val" in labels and labels["val"][0] == [_SECRET]:
            log.warning("%s and its like have no labels and are left alone", files["val"][0].name)
            del labels["val"]
        classes, known = _classes(columns, labels["train"][0])
        splits = {}
        for split, (distinct, codes) in labels.items():
            if not codes.size:
                raise DataError(f"{files[split][0].parent}: the files for {split} hold no rows.")
            foreign = [str(value) for value in distinct if value not in known]
            if foreign:
                those = "training" if columns.class_names is None else f"the schema's {len(classes):,} class names"
                raise DataError(f"{inputs.path}: {split} has the {columns.label} {some(foreign)}, unknown to {those}.")
            numbers = np.asarray([known[value] for value in distinct], np.int64)
            splits[split] = ParquetImages(files[split], columns.leaf, numbers[codes])
        identity = {name: {"images": part.labels.size, "listing": part.digest()} for name, part in splits.items()}
        return Source(self.name, classes, splits, identity)


def _parts(found: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    held_out = found.get("validation") or found.get("test")
    return {"train": found["train"], **({"val": held_out} if held_out else {})}


def _classes(columns: Columns, training: list[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and the label for each value of the column; `training` are the values that training has."""
    if columns.class_names is not None:
        return columns.class_names, {number: number for number in range(len(columns.class_names))}
    values = {str(value): value for value in training}
    classes = order_classes(values)
    return classes, {values[name]: label for label, name in enumerate(classes)}


def _same_columns(files: Mapping[str, list[Path]], image: str, label: str) -> Columns:
    """What all files agree on."""
    paths = [path for part in files.values() for path in part]
    columns = read_columns(paths[0], image, label)
    for path in paths[1:]:
        if read_columns(path, image, label) != columns:
            raise DataError(f"{path} has other columns or classes than {paths[0]}. Both must be of one data set.")
    return columns
