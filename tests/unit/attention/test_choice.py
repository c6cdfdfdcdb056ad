"""The choice of an attention kernel: measured once for each kind of call, by one process, and kept."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vit_efficient.attention import choice, reference
from vit_efficient.attention.choice import FUSED, Call, Times, chosen, measure, operands
from vit_efficient.attention.sdpa import LARGEST_BATCH, SdpaConfig, batch_of

CALL = Call(200, 16, 197, 197, 64, 64, "bfloat16")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path / "cache"))


def timing(**times: float):  # type: ignore[no-untyped-def]
    """A clock that says these times, and is counted."""
    asked: list[Call] = []

    def run(call: Call, device: torch.device) -> Times:
        asked.append(call)
        return times

    run.asked = asked  # type: ignore[attr-defined]
    return run


def test_the_fastest_is_taken_and_measured_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vit_efficient")
    clock = timing(flash=1.5, cudnn=1.0, efficient=3.0)
    for batch in (200, 64, 33, 1000):  # one kind: the GPU is full
        assert chosen(replace(CALL, batch=batch), CPU, "GPU 1", clock, tmp_path) == "cudnn"
    assert [call.batch for call in clock.asked] == [64]
    assert caplog.messages[0].endswith("measured on GPU 1: cudnn 1.000 ms, flash 1.500 ms, efficient 3.000 ms")
    assert len(caplog.messages) == 2
    assert list(choice.choices().values()) == ["cudnn"]


def test_what_another_process_measured_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(CALL, CPU, "GPU 1", timing(flash=1.0, cudnn=2.0), tmp_path)
    monkeypatch.setattr(choice, "_known", {})
    clock = timing(flash=9.0, cudnn=1.0)
    assert chosen(CALL, CPU, "GPU 1", clock, tmp_path) == "flash"
    assert not clock.asked


@pytest.mark.parametrize(
    "other",
    [
        replace(CALL, training=True),
        replace(CALL, dropout=True),
        replace(CALL, mask="bool"),
        replace(CALL, dtype="float16"),
        replace(CALL, queries=577, keys=577),
        replace(CALL, batch=1),
        replace(CALL, keys=196),
    ],
    ids=str,
)
def test_another_kind_of_call_is_measured_again(other: Call, tmp_path: Path) -> None:
    clock = timing(flash=1.0)
    for call in (CALL, other):
        chosen(call, CPU, "GPU 1", clock, tmp_path)
    assert len(clock.asked) == 2


def test_another_gpu_or_version_is_measured_again(tmp_path: Path) -> None:
    clock = timing(flash=1.0)
    for gpu in ("H200 torch 2.11", "H200 torch 2.15", "A100 torch 2.11"):
        chosen(CALL, CPU, gpu, clock, tmp_path)
    assert len(clock.asked) == 3


def test_no_fused_kernel_means_the_plain_one(tmp_path: Path) -> None:
    assert chosen(CALL, CPU, "GPU 1", timing(), tmp_path) == "math"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"warp": 1}}', ""])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "GPU-1.json").write_text(content)
    assert chosen(CALL, CPU, "GPU 1", timing(cudnn=1.0), tmp_path) == "cudnn"
    assert json.loads((tmp_path / "GPU-1.json").read_text())[str(CALL.kind)] == {"cudnn": 1.0}


def _race(folder: Path, name: str, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    def slow(call: Call, device: torch.device) -> Times:
        results.put(("measured", name))
        time.sleep(0.5)
        return {name: 1.0}

    results.put(("chose", chosen(CALL, CPU, "GPU 1", slow, folder)))


def test_processes_agree_although_each_would_measure_otherwise(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, name, results)) for name in FUSED]
    for racer in racers:
        racer.start()
    said = [results.get(timeout=60) for _ in range(4)]
    for racer in racers:
        racer.join(60)
    measured = [name for what, name in said if what == "measured"]
    assert len(measured) == 1
    assert [name for what, name in said if what == "chose"] == measured * 3


def test_nothing_is_measured_on_a_cpu(tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    SdpaConfig().build().attend(q, k, v, scale=1.0)
    assert not (tmp_path / "cache").exists()
    assert not choice.choices()


@pytest.mark.parametrize("training", [False, True])
def test_self_attention_is_measured_on_views_of_one_projection(training: bool) -> None:
    """Strides decide what kernels may read at once, cuDNN's above all: so the layout is that of a model's qkv."""
    call = Call(2, 3, 5, 5, 8, 8, "bfloat16", mask="bool", training=training)
    q, k, v, mask = operands(call, CPU)
    packed = torch.empty(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    for number, (made, wanted) in enumerate(zip((q, k, v), packed, strict=True)):
        assert (made.shape, made.stride()) == (wanted.shape, wanted.stride())
        assert made.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        assert made.storage_offset() == number * 3 * 8
        assert made.requires_grad == training
    assert mask.shape == (5, 5)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if training:
        assert all(bool(grad.any()) for grad in torch.autograd.grad(y, (q, k, v), y))


def test_cross_attention_is_measured_on_projections_of_its_own() -> None:
    q, k, v = operands(Call(2, 3, 1, 5, 8, 4, "float32"), CPU)
    assert [tuple(x.shape) for x in (q, k, v)] == [(2, 3, 1, 8), (2, 3, 5, 8), (2, 3, 5, 4)]
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))


@pytest.mark.parametrize(
    ("dynamic", "batches"),
    [(False, [1, 3, 200]), (True, [LARGEST_BATCH] * 3), (None, [1, LARGEST_BATCH, LARGEST_BATCH])],
)
def test_a_program_for_one_batch_gets_the_kernel_for_that_batch(dynamic: bool | None, batches: list[int]) -> None:
    """What is traced: the real batch where it is a constant of the program, the largest where the program serves any
    (PyTorch makes the batch free when it changes for the first time; 0 and 1 it never does)."""
    torch._dynamo.reset()
    found = torch.compile(lambda x: x.new_zeros(()) + batch_of(x), backend="eager", fullgraph=True, dynamic=dynamic)
    given = (1, 3, 200) if dynamic is not True else (2, 3, 200)
    assert [int(found(torch.ones(n, 2))) for n in given] == batches


@pytest.mark.gpu
def test_a_compiled_call_is_measured_at_its_batch() -> None:
    qkv = torch.randn(1, 197, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    torch._dynamo.reset()
    torch.compile(SdpaConfig().build().attend, fullgraph=True, dynamic=False)(q, k, v, scale=0.125)
    assert any(" B=1 " in key for key in choice.choices())


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_measured_on_a_gpu(training: bool) -> None:
    call = Call(8, 4, 197, 197, 64, 64, "bfloat16", training=training)
    times = measure(call, torch.device("cuda", 0))
    assert times
    assert all(0 < value < 1000 for value in times.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_choice_attends_as_the_definition(compiled: bool) -> None:
    qkv = torch.randn(3, 4, 197, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.transpose(2, 3).unbind(0)
    attend = SdpaConfig().build().attend
    run = torch.compile(attend, fullgraph=True) if compiled else attend
    y = run(q, k, v, scale=0.125)
    wanted = reference.attend(q.double(), k.double(), v.double(), scale=0.125)
    assert (y - wanted).norm() < 1e-2 * wanted.norm()
    assert set(choice.choices().values()) <= set(FUSED)
    assert choice.choices()
