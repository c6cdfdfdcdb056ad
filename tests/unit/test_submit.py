"""`submit` without a cluster: what is checked, shown and refused. tests/slurm has the real thing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vit_efficient.cluster.record import Job
from vit_efficient.cluster.script import Request
from vit_efficient.cluster.site import Site
from vit_efficient.engine.submission import Planned, plan
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.submit import STUDY, main

IMAGENET = ("protocol=imagenet_vit_l16", "data.shards=/data/in1k")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm here


def planned(
    *names: str, gpus: int = 1, nodes: int = 1, words: tuple[str, ...] = (), site: Site | None = None
) -> list[Planned]:
    # A container: what is installed in it, FlashAttention for one, is not known here. No memory is known of an A40.
    site = site or Site(container="apptainer exec x.sif", gpu_type="a40")
    return plan(names, words, Request.of(site, nodes=nodes, gpus=gpus, tasks=None, seconds=3600), site)[0]


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        main(words)
    return str(caught.value)


def test_dry_run_needs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--recipe", "int8_sdpa", "--nodes", "2", "--gpus-per-node", "4", "--time", "24h", "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n# int8_sdpa on digits: 2 nodes x 4 GPUs, at most 1-00:00:00\n")
    assert "#SBATCH --signal=USR1@180\n" in printed  # lines are not broken, whatever the terminal's width
    assert re.search(r"log  .*/runs/int8_sdpa-digits-[\d-]+/slurm/output.log", printed)
    assert "nothing is written" in printed
    assert list(tmp_path.iterdir()) == []


def test_without_slurm(tmp_path: Path) -> None:
    said = refused("--recipe", "int8_sdpa", "--time", "1h")
    assert "There is no `sbatch` on this machine" in said
    assert "--dry-run" in said
    assert "torchrun" in said
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partitions: gpu\n")
    said = refused(
        "--recipe", "int8_sdpa", "--time", "soon", "--tasks-per-node", "3", "optim.lrr=1", "data.batch_size=x"
    )
    assert said.startswith("5 mistakes; nothing was submitted\n")
    for path in ("site.partitions", "--time", "--tasks-per-node", "optim.lrr", "data.batch_size"):
        assert f"\n  {path}: " in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--recipe: is missing"),
        (("--recipe", "fp32_sdpa", "--recipe", "int8_sdpa"), "did you mean '--array recipes'"),
        (("--recipe", "int8_sdpa", "strategy.accelerator=cpu"), "strategy.accelerator: is cpu, and the job has 1 GPUs"),
        (("--recipe", "int8_sdpa", "--gpus-per-node", "4", "strategy=ddp", "strategy.devices=2"),
         "strategy.devices: is 2, and srun starts 1 node x 4 processes"),
        (("--recipe", "int8_sdpa", "--gpus-per-node", "4", "strategy=single"), "Take strategy=ddp"),
        (("--recipe", "int8_sdpa", "--nodes", "3"), "data.batch_size: is 64, which 3 devices cannot share equally"),
    ],
)  # fmt: skip
def test_refused(words: tuple[str, ...], said: str) -> None:
    assert said in refused("--time", "1h", *words)


def test_an_existing_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    assert "already exists" in refused("--recipe", "int8_sdpa", "--time", "1h", "run.dir=run")


def test_the_gpu_that_it_will_find_counts() -> None:
    """Not the one of the machine that submits."""
    assert planned("int8_flash2")
    with pytest.raises(RecipeError, match=r"sm_70"):
        planned("int8_flash2", site=Site(container="x", gpu_type="v100"))


LARGE = ("data.batch_size=1024", "model.kwargs.depth=2", "model.image_size=224")


def test_memory_counts_before_anything_is_submitted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """That of the cluster's GPUs: 1,024 images at once do not fit one, and `auto` would take fewer."""
    for gpu_type in ("t4", "a100_80gb"):
        (tmp_path / "site.yaml").write_text(f"{{container: apptainer exec x.sif, gpu_type: {gpu_type}}}")
        words = ("--recipe", "fp32_sdpa", "--time", "1h", "--dry-run", *LARGE)
        main(words)
        printed = capsys.readouterr().out
        assert re.search(rf"note  on the \w+ of .* \(site.gpu_type {gpu_type}\), strategy.auto takes single", printed)
        asked = (*words, "strategy=single", "strategy.micro_batch=1024")
        if gpu_type == "t4":
            said = refused(*asked)
            assert re.search(r"strategy.micro_batch: is 1024, and needs about [\d.]+ GB on the T4 of 15.8 GB", said)
            assert "strategy.checkpointing=true, or leave both to strategy=auto" in said
        else:
            main(asked)
            assert re.search(r"note  about [\d.]+ GB of memory, on the A100 of 85.1 GB", capsys.readouterr().out)


