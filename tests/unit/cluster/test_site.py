"""The site file: what differs between clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.cluster.site import Site, read_site

SLURM = Path(__file__).parents[3] / "slurm"


def write(folder: Path, text: str) -> Path:
    file = folder / "site.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("example", sorted(SLURM.glob("site.example*.yaml")), ids=lambda path: path.name)
def test_examples(example: Path) -> None:
    site, file, problems = read_site(example)
    assert problems == []
    assert file == example
    assert site.partition is not None


def test_there_are_two_examples() -> None:
    assert len(list(SLURM.glob("site.example*.yaml"))) >= 2


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_site(None) == (Site(), None, [])
    write(tmp_path, "partition: gpu")
    site, file, problems = read_site(None)  # ./site.yaml is taken
    assert (site.partition, file, problems) == ("gpu", Path("site.yaml"), [])


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = "partitoin: gpu\nrestarts: many\nsrun: [--mpi=none, pmix]\nenvironment: {MY VAR: x}\nsetup: ok\n"
    _, _, problems = read_site(write(tmp_path, text))
    found = {problem.path: problem for problem in problems}
    assert set(found) == {"site.partitoin", "site.restarts", "site.srun", "site.environment", "site.setup"}
    assert found["site.partitoin"].suggestion == "partition"
    assert found["site.partitoin"].origin.endswith("site.yaml:1")
    assert found["site.restarts"].origin.endswith("site.yaml:2")
    assert "'pmix', which is no option" in found["site.srun"].message
    assert "'MY VAR'" in found["site.environment"].message


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell would read them; the script quotes them."""
    monkeypatch.setenv("HOME", "/home/me")
    text = "runs: ~/runs\npython: ~/venv/bin/python\nscratch: ~/$USER/tmp\n"
    site, _, problems = read_site(write(tmp_path, text))
    assert problems == []
    assert (site.runs, site.python) == (Path("/home/me/runs"), "/home/me/venv/bin/python")
    assert site.scratch == "/home/me/$USER/tmp"
    assert read_site(write(tmp_path, "runs: a~/b"))[0].runs == Path("a~/b")
    (problem,) = read_site(write(tmp_path, "python: ~no-such-user/bin/python"))[2]
    assert "'~no-such-user/bin/python', and nobody knows that home folder" in problem.message


@pytest.mark.parametrize(
    ("text", "got"),
    [("partition: 5", "5"), ("memory: 0", "0"), ("environment: {A: 1}", "1"), ("environment: {A: true}", "true"),
     ("sbatch: [7]", "7"), ("runs: 2026", "2026"), ("python: 3.12", "3.12")],
)  # fmt: skip
def test_what_yaml_takes_for_a_number(tmp_path: Path, text: str, got: str) -> None:
    (problem,) = read_site(write(tmp_path, text))[2]
    assert f'got {got}, which YAML does not read as text: write it as "{got}"' in problem.message
    (problem,) = read_site(write(tmp_path, "partition: [a]"))[2]
    assert "write it as" not in problem.message


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not valid YAML"), ("- 1\n", "must be a mapping"), ("", None), ("# none\n", None)]
)
def test_files_that_are_no_mapping(tmp_path: Path, text: str, said: str | None) -> None:
    _, _, problems = read_site(write(tmp_path, text))
    assert [said in problem.message for problem in problems] == ([True] if said else [])


def test_an_absent_file(tmp_path: Path) -> None:
    (problem,) = read_site(tmp_path / "nothing.yaml")[2]
    assert "there is no file" in problem.message


@pytest.mark.parametrize(
    ("kind", "capability"),
    [("a100", (8, 0)), ("nvidia_a100_80gb", (8, 0)), ("NVIDIA-H100", (9, 0)), ("l40s", (8, 9)), ("a10", (8, 6)),
     ("v100-32g", (7, 0)), ("rtx_6000_ada", (8, 9)), ("RTX6000", (7, 5)), ("rtx8000", (7, 5)),
     (None, (9, 0)), ("something", (9, 0))],
)  # fmt: skip
def test_what_a_gpu_can_do(kind: str | None, capability: tuple[int, int]) -> None:
    assert Site(gpu_type=kind).gpu().capability == capability
