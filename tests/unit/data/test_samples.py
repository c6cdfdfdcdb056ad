from __future__ import annotations

import io
import tarfile

import pytest

from vit_efficient.data.samples import BadSample, parse_sample


def span(*members: tuple[str, bytes], layout: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of these members inside a tar, without the zeros that end it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue()[:end]


@pytest.mark.parametrize("name", ["a", "folder/a", "ä", "x" * 150])
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("end", [0, 512, 10240])
def test_all_kinds_of_tar_are_read(name: str, layout: int, end: int) -> None:
    """Long names take headers of their own; the last sample's span may have the zeros of the archive's end."""
    if layout == tarfile.USTAR_FORMAT and len(name) > 100:
        name = f"{name[:60]}/{name[60:]}"
    data = span((f"{name}.JPG", b"pixels" * 200), (f"{name}.cls", b"17"), layout=layout) + bytes(end)
    sample = parse_sample(data, "shard")
    assert (sample.key, sample.image, sample.label) == (name, b"pixels" * 200, 17)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", b"x"), ("b.cls", b"1")], "2 samples where the index has one"),
        ([("a.txt", b"x"), ("a.cls", b"1")], "no image"),
        ([("a.jpg", b"x")], "no label"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "label b'cat'"),
        ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"1")], "duplicate"),
    ],
)
def test_what_is_not_a_sample_is_an_error(members: list[tuple[str, bytes]], said: str) -> None:
    with pytest.raises(BadSample, match=said):
        parse_sample(span(*members), "shard")


def test_a_span_that_ends_early_is_an_error() -> None:
    whole = span(("a.jpg", b"x" * 2000), ("a.cls", b"1"))
    with pytest.raises(BadSample):
        parse_sample(whole[:1500], "shard")
