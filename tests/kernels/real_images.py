"""Real crops and real weights for tests on a GPU, in two files that can be carried to one that has no network.

    python tests/kernels/real_images.py ILSVRC2012_sample_train.tar images.pt

Resize of the shorter side to 256 (bicubic), centre crop of 224, JPEG of quality 92: 1,000 crops as bytes of pixels
would be 150 MB. The names' sha256 orders the images, so the first 200 are those that docs/results/ptq.md calibrates on.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VARIABLE = "VIT_EFFICIENT_TEST_DATA"
SHARED = Path(__file__).resolve().parents[3] / "shared"
WEIGHTS, IMAGES, ARCHIVE = "vit_tiny_patch16_224.safetensors", "images.pt", "data/ILSVRC2012_sample_train.tar"
CALIBRATION = 200
RESIZED, SIZE, QUALITY = 256, 224, 92


def crop(content: bytes) -> Image.Image:
    """The middle of an image, 224 pixels square, as in evaluation."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    factor = RESIZED / min(image.size)
    width, height = (max(RESIZED, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


def members(archive: Path) -> list[tuple[str, bytes]]:
    """Name and content of every image, ordered by the sha256 of the name."""
    found: list[tuple[str, bytes]] = []
    with tarfile.open(archive) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                found += [(image.name, inner.extractfile(image).read()) for image in inner]  # type: ignore[union-attr]
    return sorted(found, key=lambda one: hashlib.sha256(one[0].encode()).hexdigest())


def pack(archive: Path, out: Path) -> None:
    """Write all crops as one file: their JPEGs end to end (uint8), and where each ends (int64)."""
    encoded: list[bytes] = []
    for _, content in members(archive):
        buffer = io.BytesIO()
        crop(content).save(buffer, "JPEG", quality=QUALITY)
        encoded.append(buffer.getvalue())
    jpeg = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
    torch.save({"jpeg": jpeg, "ends": torch.tensor([len(one) for one in encoded]).cumsum(0)}, out)


def unpack(file: Path, count: int | None = None) -> Tensor:
    """The first `count` crops of a file that `pack` wrote, or that holds pixels (N, 3, 224, 224): uint8."""
    held = torch.load(file, weights_only=True)
    if isinstance(held, Tensor):
        return held[:count]
    ends = held["ends"][:count].tolist()
    parts = [held["jpeg"][start:end].numpy().tobytes() for start, end in zip([0, *ends], ends, strict=False)]
    return torch.stack([_pixels(Image.open(io.BytesIO(one))) for one in parts])


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def find() -> tuple[Path, Path] | str:
    """The weights, and the images or the archive that they come from; or, in words, why there are none."""
    if folder := os.environ.get(VARIABLE):
        weights, images = Path(folder) / WEIGHTS, Path(folder) / IMAGES
        absent = [str(path) for path in (weights, images) if not path.exists()]
        return f"{VARIABLE} names a folder without {', '.join(absent)}" if absent else (weights, images)
    weights, images = SHARED / "weights" / WEIGHTS, SHARED / ARCHIVE
    if weights.exists() and images.exists():
        return weights, images
    return f"needs {WEIGHTS} and {IMAGES} in a folder that {VARIABLE} names, or the folder `shared` beside the checkout"


def load(images: Path, count: int, calibration: int) -> tuple[Tensor, Tensor]:
    """Crops to calibrate on, the first, and to judge with, those behind the 200: each (N, 3, 224, 224), normalised."""
    if images.suffix == ".tar":
        named = members(images)[: CALIBRATION + count]
        pixels = torch.stack([_pixels(crop(content)) for _, content in named])
    else:
        pixels = unpack(images, CALIBRATION + count)
    made = pixels.to(torch.float32).div_(127.5).sub_(1)  # mean and deviation 0.5, as the model was trained
    return made[: min(calibration, CALIBRATION)], made[CALIBRATION:]


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
