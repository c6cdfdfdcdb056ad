"""Images to calibrate on: which, in what form, and what is said where there are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from vit_efficient.data.cache import ensure_digits
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.transforms import EvalTransform
from vit_efficient.engine.calibration import BATCH, calibrate_model, calibration_batches, restore, training_device
from vit_efficient.engine.setup import build_data
from vit_efficient.engine.subject import from_weights
from vit_efficient.errors import CheckpointError, DataError, UserError
from vit_efficient.machine import Machine
from vit_efficient.model.build import build_model
from vit_efficient.quantization.calibrate import uncalibrated
from vit_efficient.quantization.int8_layers import Int8Linear
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

IMAGE = ImageSpec(32, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
CPU = torch.device("cpu")
KWARGS = "model.kwargs={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 3}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_digits(tmp_path_factory.mktemp("cache"))


def made(digits: Path, *words: str) -> tuple[Recipe, ViTDataModule]:
    words = (KWARGS, f"data.shards={digits}", "strategy.accelerator=cpu", *words)
    recipe, _ = resolve(load_recipe("int8_sdpa", words).recipe, Machine(cores=2))
    return recipe, build_data(recipe)


def images_of(digits: Path, samples: int, *words: str) -> tuple[torch.Tensor, torch.Tensor]:
    recipe, data = made(digits, *words)
    batches, labels = calibration_batches(recipe, data, IMAGE, samples, CPU)
    assert max(map(len, batches)) <= BATCH
    return torch.cat(batches), labels


def test_training_images_in_the_form_of_evaluation(digits: Path) -> None:
    """Pixel for pixel: evaluation's transform and normalisation, of samples that are in the training shards."""
    images, labels = images_of(digits, 100)
    assert images.shape == (100, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.shape == (100,)
    recipe, data = made(digits)
    stream = data.calibration_stream(IMAGE, 100, BATCH)
    shards, indices = stream.plan.locate(0, stream.plan.piece(0, BATCH, stream.layout.piece(0)))
    transform, normalise = EvalTransform(IMAGE, recipe.data.eval_resize), DeviceTransforms(IMAGE, 10).normalise
    for row in (0, 17):
        sample = stream.reader.read(int(shards[row]), int(indices[row]))
        pixels = torch.from_numpy(transform(sample.image).image).permute(2, 0, 1)[None]
        assert torch.equal(normalise(pixels)[0], images[row])
        assert labels[row] == sample.label


def test_seed_and_manifest_alone_decide_which(digits: Path) -> None:
    """Not batch sizes, workers, streams or hardware; so every rank has the same ones."""
    first = images_of(digits, 100)
    again = images_of(digits, 100, "data.batch_size=32", "data.streams=3", "strategy.micro_batch=8", "data.workers=2")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = images_of(digits, 100, "run.seed=1")
    assert not torch.equal(first[0], other[0])


def test_every_image_once_where_more_are_wanted_than_there_are(digits: Path) -> None:
    images, labels = images_of(digits, 10**9)
    _, data = made(digits)
    assert len(images) == data.train_images == 1437
    assert labels.bincount().tolist() == data.class_counts


def test_progress_is_reported(digits: Path) -> None:
    recipe, data = made(digits)
    seen: list[tuple[int, int]] = []
    calibration_batches(recipe, data, IMAGE, 100, CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(64, 100), (100, 100)]


def test_no_training_shards(digits: Path) -> None:
    recipe, _ = made(digits, f"data.eval_shards={digits / 'val'}")
    only = ViTDataModule(recipe.data.model_copy(update={"shards": None}), recipe.augment)
    with pytest.raises(UserError, match=r"data\.shards is unset(.|\n)*vit_efficient\.quantize"):
        calibration_batches(recipe, only, IMAGE, 100, CPU)


def damaged(digits: Path, folder: Path, share: float) -> Path:
    """A copy of the digits with bytes in the first part of each training shard altered; sizes stay."""
    copy = folder / "digits"
    shutil.copytree(digits, copy)
    for shard in (copy / "train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        end = int(share * len(content))
        content[:end] = bytes(255 - byte for byte in content[:end])
        shard.write_bytes(content)
    return copy


def test_unreadable_images(digits: Path, tmp_path: Path) -> None:
    bad = damaged(digits, tmp_path, 0.3)
    with pytest.raises(DataError, match="prepare this shard again"):
        images_of(bad, 100)
    images, labels = images_of(bad, 100, "data.on_error=skip")
    assert 40 < len(images) == len(labels) < 100
    recipe, data = made(damaged(digits, tmp_path / "all", 1.0), "data.on_error=skip")
    with pytest.raises(UserError, match="no training image to calibrate on"):
        calibration_batches(recipe, data, IMAGE, 100, CPU)


# -- models -----------------------------------------------------------------------------------------------------------

STATIC = ("quantization.activations=static", "quantization.calibration={samples: 32, importance: false}")


def test_model_is_calibrated_and_its_steps_are_then_learned(digits: Path) -> None:
    recipe, data = made(digits, *STATIC, "quantization.learn_scales=true")
    built = build_model(recipe, data.num_classes)
    assert list(uncalibrated(built.model))
    lines = calibrate_model(recipe, built.model, data, built.image, Console(quiet=True))
    assert "calibrated on 32 images" in lines[0]
    assert not list(uncalibrated(built.model))
    layers = [m for m in built.model.modules() if isinstance(m, Int8Linear)]
    assert layers
    for layer in layers:
        assert layer.input_scale is None
        assert layer.log_input_scale is not None
        assert layer.log_weight_scale is not None


@pytest.mark.parametrize("attention", ["none", "static"])
def test_attention_that_wants_half_precision(digits: Path, attention: str) -> None:
    """Calibration is in float32, so SDPA stands in; the model has its own attention back afterwards."""
    recipe, data = made(digits, *STATIC, "attention=flash2", f"quantization.attention={attention}")
    built = build_model(recipe, data.num_classes)
    calibrate_model(recipe, built.model, data, built.image, Console(quiet=True))
    assert not list(uncalibrated(built.model))
    backend = built.model.blocks[0].attn.backend
    assert (backend.name if attention == "none" else backend.plain.name) == "flash2"


def test_two_ranks_calibrate_alike(digits: Path) -> None:
    states = []
    for _ in range(2):
        recipe, data = made(digits, *STATIC)
        torch.manual_seed(recipe.run.seed)
        built = build_model(recipe, data.num_classes)
        torch.rand(len(states) + 1)  # what a rank drew before does not matter
        calibrate_model(recipe, built.model, data, built.image, Console(quiet=True))
        states.append(built.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_checkpoint_of_another_model_is_not_restored(digits: Path) -> None:
    recipe, data = made(digits, *STATIC)
    model = build_model(recipe, data.num_classes).model
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if "head" not in name}
    with pytest.raises(CheckpointError, match=r"x\.ckpt does not fit"):
        restore(model, {"state_dict": state}, "x.ckpt")


def test_weights_are_calibrated_to_be_evaluated(digits: Path, tmp_path: Path) -> None:
    plain, data = made(digits, "quantization=none")
    save_file(build_model(plain, data.num_classes).model.state_dict(), tmp_path / "w.safetensors")
    recipe, data = made(digits, *STATIC, f"model.weights={tmp_path / 'w.safetensors'}")
    subject = from_weights(recipe, data.num_classes, data)
    assert subject.model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert any("calibrated on 32 images" in line for line in subject.lines)
    with pytest.raises(UserError, match=r"vit_efficient\.quantize"):
        from_weights(recipe, data.num_classes)


def test_training_device(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = made(digits)
    assert training_device(recipe) == CPU
    strategy = recipe.strategy.model_copy(update={"accelerator": "gpu"})
    on_gpu = recipe.model_copy(update={"strategy": strategy})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert training_device(on_gpu) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert training_device(on_gpu) == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process is shown its own
    assert training_device(on_gpu) == torch.device("cuda", 0)
