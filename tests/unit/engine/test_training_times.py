"""`benchmark training`: what it asks of its processes, what it makes of their answers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vit_efficient.engine import training_times
from vit_efficient.engine.entries import Entry
from vit_efficient.engine.timed import StepClock
from vit_efficient.engine.timed_process import Question
from vit_efficient.engine.training_times import main, prepare, run_processes
from vit_efficient.errors import UserError
from vit_efficient.machine import Gpu, Launch, Machine, detect

SMALL = ("model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}",)
CPU = (*SMALL, "strategy.accelerator=cpu")
LARGE = ("protocol=imagenet_vit_l16", "quantization.precision=bf16", "strategy.compile=true")
HOPPER = Machine((Gpu("NVIDIA H200", (9, 0), 140 * 2**30),) * 2, "580", 8, detect().packages)


def test_the_batch_is_each_devices() -> None:
    two = prepare(Entry("fp32_sdpa", ("strategy=ddp", "strategy.devices=2")), CPU, 24, detect())
    assert two.recipe.data.batch_size == 48
    assert two.recipe.strategy.micro_batch == 24
    assert (two.row.world, two.row.batch, two.row.how) == (2, 24, "ddp on 2, fp32, eager")
    parts = prepare(Entry("fp32_sdpa", ("strategy=single", "strategy.micro_batch=8")), CPU, 24, detect())
    assert parts.row.micro_batch == 8
    assert parts.row.how == "single, fp32, eager, 3 x 8"


def test_what_is_known_before_it_runs() -> None:
    """On a GPU of a kind that is known: memory, and a device's images a second, both within a quarter of what was
    measured there (docs/scaling.md: 25.3 GiB and 1,118 images/s with one, 1,006 with two)."""
    one, two = (
        prepare(Entry("fp32_sdpa", words), LARGE, 128, HOPPER).row
        for words in (("strategy=single",), ("strategy=ddp", "strategy.devices=2"))
    )
    assert one.estimated == pytest.approx(25.3 * 2**30, rel=0.25)
    assert one.predicted == pytest.approx(1118, rel=0.25)
    assert two.predicted == pytest.approx(1006, rel=0.25)


def test_of_a_gpu_that_is_not_known_there_is_memory_alone() -> None:
    unknown = Machine((Gpu("GPU 9000", (9, 0), 140 * 2**30),), "580", 8, HOPPER.packages)
    row = prepare(Entry("int8_sdpa", ("strategy=single",)), SMALL, 16, unknown).row
    assert row.predicted is None
    assert row.estimated is not None
    torchao = ("quantization=torchao", "quantization.scheme=int8_dynamic_activation_int8_weight")
    with_values = prepare(Entry("fp32_sdpa", ("strategy=single", *torchao)), SMALL, 16, HOPPER).row
    assert with_values.estimated is None, "its layers look at values"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=single", "strategy.micro_batch=7"), "strategy.micro_batch 7 does not divide --batch 24"),
        (("strategy=ddp", "strategy.nodes=2"), "strategy.nodes: is 2, and this command starts"),
        (("strategy=absent",), "strategy"),
        (("data.batch_size=8",), "data.batch_size=8 has no place here: --batch says"),
        (("data.workers=2",), "data.workers=2 has no place here"),
    ],
)
def test_refused_before_anything_runs(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare(Entry("fp32_sdpa", words), CPU, 24, detect())


def test_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Machine((), "", 2, {}, Launch("torchrun", 2))
    monkeypatch.setattr(training_times, "detect", lambda: launched)
    with pytest.raises(UserError, match="torchrun has started several"):
        main(["--recipe", "fp32_sdpa"], SimpleNamespace())  # type: ignore[arg-type]


def test_memory_is_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_times, "detect", lambda: Machine())
    with pytest.raises(UserError, match="there is no GPU here"):
        main(["--recipe", "fp32_sdpa", "--memory", "8"], SimpleNamespace())  # type: ignore[arg-type]


def test_a_run_that_dies_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it printed last is what there is to say."""
    monkeypatch.setattr(training_times, "MODULE", "this")  # a module of Python's that prints a poem
    said = run_processes(Question("fp32_sdpa", (), 1, 1), 1)
    assert isinstance(said, str)
    assert said.startswith("the run ended with exit code 0:")
    assert said.endswith("let's do more of those!")


OTHERS = """
import json, subprocess, sys, time
from pathlib import Path
late = (
    "import time, sys; time.sleep(1); open(sys.argv[1], 'w').write('{\\"loss\\": 2}'); "
    "time.sleep(float(sys.argv[2]))"
)
question = Path(sys.argv[1])
words = [str(question.with_name("answer-1.json")), "%d"]
subprocess.Popen([sys.executable, "-c", late, *words])
question.with_name("answer-0.json").write_text(json.dumps({"loss": 1}))
"""


def test_other_ranks_may_end_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their answers are waited for."""
    (tmp_path / "others.py").write_text(OTHERS % 0)
    monkeypatch.setattr(training_times, "MODULE", "others")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_processes(Question("a", (), 1, 1), 2) == [{"loss": 1}, {"loss": 2}]


def test_nobody_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank that does not end is ended, and is no zombie's keeper."""
    (tmp_path / "others.py").write_text(OTHERS % 1000)
    monkeypatch.setattr(training_times, "MODULE", "others")
    monkeypatch.setattr(training_times, "LINGER", 3.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    groups: list[int] = []
    real = training_times._end
    monkeypatch.setattr(training_times, "_end", lambda process: (groups.append(process.pid), real(process)))
    assert run_processes(Question("a", (), 1, 1), 2) == [{"loss": 1}, {"loss": 2}]
    assert not training_times._living(groups[0])


def test_words_of_one_recipe() -> None:
    entry = Entry.of(" int8_sdpa  strategy=ddp model.kwargs={depth: 2, more: [1, 2]} a=1 ")
    assert entry == Entry("int8_sdpa", ("strategy=ddp", "model.kwargs={depth: 2, more: [1, 2]}", "a=1"))


def test_questions_come_back(tmp_path: Path) -> None:
    question = Question("fp32_sdpa", ("a=1", "b=[2, 3]"), 5, 2, 8e9)
    question.write(tmp_path / "q.json")
    assert Question.read(tmp_path / "q.json") == question
    assert json.loads((tmp_path / "q.json").read_text())["steps"] == 5


def test_the_clock_counts_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not micro-batches; it begins when the last step of the warm-up ends, and asks to stop at the last."""
    now = iter(range(100))
    monkeypatch.setattr("vit_efficient.engine.timed.time.perf_counter", lambda: float(next(now)) ** 2)
    clock, trainer = StepClock(2, warm_up=2, steps=3), SimpleNamespace(should_stop=False)
    module: Any = SimpleNamespace(device=torch.device("cpu"), last_loss=torch.tensor(0.5))
    for number in range(10):
        assert not trainer.should_stop
        clock.on_train_batch_end(trainer, module, None, None, number)  # type: ignore[arg-type]
    assert trainer.should_stop
    assert clock.seconds == (1.0, 3.0, 5.0)
    assert clock.loss == 0.5
    assert clock.reserved is None
