"""Post-training quantization of the real ViT-Ti on real images, by the command that users run.

Calibrated on the 200 shared images whose names have the smallest sha256, judged on the other 800; what was measured,
and how far it is from what plain rounding gives, is in docs/results/ptq.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vit_efficient.data.preparation import prepare_source
from vit_efficient.data.sources.base import Source
from vit_efficient.data.sources.csv_list import Files

pytestmark = pytest.mark.slow
Command = Callable[..., str]
CALIBRATION = 200

# name, overrides, least agreement, largest KL divergence: what was measured, less what another machine may differ by.
SCHEMES = {
    "static": (("quantization=int8", "quantization.activations=static"), 0.96, 0.010),
    "hybrid": (("quantization=int8", "quantization.activations=hybrid"), 0.965, 0.008),
    "int4": (("quantization=int4", "quantization.type=int", "quantization.group=64"), 0.915, 0.06),
}


@pytest.fixture(scope="module")
def shards(shared_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` with the calibration images, `val` with the others."""
    folder = tmp_path_factory.mktemp("ptq")
    rows: list[tuple[str, str]] = []
    with tarfile.open(shared_archive) as outer:
        for member in outer.getmembers():
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(member).read())) as inner:  # type: ignore[union-attr]
                for image in inner.getmembers():
                    (folder / image.name).write_bytes(inner.extractfile(image).read())  # type: ignore[union-attr]
                    rows.append((image.name, member.name.removesuffix(".tar")))
    rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
    classes = sorted({label for _, label in rows})
    splits = {}
    for name, part in (("train", rows[:CALIBRATION]), ("val", rows[CALIBRATION:])):
        labels = np.asarray([classes.index(label) for _, label in part], np.int64)
        splits[name] = Files(folder, [file for file, _ in part], labels)
    prepare_source(Source("csv", classes, splits, {"images": len(rows)}), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def shared_archive(request: pytest.FixtureRequest) -> Path:
    shared: Callable[[str], Path] = request.getfixturevalue("shared")
    return shared("data/ILSVRC2012_sample_train.tar")


def quantize(command: Command, folder: Path, weights: Path, shards: Path, name: str, *words: str) -> dict[str, float]:
    command(
        "quantize", "--recipe", "int8_sdpa", "protocol=imagenet_vit_l16", "model.name=vit_tiny_patch16_224",
        f"model.weights={weights}", f"data.shards={shards}", "data.eval_resize=256", "data.eval_batch_size=100",
        "data.decoder=exact", "data.workers=0", "strategy.accelerator=cpu", "quantization.precision=fp32",
        *words, "--out", f"{name}.safetensors", "--output", f"{name}.json",
    )  # fmt: skip
    found: dict[str, float] = json.loads((folder / f"{name}.json").read_text())
    print(
        name, {key: found[key] for key in ("agreement", "kl", "snr_db", "top1_drop", "top1_drop_interval", "seconds")}
    )
    return found


@pytest.mark.parametrize("name", ["static", pytest.param("hybrid", marks=pytest.mark.long), "int4"])
def test_agreement_with_full_precision(
    name: str, command: Command, tmp_path: Path, shards: Path, shared: Callable[[str], Path]
) -> None:
    words, agreement, divergence = SCHEMES[name]
    found = quantize(command, tmp_path, shared("weights/vit_tiny_patch16_224.safetensors"), shards, name, *words)
    assert found["samples"] == 800
    assert found["top1_reference"] == pytest.approx(0.8225, abs=0.004)
    assert found["agreement"] >= agreement
    assert found["kl"] <= divergence
