"""Names of runs: one folder for all processes of a run, and none that another run has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vit_efficient.engine.rundir import find_unfinished, locate, new_path, stamp
from vit_efficient.errors import CheckpointError
from vit_efficient.machine import process_started
from vit_efficient.recipe.load import dump_recipe, load_recipe

LAUNCHERS = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "VIT_EFFICIENT_STAMP", "VIT_EFFICIENT_RUN",
)  # fmt: skip
ELASTIC = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
TASK = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that nobody has started together with others, in a folder of its own."""
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")  # so that what the code itself sets is undone too
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def started_by(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_lightning_starts_takes_the_folder_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks when the first has made the folder; without that, it would take the next name."""
    first = new_path("v", "p")
    first.mkdir(parents=True)
    started_by(monkeypatch, LOCAL_RANK="1")
    assert new_path("v", "p") == first
    monkeypatch.delenv("LOCAL_RANK")
    assert new_path("v", "p") == first.with_name(f"{first.name}-2"), "another run of the same second"


@pytest.mark.parametrize("environment", [TASK, {**ELASTIC, "TORCHELASTIC_RUN_ID": "study"}], ids=["srun", "torchrun"])
def test_a_late_rank_takes_the_name_that_the_first_took(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    started_by(monkeypatch, **environment)
    first = new_path("v", "p")
    first.mkdir(parents=True)
    started_by(monkeypatch, RANK="1")
    assert new_path("v", "p") == first


def test_what_processes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, **TASK)
    assert stamp() == "17"
    started_by(monkeypatch, SLURM_STEP_ID="3")
    assert stamp() == "17.3", "a second run in the same job"
    started_by(monkeypatch, **ELASTIC, TORCHELASTIC_RUN_ID="study")
    assert stamp() == "study", "torchrun in a job"
    started_by(monkeypatch, TORCHELASTIC_RUN_ID="none")
    for name in TASK:
        monkeypatch.delenv(name)
    monkeypatch.setattr("vit_efficient.engine.rundir.time.strftime", lambda form, at=None: f"at {at is not None}")
    assert stamp() == "at True", "when torchrun itself began, which all of its processes can see"


def test_when_a_process_began(tmp_path: Path) -> None:
    began = process_started(os.getpid())
    assert began is not None
    tmp_path.joinpath("now").touch()
    assert 0 <= tmp_path.joinpath("now").stat().st_mtime - began < 7200
    assert process_started(2**30) is None


def test_a_run_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    """The one that can be read is found, though a newer one has a key that nobody knows."""
    recipe = load_recipe("fp32_sdpa").recipe
    for name in ("a", "b"):
        folder = Path("runs", f"{recipe.variant}-{recipe.protocol}-{name}")
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000001.ckpt").write_bytes(b"")
        (folder / "recipe.yaml").write_text(dump_recipe(recipe) + ("unheard_of: 1\n" if name == "b" else ""))
        os.utime(folder / "recipe.yaml", (1e9 + (name == "b"),) * 2)
    told: list[str] = []
    found = find_unfinished(recipe, say=told.append)
    assert found is not None
    assert found.path.name.endswith("-a")
    assert len(told) == 1
    assert "passed over" in told[0]


def test_a_run_that_saved_nothing_says_how_it_begins_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("fp32_sdpa").recipe))
    with pytest.raises(CheckpointError, match=r"fit --recipe \S+recipe\.yaml run\.dir=\S+run --resume auto"):
        locate(str(run))
    (run / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"nothing was saved there\.$"):
        locate(str(run))
