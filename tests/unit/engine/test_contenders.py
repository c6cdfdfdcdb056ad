"""Contenders of the model benchmark: what they compute, what they weigh, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vit_efficient.engine.contenders import PEERS, Entry, build_contender, load_entry
from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import Gpu, Machine, detect
from vit_efficient.measure.models import measure_models
from vit_efficient.model.build import build_model

SMALL = (
    "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}", "model.image_size=32",
    "model.num_classes=10", "strategy.accelerator=cpu",
)  # fmt: skip
CPU = torch.device("cpu")
HOPPER = Machine((Gpu("H200", (9, 0), 140 * 2**30),), "580", 8, detect().packages)
TURING = Machine((Gpu("T4", (7, 5), 15 * 2**30),), "580", 8, detect().packages)


def quiet(text: str) -> None:
    return None


def contender(source: str, *words: str, **options):  # type: ignore[no-untyped-def]
    entry = Entry(source, words, **options)
    return build_contender(entry, load_entry(entry, SMALL, detect()), quiet)


def images(number: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_recipe_is_measured_in_deployed_form() -> None:
    """Integer weights and no float copy: about a quarter of the bytes, and answers near those of full precision."""
    plain, small = contender("fp32_sdpa"), contender("int8_sdpa")
    assert small.weight_bytes < 0.45 * plain.weight_bytes
    a, b = (each.prepare(images())(images()) for each in (plain, small))
    assert 0 < float((a - b).norm() / a.norm()) < 0.05  # of the same random weights


def test_half_precision_is_of_everything_that_is_not_quantized() -> None:
    half = contender("fp32_sdpa", "quantization.precision=bf16")
    assert half.weight_bytes == contender("fp32_sdpa").weight_bytes // 2
    assert half.prepare(images())(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_static_form_is_calibrated_on_noise_and_says_so() -> None:
    told: list[str] = []
    entry = Entry("int8_static_sdpa")
    built = build_contender(entry, load_entry(entry, SMALL, detect()), told.append)
    assert "16 random images, for its speed alone" in told[0]
    assert bool(built.prepare(images())(images()).isfinite().all())


def test_a_model_file_is_measured_as_it_ships(tmp_path: Path) -> None:
    recipe = load_entry(Entry("int8_sdpa"), SMALL, detect())
    built = build_model(recipe, 7)
    recipe.quantization.finalize(built.model)
    save_deployed(path := tmp_path / "model.safetensors", built.model, recipe, list("abcdefg"))
    entry = Entry(str(path), file=True)
    found = build_contender(entry, load_entry(entry, (), detect()), quiet)
    assert torch.equal(found.prepare(images())(images()), load_file(path).model(images()))
    assert found.name == "model.safetensors"


def test_training_steps_train() -> None:
    trained = contender("int8_sdpa", "optim.lr=0.01", "optim.warmup_epochs=0", how="training")
    step = trained.prepare(images(8))
    losses = [float(step(images(8)).detach()) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0], "the same labels every time: they are learned by heart"


def test_rows_hold_all_against_the_first() -> None:
    rows = measure_models(
        [contender("fp32_sdpa"), contender("int8_sdpa", name="ours")], (1, 4), CPU, rounds=2, seconds=0.02
    )
    assert [(row.name, row.batch) for row in rows] == [("fp32_sdpa", 1), ("ours", 1), ("fp32_sdpa", 4), ("ours", 4)]
    assert all(row.speedup == 1 for row in rows if row.name == "fp32_sdpa")
    for row in rows:
        assert row.p50 <= row.p95 <= row.p99
        assert row.batch / row.p99 <= row.images_per_second
        assert len(row.rounds) == 2
        assert row.peak_bytes is None  # a CPU's cannot be told apart from the rest of the process


def test_what_does_not_fit_leaves_the_others() -> None:
    whole = contender("fp32_sdpa")

    def full(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    large = contender("fp32_sdpa", name="large")
    large.prepare = full
    rows = measure_models([large, whole], (1,), CPU, rounds=1, seconds=0.01)
    assert rows[0].failed == "out of memory: CUDA out of memory. Tried to allocate 3 GiB"
    assert rows[0].images_per_second is None
    assert rows[1].speedup == 1


def test_every_peer_is_a_recipe_that_a_large_gpu_runs() -> None:
    for entry in PEERS:
        recipe = load_entry(entry, ("protocol=imagenet_vit_l16",), HOPPER)
        assert recipe.model.name == "vit_large_patch16_224"
        assert recipe.strategy.accelerator == "gpu"


def test_what_a_machine_cannot_run_is_refused_with_its_reason() -> None:
    with pytest.raises(RecipeError, match="bf16"):
        load_entry(Entry("fp32_sdpa", ("quantization.precision=bf16",)), (), TURING)
    with pytest.raises(UserError, match=r"no such file or run"):
        load_entry(Entry("absent.safetensors", file=True), (), detect())
    with pytest.raises(UserError, match="nothing to train"):
        contender("int4_sdpa", "quantization.lora=null", how="training")