def test_memory_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--recipe", "fp32_sdpa", "--time", "1h", "--dry-run")
    main(words)
    assert "memory was not checked: site.gpu_type does not say which GPUs these are" in capsys.readouterr().out
    (tmp_path / "site.yaml").write_text("gpu_type: l40s")
    main(words)
    assert "memory was not checked: that of site.gpu_type l40s is not known" in capsys.readouterr().out
    main((*words, "--gpus-per-node", "0"))
    assert "memory was" not in capsys.readouterr().out


def test_the_hardware_section_is_the_jobs() -> None:
    """For every way to write the strategy; a run's folder and recipe are fixed when it is submitted."""
    for words in ((), ("strategy=ddp",), ("strategy=ddp", "strategy.nodes=2", "strategy.devices=4")):
        (one,) = planned("int8_sdpa", gpus=4, nodes=2, words=words)
        strategy = one.recipe.strategy
        assert strategy.accelerator == "gpu"
        assert (getattr(strategy, "devices", 4), getattr(strategy, "nodes", 2)) == (4, 2)
        assert one.recipe.run.dir == one.run
        assert one.run.is_absolute()


def test_processors_only() -> None:
    (one,) = planned("fp32_sdpa", gpus=0)
    assert one.recipe.strategy.accelerator == "cpu"


def test_the_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("{container: apptainer exec x.sif, gpu_type: h100, runs: /shared/runs}")
    small = ("model.kwargs.depth=1",)  # memory is counted for each of them
    main(["--array", "variants", "--gpus-per-node", "8", "--time", "24h", "--dry-run", *IMAGENET, *small])
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-4\n" in printed
    found = re.findall(r"(?m)^    /shared/runs/study-imagenet_vit_l16-[\d-]+/(\w+)$", printed)
    assert tuple(found) == STUDY


def test_the_study_trains_its_base_once() -> None:
    """Adapters without a base take that of the array, and begin after it."""
    found = {one.recipe.variant: one for one in planned(*STUDY)}
    waiting = {name for name, one in found.items() if one.after_base}
    assert waiting == {"int4_sdpa", "int4_flash2"}
    for name in waiting:
        assert found[name].recipe.quantization.base == str(found["fp32_sdpa"].run / "model.safetensors")
    with pytest.raises(RecipeError, match="would each train the same fp32 base"):
        planned("int4_sdpa", "int4_flash2")
    alone = next(one for one in planned("int8_sdpa", "int4_sdpa") if one.recipe.variant == "int4_sdpa")
    assert not alone.after_base
    assert len(alone.progress) == 2  # its base's checkpoints are progress, too
    assert not any(one.after_base for one in planned(*STUDY, words=("model.weights=vit.safetensors",)))


def test_two_recipes_of_one_name(tmp_path: Path) -> None:
    """Each run of an array has a folder of its own, by the recipe's name."""
    shutil.copy(Path(__file__).parents[2] / "recipes" / "int8_sdpa.yaml", tmp_path / "int8_sdpa.yaml")
    with pytest.raises(RecipeError, match="int8_sdpa is the name of two recipes"):
        planned("int8_sdpa", str(tmp_path / "int8_sdpa.yaml"))


