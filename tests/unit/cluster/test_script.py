"""The job script: what a request and a site become."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vit_efficient.cluster.script import Request, Script, check_request, read_time, slurm_time
from vit_efficient.cluster.site import Site

HOUR = 3600
PLAIN = Site()


def request(
    nodes: int = 1, gpus: int = 1, seconds: int = HOUR, tasks: int | None = None, site: Site = PLAIN
) -> Request:
    return Request.of(site, nodes=nodes, gpus=gpus, tasks=tasks, seconds=seconds)


def script(site: Site = PLAIN, asked: Request | None = None, runs: tuple[str, ...] = ("/r/run",)) -> Script:
    home = Path(runs[0]) if len(runs) == 1 else Path(runs[0]).parent
    title = "int8_sdpa on digits"
    asked = asked or request(site=site)
    return Script("name", title, asked, site, None, tuple(map(Path, runs)), home, Path("/w"))


def options(text: str) -> list[str]:
    return re.findall(r"(?m)^#SBATCH (.*)$", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-0", 172800), ("2-12", 216000), ("2-12:30", 217800),
     ("1-00:00:30", 86430), ("12h", 43200), ("90m", 5400), ("90min", 5400), ("2d12h", 216000), ("1d", 86400)],
)  # fmt: skip
def test_times(text: str, seconds: int) -> None:
    assert read_time(text) == seconds
    assert read_time(slurm_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "0h", "h", "1h30", "-5", "1.5h", "1:2:3:4"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        read_time(text)


def test_what_every_job_asks_for() -> None:
    given = options(script(asked=request(nodes=2, gpus=4)).render())
    assert given == [
        "--job-name=name", "--chdir=/w", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-node=4",
        "--time=01:00:00", "--signal=USR1@180", "--output=/r/run/slurm/output.log", "--open-mode=append", "--requeue",
    ]  # fmt: skip


def test_a_site_adds_what_it_wants() -> None:
    site = Site(
        partition="gpu", account="a", qos="q", constraint="c", gpu_type="a100", gres=True, cpus_per_task=12, memory="0",
        sbatch=("--exclusive",), srun=("--mpi=none",), modules=("cuda/12.8",), setup=("ulimit -l unlimited",),
        environment={"A": "it's $5"}, container="apptainer exec x.sif", warn_seconds=300,
    )  # fmt: skip
    text = script(site, request(gpus=8, site=site)).render()
    for option in ("--partition=gpu", "--account=a", "--qos=q", "--constraint=c", "--gres=gpu:a100:8", "--mem=0",
                   "--cpus-per-task=12", "--signal=USR1@300", "--exclusive"):  # fmt: skip
        assert option in options(text)
    for line in ("module load cuda/12.8 || exit 2", "ulimit -l unlimited", "export A='it'\"'\"'s $5'",
                 "python=(apptainer exec x.sif python)"):  # fmt: skip
        assert line in text.splitlines()
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 --mpi=none" in text
    assert not any(option.startswith("--gpus") for option in options(text))


def test_processors_only() -> None:
    asked = request(nodes=2, gpus=0, tasks=3)
    text = script(asked=asked).render()
    assert "--ntasks-per-node=3" in options(text)
    assert not any("gpu" in option for option in options(text))
    assert "export OMP_NUM_THREADS=1" in text
    assert str(asked) == "2 nodes x 3 CPU processes, at most 01:00:00"
    assert check_request(asked, PLAIN) == []


def test_scratch_is_made_on_every_node() -> None:
    site = Site(scratch="/local/$USER")
    assert 'srun --nodes=2 --ntasks-per-node=1 mkdir -p "$TMPDIR"' in script(site, request(nodes=2)).render()
    assert '\nmkdir -p "$TMPDIR"' in script(site).render()


def test_an_array() -> None:
    made = script(runs=("/r/study/a b", "/r/study/c"))
    text = made.render()
    assert "--array=0-1" in options(text)
    assert "--output=/r/study/slurm/output-%a.log" in options(text)
    assert "runs=(\n    '/r/study/a b'\n    /r/study/c\n)\nrun=${runs[SLURM_ARRAY_TASK_ID]}\n" in text
    assert made.again(1) == "sbatch --array=1 /r/study/slurm/job.sh"
    assert made.log(1) == Path("/r/study/slurm/output-1.log")


@pytest.mark.parametrize(
    ("asked", "path"),
    [(request(gpus=4, tasks=2), "--tasks-per-node"), (request(seconds=300), "--time")],
)
def test_requests_that_cannot_work(asked: Request, path: str) -> None:
    assert [problem.path for problem in check_request(asked, PLAIN)] == [path]


def test_nothing_of_the_template_is_left() -> None:
    for made in (script(), script(runs=("/r/s/a", "/r/s/b")), script(Site(environment={"MASTER_ADDR": "login"}))):
        text = made.render()
        assert not re.search(r"@[A-Z]+@", text)
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "\n\n\n" not in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("runs", [("/r/it's",), ("/r/s/a b", "/r/s/c$d")])
def test_bash_reads_it(runs: tuple[str, ...], tmp_path: Path) -> None:
    """It parses, and finds the run's folder whatever its name is."""
    text = script(runs=runs).render()
    file = tmp_path / "job.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True, timeout=60)
    begin, end = text.index("script="), text.index("# -- this cluster")
    file.write_text(text[begin:end] + 'printf %s "$run"')
    index = len(runs) - 1
    found = subprocess.run(
        ["bash", str(file)],
        env={"SLURM_ARRAY_TASK_ID": str(index)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout == runs[index]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("found", "code"), [("true", 0), ("false", 2)])
def test_a_module_that_is_not_there_ends_the_job(found: str, code: int, tmp_path: Path) -> None:
    """Without it the run would begin with whatever Python and CUDA the node has."""
    text = script(Site(modules=("cuda/99",))).render()
    file = tmp_path / "job.sh"
    begin, end = text.index("# -- this cluster"), text.index("# -- how the processes")
    file.write_text(f"module() {{ {found}; }}\n{text[begin:end]}")
    assert subprocess.run(["bash", str(file)], check=False, timeout=60).returncode == code


def test_what_a_process_will_find() -> None:
    machine = request(nodes=2, gpus=4).machine(Site(gpu_type="v100"))
    assert (len(machine.gpus), machine.gpus[0].capability) == (4, (7, 0))
    assert machine.launch is not None
    assert (machine.launch.processes, machine.launch.nodes, machine.launch.cores) == (8, 2, 8)
    assert machine.version("torch") is not None
    assert request().machine(Site(container="x")).version("flash-attn") is not None  # nobody here knows
