"""What one sample looks like inside a shard: `KEY.jpg|png|webp` and `KEY.cls` (the label in ASCII)."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass

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
    key, members = _plain_members(span) or _any_members(span, origin)
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        raise BadSample(f"{origin}, sample {key}: no image; looked for {', '.join(IMAGE_EXTENSIONS)}")
    return Sample(key, members[extension], parse_label(members.get("cls"), f"{origin}, sample {key}"))


def _plain_members(span: bytes) -> tuple[str, dict[str, bytes]] | None:
    """Key and members by extension, of files of one key with plain headers; None for all else that a tar may hold."""
    key: str | None = None
    members: dict[str, bytes] = {}
    at = 0
    while at < len(span):
        header = _plain_header(span[at : at + tarfile.BLOCKSIZE])
        if header is None:
            return None
        name, size = header
        parts = key_and_extension(name)
        if parts is None or parts[1] in members or key not in (None, parts[0]):
            return None
        (key, suffix), at = parts, at + tarfile.BLOCKSIZE
        members[suffix] = span[at : at + size]
        at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return (key, members) if key is not None and at == len(span) else None


def _plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of a regular file with a short ASCII name (POSIX.1-1988, "ustar"); None for any other header.

    By hand, as `tarfile` would take a twentieth of a loader's time; the span's checksum has vouched for the bytes.
    """
    name, size = block[:100].rstrip(b"\0"), block[124:136].rstrip(b"\0 ")
    regular = block[156:157] == b"0" and block[257:262] == b"ustar" and block[345:346] == b"\0"
    if not (regular and name.isascii() and re.fullmatch(rb"[0-7]+", size)):
        return None
    return name.decode("ascii"), int(size, 8)


def key_and_extension(name: str) -> tuple[str, str] | None:
    """webdataset's convention: all up to the first dot of the last part is the key; None if there is no such dot."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def _any_members(span: bytes, origin: str) -> tuple[str, dict[str, bytes]]:
    """The same as webdataset reads it: long names, blocks of zeros, and all else that a tar may hold."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # loads torch, which preparing does without

    try:
        groups = list(group_by_keys(tar_file_expander([{"url": origin, "stream": io.BytesIO(span)}])))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise BadSample(f"{origin}: not a tar where a sample should be: {error}") from error
    if len(groups) != 1:
        raise BadSample(
            f"{origin}: {len(groups)} samples where the index has one. "
            "Make the index again with `python -m vit_efficient.prepare index`."
        )
    members = groups[0]
    return members["__key__"], members


def parse_label(text: bytes | None, where: str) -> int:
    """Read a `.cls` member."""
    if text is None or not re.fullmatch(rb"\s*-?\d{1,9}\s*", text):
        said = "no label (a member `.cls` with the class number)" if text is None else f"label {text[:20]!r}"
        raise BadSample(f"{where}: {said}; expected an integer in ASCII")
    return int(text)