def test_looking_after_what_is_not_there(tmp_path: Path) -> None:
    assert "there is no such folder" in refused("status")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert "no run in it was submitted" in refused("status")
    Job("1", "name", str(tmp_path / "log"), 0.0, (), 3, "sbatch").write(tmp_path / "runs" / "a")
    assert "There is no `squeue` on this machine" in refused("status")
    (tmp_path / "log").write_text("what was printed\n")


def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> Path:
    """Slurm's commands, as shell scripts that note how they were called in the file that is returned."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    for name, script in scripts.items():
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{script}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return calls


def half_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scancel: str) -> tuple[str, str]:
    """An array whose second part is refused: what is said, and how Slurm was called."""
    (tmp_path / "site.yaml").write_text("{container: apptainer exec x.sif, gpu_type: a40, runs: studies}")
    refuses = "echo 'sbatch: error: Something new' >&2; exit 1"
    sbatch = f'case "$*" in *--dependency*) {refuses};; *) echo 17;; esac'
    calls = commands(tmp_path, monkeypatch, sbatch=sbatch, scancel=scancel)
    said = refused("--array", "recipes", "--recipe", "fp32_sdpa", "--recipe", "int4_sdpa", "--time", "1h")
    assert "Something new" in said
    assert "Nothing was started" not in said
    return said, calls.read_text()


def test_half_an_array_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, calls = half_submitted(tmp_path, monkeypatch, "exit 0")
    assert "cancelled again: 17." in said
    assert calls.splitlines()[-1] == "scancel 17"
    assert list((tmp_path / "studies").iterdir()) == []


def test_half_an_array_that_stays_keeps_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job would find nothing, and nobody would find the job."""
    said, _ = half_submitted(tmp_path, monkeypatch, "echo 'no answer' >&2; exit 1")
    assert "still in the queue: 17." in said
    assert "scancel says: no answer" in said
    (study,) = (tmp_path / "studies").iterdir()
    assert str(study) in said
    assert (study / "slurm" / "job.sh").is_file()
    assert Job.read(study / "fp32_sdpa").number == "17_0"


@pytest.mark.parametrize("folder", ["/proc/x", "afile/x", "x" * 300])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "afile").touch()
    calls = commands(tmp_path, monkeypatch, sbatch="echo 17")
    said = refused("--recipe", "fp32_sdpa", "--gpus-per-node", "0", "--time", "1h", f"run.dir={folder}")
    assert said.startswith(f"run.dir: nothing can be written to {(tmp_path / folder).absolute()}: ")
    assert "`runs` in the site file" in said
    assert "job.sh" not in calls.read_text()
    assert (tmp_path / "afile").is_file()


def test_a_cancel_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on, and so does its starting again after a fault."""
    queued = "echo '17|RUNNING|1:00|9:00|n1|None'"
    calls = commands(tmp_path, monkeypatch, squeue=queued, scancel="echo 'controller is away' >&2; exit 1")
    job = Job("17", "name", str(tmp_path / "log"), 0.0, (), 3, "sbatch")
    job.write(tmp_path / "a")
    assert "Job 17 cannot be cancelled. scancel says: controller is away" in refused("cancel", "a")
    assert "scancel 17" in calls.read_text()
    assert Job.read(tmp_path / "a") == job


def test_logs_need_no_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Job("1", "name", str(tmp_path / "log"), 0.0, (), 3, "sbatch").write(tmp_path / "a")
    (tmp_path / "log").write_text("".join(f"line {n} [bold]\n" for n in range(20_000)))
    main(["logs", "a"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "line 19999 [bold]"
    assert re.fullmatch(r"line \d+ \[bold\]", shown[0])
    assert len(shown) < 20_000
