"""The two columns of a parquet file that matter: what they are, and the labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_efficient.data.sources.base import Labels
from vit_efficient.data.sources.parquet_images import open_parquet
from vit_efficient.errors import DataError


@dataclass(frozen=True)
class Columns:
    """What a file's schema says.

    Args:
        leaf: path of the column that holds the encoded images.
        label: column of labels.
        class_names: by label, where the schema has them.
    """

    leaf: str
    label: str
    class_names: tuple[str, ...] | None


def read_columns(path: Path, image: str, label: str) -> Columns:
    """Look for the two columns in one file.

    Raises:
        DataError: one is absent, or not of a kind that serves.
    """
    from pyarrow import types

    with open_parquet(path) as file:
        schema = file.schema_arrow
    for name, flag in ((image, "--image-column"), (label, "--label-column")):
        if schema.names.count(name) != 1:
            columns = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
            raise DataError(f"{path} has no column {name!r}, but: {columns}. Choose with {flag}.")
    images, labels = schema.field(image).type, schema.field(label).type
    leaf = image
    if types.is_struct(images) and images.get_field_index("bytes") >= 0:
        images, leaf = images.field("bytes").type, f"{image}.bytes"
    if not (types.is_binary(images) or types.is_large_binary(images)):
        raise DataError(
            f"{path}: column {image!r} is of {_short(images)}; expected encoded images, as bytes or as a struct with "
            "bytes. For a list of files there is the source csv. Choose another column with --image-column."
        )
    texts = types.is_dictionary(labels) and types.is_string(labels.value_type)
    if not (types.is_integer(labels) or types.is_string(labels) or types.is_large_string(labels) or texts):
        raise DataError(
            f"{path}: column {label!r} is of {_short(labels)}; expected one whole number or one name for each image. "
            "Choose another column with --label-column."
        )
    return Columns(leaf, label, _class_names(path, schema.metadata or {}, label))


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else text.split("<")[0]


def _class_names(path: Path, metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Names of a `ClassLabel`, which Hugging Face's `datasets` notes beside the schema."""
    try:
        feature = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: the metadata of Hugging Face in its schema cannot be read: {error}.") from error
    return None if names is None else tuple(map(str, names))


def read_labels(paths: Sequence[Path], column: str) -> tuple[list[Any], Labels]:
    """The label of every row: distinct values, and for each row the number of its value among them.

    Raises:
        DataError: a row has none.
    """
    from pyarrow import types

    numbers: dict[Any, int] = {}
    codes = []
    for path in paths:
        with open_parquet(path) as file:
            values = file.read(columns=[column], use_threads=False).column(0).combine_chunks()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{path}: {values.null_count:,} rows have no {column}, the first is row {row}.")
        coded = values if types.is_dictionary(values.type) else values.dictionary_encode()
        own = np.asarray([numbers.setdefault(value, len(numbers)) for value in coded.dictionary.to_pylist()], np.int64)
        codes.append(own[coded.indices.to_numpy().astype(np.int64)])
    return list(numbers), np.concatenate(codes)
