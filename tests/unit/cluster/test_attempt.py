"""Whether a job begins, and whether it begins again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vit_efficient.cluster import attempt
from vit_efficient.cluster.attempt import AGAIN, begin, end, follow, number_of
from vit_efficient.cluster.record import VARIABLE, Job, attempts, folder, outcome_noted, outcomes, submitted_runs
from vit_efficient.errors import UserError

JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "MASTER_ADDR": "localhost"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was submitted as job 17."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    Job("17", "name", str(path / "log"), 0.0, (str(path),), 2, f"sbatch {path}/slurm/job.sh").write(path)
    return path


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}.ckpt").touch()


def leave(run: Path, process: int, error: BaseException | None) -> None:
    """Let a process of the job end, by an error if there is one."""
    environment = {VARIABLE: str(run / "slurm"), "SLURM_PROCID": str(process)}
    with contextlib.suppress(BaseException), outcome_noted(environment):
        if error is not None:
            raise error


def test_without_progress_it_stops(run: Path) -> None:
    lines = [begin(run, JOB) for _ in range(3)]
    assert "start 1: run begins" in lines[0]
    assert "start 3" in lines[2]
    with pytest.raises(UserError, match="started 3 times in a row without getting further than step 0") as caught:
        begin(run, JOB)
    assert "sbatch" in str(caught.value)
    assert len(attempts(run)) == 3


def test_it_stops_before_it_waits_in_the_queue_again(run: Path) -> None:
    begin(run, JOB)
    begin(run, JOB)
    assert end(run, 137, preempted=False)[0] == AGAIN
    begin(run, JOB)
    with pytest.raises(UserError, match="started 3 times in a row"):
        end(run, 137, preempted=False)
    save(run, 1)
    assert end(run, 137, preempted=False)[0] == AGAIN
    assert end(run, 0, preempted=False)[0] == 0


def test_progress_counts_from_anew(run: Path) -> None:
    for step in (0, 10, 20, 30, 40):
        save(run, step)
        assert "start" in begin(run, JOB)
    assert [each.step for each in attempts(run)] == [0, 10, 20, 30, 40]
    assert "goes on from step 40" in begin(run, JOB)
    begin(run, JOB)
    with pytest.raises(UserError, match="step 40"):
        begin(run, JOB)


def test_a_base_in_training_is_progress(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "checkpoints").mkdir(parents=True)
    Job("17", "name", "log", 0.0, (str(run), str(base)), 0, "sbatch").write(run)
    begin(run, JOB)
    save(base, 5)
    begin(run, JOB)
    save(run, 3)
    begin(run, JOB)
    assert [each.step for each in attempts(run)] == [0, 5, 8]


def test_sharded_checkpoints_are_folders(run: Path) -> None:
    (run / "checkpoints" / "step-00000012.ckpt").mkdir()
    (run / "checkpoints" / ".step-00000099.ckpt.1.tmp").touch()  # half written
    begin(run, JOB)
    assert attempts(run)[0].step == 12


@pytest.mark.parametrize("cut", [5, -1], ids=["in a line", "before its end"])
def test_a_torn_line(run: Path, cut: int) -> None:
    """The disk was full: what can be read counts, and what follows begins on a line of its own."""
    save(run, 3)
    begin(run, JOB)
    file = folder(run) / "attempts"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:cut])
    assert "start" in begin(run, JOB)
    assert [each.step for each in attempts(run)] == [3] * (2 if cut > 0 else 3)
    assert file.read_bytes().endswith(b"\n")
    file.write_bytes(b"7\n\n\xff\n" + whole)  # no record, none, no text
    assert len(attempts(run)) == 1


def test_submitted_again_by_hand(run: Path) -> None:
    """A job number that nobody noted: a person has another go. A job that follows is the same go."""
    for _ in range(3):
        begin(run, JOB)
    assert follow(run, "18;cluster", {}) == "job 18 goes on"
    with pytest.raises(UserError):
        begin(run, {**JOB, "SLURM_JOB_ID": "18"})
    begin(run, {**JOB, "SLURM_JOB_ID": "19"})
    assert Job.read(run).number == "19"


def test_array_task(run: Path) -> None:
    task = {**JOB, "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}
    assert number_of(task) == "15_3"
    follow(run, "20", task)
    assert Job.read(run).number == "20_3"


def test_an_address_that_nobody_knows(run: Path) -> None:
    """It would hang in silence."""
    with pytest.raises(UserError, match=r"MASTER_ADDR is 'no-such-host.invalid'"):
        begin(run, {**JOB, "MASTER_ADDR": "no-such-host.invalid"})
    begin(run, {**JOB, "MASTER_ADDR": "no-such-host.invalid", "SLURM_NNODES": "1"})  # one node needs no name


@pytest.mark.parametrize(
    ("ended", "code", "preempted", "expected", "said"),
    [
        ([], 0, False, 0, "finished"),
        # the time limit: saved, or before there was anything to save
        ([SystemExit(138), SystemExit(138)], 138, False, AGAIN, "its time ends"),
        ([], 138, False, AGAIN, "its time ends"),
        # scancel --signal=TERM, and the grace time of a pre-emption
        ([SystemExit(143), SystemExit(143)], 143, False, 143, "SIGTERM"),
        ([SystemExit(143), SystemExit(143)], 143, True, AGAIN, "taken for another job"),
        # one process could not go on, and srun ended the other with SIGTERM
        ([UserError("no data"), SystemExit(143)], 143, False, 2, "a mistake"),
        ([RuntimeError("CUDA error")], 143, False, AGAIN, "RuntimeError: CUDA error"),
        # one that noticed that another had died, and left with a code of its own
        ([SystemExit(75), SystemExit(143)], 143, False, AGAIN, "exit code 75, another process of the run died"),
        # the watchdog ends a process at once, so that only srun's code tells
        ([], 75, False, AGAIN, "code 75 (another process of the run died)"),
        ([], 76, False, AGAIN, "code 76 (no progress for too long"),
        # processes that were killed say nothing
        ([], 137, False, AGAIN, "a process or a node died"),
        ([], 143, False, AGAIN, "a process or a node died"),
    ],
)
def test_again_or_not(
    run: Path, ended: list[BaseException], code: int, preempted: bool, expected: int, said: str
) -> None:
    begin(run, JOB)
    for process, error in enumerate(ended):
        leave(run, process, error)
    found, line = end(run, code, preempted=preempted)
    assert found == expected
    assert said in line


@pytest.mark.parametrize(
    ("first", "then", "expected", "said"),
    [
        (SystemExit(143), RuntimeError("CUDA error"), AGAIN, "RuntimeError: CUDA error"),
        (SystemExit(143), SystemExit(75), AGAIN, "exit code 75"),
        (SystemExit(143), UserError("no data"), 2, "a mistake"),
        (RuntimeError("connection closed"), UserError("no data"), 2, "a mistake"),
        (SystemExit(75), RuntimeError("CUDA error"), AGAIN, "RuntimeError: CUDA error"),
        (None, RuntimeError("CUDA error"), AGAIN, "RuntimeError: CUDA error"),
        (SystemExit(143), SystemExit(138), AGAIN, "its time ends"),
    ],
)
@pytest.mark.parametrize("late", [0.7, -0.7])
@pytest.mark.parametrize("order", [(0, 10), (10, 0)])
def test_no_clock_decides(
    run: Path,
    first: BaseException | None,
    then: BaseException,
    expected: int,
    said: str,
    late: float,
    order: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes' clocks differ: what ended a run is known by its kind, whatever the stamps, and whichever rank."""
    begin(run, JOB)
    for process, error, stamp in zip(order, (first, then), (100.0, 100.0 + late), strict=True):
        monkeypatch.setattr("vit_efficient.cluster.record.time.time", lambda stamp=stamp: stamp)
        leave(run, process, error)
    found, line = end(run, 143, preempted=False)
    assert found == expected
    assert said in line


