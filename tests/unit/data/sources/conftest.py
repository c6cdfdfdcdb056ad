"""Real photographs, for archives in layouts that are too large to be had here."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photographs(shared: Callable[[str], Path]) -> list[tuple[str, bytes]]:
    """WordNet id and JPEG bytes of the first image of each of 12 classes of ImageNet, by id."""

    def first_images(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
        for member in archive:
            with tarfile.open(fileobj=archive.extractfile(member)) as class_tar:
                image = class_tar.next()
                assert image is not None
                reader = class_tar.extractfile(image)
                assert reader is not None
                yield member.name.removesuffix(".tar"), reader.read()

    with tarfile.open(shared("data/ILSVRC2012_sample_train.tar")) as archive:
        return [found for found, _ in zip(first_images(archive), range(12), strict=False)]
