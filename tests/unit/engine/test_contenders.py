"""Contenders of the model benchmark: what they compute, what they weigh, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vit_efficient.engine import contenders
from vit_efficient.engine.contenders import build_contender, build_contenders, load_entry
from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.engine.entries import PEERS, Entry, check_mode
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import Gpu, Machine, detect
from vit_efficient.measure.models import Absent, Contender, footprint, measure_models
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


def test_mlps_are_fused_in_unquantized_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and not in somebody else's model."""
    fused: list[nn.Module] = []
    monkeypatch.setattr(contenders, "fuse_mlps", fused.append)
    half = ("quantization.precision=bf16",)
    for how in ("eager", "compiled", "graph", "compiled-graph"):
        contender("fp32_sdpa", *half, how=how)
    assert len(fused) == 4
    contender("fp32_sdpa")
    contender("fp32_sdpa", *half, stock=True)
    contender("int8_sdpa", *half)
    contender("fp32_sdpa", *half, how="training")
    assert len(fused) == 4


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
    kept: list[int] = []
    both = [contender("fp32_sdpa"), contender("int8_sdpa", name="ours")]
    rows = measure_models(both, (1, 4), CPU, rounds=2, seconds=0.02, keep=lambda rows: kept.append(len(rows)))
    assert kept == [2, 4], "rows are given as they come"
    assert [(row.name, row.batch) for row in rows] == [("fp32_sdpa", 1), ("ours", 1), ("fp32_sdpa", 4), ("ours", 4)]
    assert all(row.speedup == 1 for row in rows if row.name == "fp32_sdpa")
    for row in rows:
        assert row.p50 <= row.p95 <= row.p99
        assert row.batch / row.p99 <= row.images_per_second
        assert len(row.rounds) == 2
        assert row.peak_bytes is None  # a CPU's cannot be told apart from the rest of the process


def failing(error: Exception, after: int = 0) -> Contender:
    """A contender whose step raises after some calls."""
    calls = []

    def step(images: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) > after:
            raise error

    return Contender("broken", "eager", torch.float32, 32, 0, lambda images: step, words=["broken"])


def test_what_does_not_fit_leaves_the_others() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
    rows = measure_models([failing(error), contender("fp32_sdpa")], (1,), CPU, rounds=1, seconds=0.01)
    assert rows[0].failed == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert rows[0].images_per_second is None
    assert rows[1].speedup == 1


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (UserError("not here"), 0),  # while it is prepared
        (ImportError("built wrong"), 1),
        (RuntimeError("no such kernel"), 2),  # in its turn
        (RuntimeError("no such kernel"), 6),
    ],
)
def test_one_that_breaks_leaves_the_others(error: Exception, after: int) -> None:
    fine = Contender("fine", "eager", torch.float32, 32, 0, lambda images: torch.sum)
    rows = measure_models([fine, failing(error, after)], (1,), CPU, rounds=1, seconds=0.01)
    assert rows[1].failed == f"{type(error).__name__}: {error}"
    assert rows[0].failed is None
    assert rows[0].images_per_second


def test_a_device_that_does_nothing_any_more_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_efficient.measure.models.works", lambda device: False)
    for after in (0, 2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            measure_models([failing(RuntimeError("illegal memory access"), after)], (1,), CPU, seconds=0.01)


def test_what_is_no_error_of_a_contender_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        measure_models([failing(ZeroDivisionError())], (1,), CPU, seconds=0.01)


def test_one_that_cannot_be_built_leaves_the_others() -> None:
    entries = [Entry("int4_sdpa", ("quantization.lora=null",), how="training"), Entry("fp32_sdpa", how="training")]
    told: list[str] = []
    built = build_contenders([(entry, load_entry(entry, SMALL, detect())) for entry in entries], told.append)
    assert isinstance(built[0], Absent)
    assert "leaves nothing to train" in built[0].failed
    assert built[0].failed.startswith("UserError: ")
    assert any("could not be built" in line for line in told)
    rows = measure_models(built, (1,), CPU, rounds=1, seconds=0.01)
    assert [(row.failed is None, row.weight_bytes > 0) for row in rows] == [(False, False), (True, True)]
    assert rows[0].dtype in ("float32", "bfloat16")


def test_a_compile_mode_reaches_the_compiler_and_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: told.append(mode) or model)
    hows = ("eager", "compiled", "compiled-graph")
    built = [contender("fp32_sdpa", how=how, mode="max-autotune") for how in hows]
    assert told == ["max-autotune", "max-autotune-no-cudagraphs"], "captured whole, it has no graphs of its own"
    assert [one.compile_mode for one in built] == [None, *told]
    row = measure_models(built[1:2], (1,), CPU, rounds=1, seconds=0.01)[0]
    assert row.plain()["compile_mode"] == "max-autotune"
    assert contender("fp32_sdpa", how="compiled").compile_mode is None


def test_a_compile_mode_without_anybody_compiled_is_refused() -> None:
    with pytest.raises(UserError, match=r"--compile-mode best: torch\.compile has default, reduce-overhead"):
        check_mode("best", [Entry("fp32_sdpa", how="compiled")])
    with pytest.raises(UserError, match="none of these is"):
        check_mode("max-autotune", [Entry("fp32_sdpa")])


def test_a_graph_keeps_what_it_has_reserved() -> None:
    """A replay allocates nothing: by allocations alone a graph would weigh as much as its weights and images."""
    assert footprint(weights=100, allocated=50, reserved=10) == (150, 110)
    assert footprint(weights=100, allocated=5, reserved=70) == (170, 170)
    assert footprint(weights=100, allocated=5, reserved=-20) == (105, 100)


@pytest.mark.gpu
def test_memory_of_a_graph_on_a_gpu() -> None:
    """A captured model needs what the eager one does, and keeps it."""
    words = ("quantization.precision=fp16",)
    on_gpu = ["strategy.accelerator=gpu", *(word for word in SMALL if not word.startswith("strategy.accelerator"))]
    entries = [Entry("fp32_sdpa", words, how=how) for how in ("eager", "graph")]
    built = build_contenders([(entry, load_entry(entry, on_gpu, detect())) for entry in entries], quiet)
    eager, graph = measure_models(built, (256,), torch.device("cuda"), rounds=2, seconds=0.05)
    assert eager.steady_bytes <= eager.peak_bytes
    assert graph.steady_bytes == graph.peak_bytes
    assert graph.peak_bytes > 0.9 * eager.peak_bytes
    assert graph.steady_bytes > 1.2 * eager.weight_bytes


POISONED = """
import torch
from vit_efficient.measure.models import Contender, measure_models

def step(images):
    return torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]

broken = Contender("broken", "eager", torch.float32, 32, 0, lambda images: step)
try:
    measure_models([broken], (1,), torch.device("cuda"))
except RuntimeError:
    print("ended")
"""


@pytest.mark.gpu
def test_a_lost_context_ends_the_run_on_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", POISONED], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1:] == ["ended"], done.stderr


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