def test_a_cancelled_run_is_not_started_again(run: Path) -> None:
    begin(run, JOB)
    Job("17", "name", "log", 0.0, (str(run),), 2, "sbatch", cancelled=True).write(run)
    assert end(run, 138, preempted=False)[0] == 138
    assert end(run, AGAIN, preempted=False) == (
        1,
        "cancelled; not started again",
    )  # srun's, of a rank that lost another
    begin(run, JOB)  # `sbatch RUN/slurm/job.sh` later
    assert not Job.read(run).cancelled


def test_outcomes_of_the_start_before_are_forgotten(run: Path) -> None:
    leave(run, 0, UserError("once"))
    begin(run, JOB)
    assert outcomes(run) == []
    leave(run, 1, None)
    leave(run, 0, SystemExit(0))
    assert [each.kind for each in outcomes(run)] == ["done", "done"]


def test_outside_a_job_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with outcome_noted():
        pass
    assert list(tmp_path.iterdir()) == []


def test_as_the_script_calls_it(run: Path) -> None:
    """Light: the job's shell waits for it, on the first node."""
    environment = {**JOB, "PYTHONPATH": str(Path(attempt.__file__).parents[2]), "PATH": "/nowhere"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vit_efficient.cluster.attempt", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    began = call("begin", str(run))
    assert (began.returncode, began.stderr) == (0, "")
    assert "job 17 on n[1-2], start 1: run begins" in began.stdout
    assert call("end", str(run), "138").returncode == AGAIN
    assert call("end", str(run), "0").returncode == 0
    (run / "slurm" / "job.json").unlink()
    assert call("begin", str(run)).returncode == 2
    loaded = (
        "import sys, vit_efficient.cluster.attempt as a; print({'torch', 'pydantic', 'rich', 'yaml'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True, timeout=60).strip() == "set()"


def test_runs_are_found(run: Path, tmp_path: Path) -> None:
    study = tmp_path / "study" / "a"
    study.mkdir(parents=True)
    Job("18_0", "name", "log", 0.0, (), 0, "sbatch").write(study)
    (tmp_path / "plain").mkdir()
    assert submitted_runs((tmp_path,)) == [run, study]
    assert submitted_runs((run,)) == [run]


def test_a_damaged_record(run: Path) -> None:
    (run / "slurm" / "job.json").write_text(json.dumps({"number": "1"}))
    with pytest.raises(UserError, match="cannot be read"):
        Job.read(run)
    with pytest.raises(UserError, match="was not submitted to Slurm"):
        Job.read(run.parent)
