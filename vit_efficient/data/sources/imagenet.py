"""ImageNet-1k, from the official archives, which are read in place and never unpacked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Literal

from vit_efficient.config import Config
from vit_efficient.data.sources import imagenet_labels
from vit_efficient.data.sources.base import Inputs, Source
from vit_efficient.data.sources.classes import some
from vit_efficient.data.sources.imagenet_tars import Listing, read_listing
from vit_efficient.errors import DataError

_COMMAND = (
    "python -m vit_efficient.prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar "
    "--devkit ILSVRC2012_devkit_t12.tar.gz --out DIR"
)


class ImagenetConfig(Config):
    """ImageNet-1k, from the official archives."""

    name: Literal["imagenet"] = "imagenet"

    def open(self, inputs: Inputs) -> Source:
        """A tar of class tars for training; for validation the flat tar with its labels, or tars of class tars.

        Classes are named by their WordNet id and numbered in its order, as everywhere. Positions of the images come
        from the headers of the archives; images are read in place.
        """
        inputs.only(self.name, "train", "val", "devkit", "labels")
        if inputs.train is None:
            raise DataError(f"imagenet needs its archives: `{_COMMAND}`. (--val and --devkit may be left out.)")
        training = read_listing((inputs.train,))
        if training.flat:
            raise DataError(
                f"{inputs.train}: {training.names[0]} is not a class tar; the official training archive is a "
                "tar of tars, n01440764.tar and so on."
            )
        classes = tuple(sorted(set(training.wnids)))
        splits = {"train": training.split(training.wnids, classes)}
        if inputs.val:
            validation = read_listing(inputs.val)
            splits["val"] = validation.split(_validation_wnids(validation, inputs, set(classes)), classes)
        elif inputs.devkit or inputs.labels:
            raise DataError("--devkit and --labels are of validation images: name their archive with --val.")
        identity = {name: {"images": split.labels.size, "listing": split.digest()} for name, split in splits.items()}
        return Source(self.name, classes, splits, identity)


def _validation_wnids(images: Listing, inputs: Inputs, known: Container[str]) -> list[str]:
    """Class of each image, from whatever gives it."""
    given = inputs.devkit or inputs.labels
    if not images.flat:
        if given:
            raise DataError(
                f"{images.where} holds class tars, which say what its images are: leave out --devkit and --labels."
            )
        wnids, origin = images.wnids, images.where
    elif given is None:
        raise DataError(
            f"{images.where} does not say what its images are. Name the development kit "
            "(--devkit ILSVRC2012_devkit_t12.tar.gz), or a table (--labels LOC_val_solution.csv)."
        )
    elif inputs.devkit and inputs.labels:
        raise DataError("--devkit and --labels both say what the validation images are: name one of them.")
    else:
        read = imagenet_labels.from_devkit if inputs.devkit else imagenet_labels.from_table
        wnids, origin = _matched(images, read(given), str(given)), str(given)
    foreign = sorted({wnid for wnid in wnids if wnid not in known})
    if foreign:
        raise DataError(f"{origin} has class {some(foreign)}, which the training archive does not have.")
    return wnids


def _matched(images: Listing, labels: dict[str, str], origin: str) -> list[str]:
    """Class of each image; every image has one, and every label its image."""
    names = Counter(images.names)
    counts = f"{len(images.names):,} images in {images.where}, {len(labels):,} labels in {origin}"
    if len(names) < len(images.names):
        raise DataError(f"{images.where} has {names.most_common(1)[0][0]} twice.")
    for what, missing in (
        ("has no label", [name for name in images.names if name not in labels]),
        ("has a label and no image", [name for name in labels if name not in names]),
    ):
        if missing:
            raise DataError(f"{counts}: {some(missing)} {what}. Both must be of the same images.")
    return [labels[name] for name in images.names]
