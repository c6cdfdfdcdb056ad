"""What one sample looks like inside a shard: `KEY.jpg|png|webp` and `KEY.cls` (the label in ASCII)."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from webdataset.tariterators import group_by_keys, tar_file_expander

from vit_efficient.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")


class BadSample(DataError):  # noqa: N818 - named for the thing
    """One sample that cannot be used, while its neighbours can: what `data.on_error: skip` leaves out."""


@dataclass(frozen=True)
class Sample:
    """An encoded image and its label."""

    key: str
    image: bytes
    label: int


def parse_sample(span: bytes, origin: str) -> Sample:
    """Read the tar members of one sample.

    Args:
        span: the sample's bytes within its shard, headers and padding included.
        origin: the shard's name, for messages.

    Raises:
        BadSample: no image, no label, or not a tar.
    """
    try:
        groups = list(group_by_keys(tar_file_expander([{"url": origin, "stream": io.BytesIO(span)}])))
    except (OSError, ValueError, EOFError) as error:  # tarfile's errors are OSErrors
        raise BadSample(f"{origin}: not a tar where a sample should be: {error}") from error
    if len(groups) != 1:
        raise BadSample(
            f"{origin}: {len(groups)} samples where the index has one. "
            "Make the index again with `python -m vit_efficient.prepare index`."
        )
    members = groups[0]
    key = members["__key__"]
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        raise BadSample(f"{origin}, sample {key}: no image; looked for {', '.join(IMAGE_EXTENSIONS)}")
    return Sample(key, members[extension], parse_label(members.get("cls"), f"{origin}, sample {key}"))


def parse_label(text: bytes | None, where: str) -> int:
    """Read a `.cls` member."""
    if text is None or not re.fullmatch(rb"\s*-?\d{1,9}\s*", text):
        said = "no label (a member `.cls` with the class number)" if text is None else f"label {text[:20]!r}"
        raise BadSample(f"{where}: {said}; expected an integer in ASCII")
    return int(text)
