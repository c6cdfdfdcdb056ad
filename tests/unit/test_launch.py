"""Who started the processes, as the environment says."""

from __future__ import annotations

import pytest

from vit_efficient.machine import Gpu, Launch, Machine, detect_launch

# What srun (Slurm 22.05) gave a task of `--nodes=2 --ntasks-per-node=2 --gpus-per-node=h200:2 --cpus-per-task=8`.
TASK = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
}  # fmt: skip
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        (TASK, Launch("srun", 4, 2, 2, 8)),
        ({k: v for k, v in TASK.items() if k != "SLURM_GPUS_ON_NODE"}, Launch("srun", 4, 2, None, 8)),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),  # srun --pty bash
        ({k: v for k, v in TASK.items() if "STEP" not in k}, None),  # the job's own shell
        (ELASTIC, Launch("torchrun", 8, 2)),
        ({**TASK, **ELASTIC}, Launch("torchrun", 8, 2)),  # srun starts a torchrun on each node
    ],
)
def test_detected(environment: dict[str, str], launch: Launch | None) -> None:
    assert detect_launch(environment) == launch


def test_gpus_of_a_node() -> None:
    """Under Slurm a process may see one GPU of several: what the job has counts."""
    gpu = Gpu("A100", (8, 0), 40 << 30)
    assert Machine((gpu, gpu)).gpus_on_node == 2
    assert Machine((gpu,), launch=Launch("srun", 4, 1, gpus=4)).gpus_on_node == 4
    assert Machine((gpu,) * 4, launch=Launch("srun", 4, 1)).gpus_on_node == 4
    assert Machine((), launch=Launch("srun", 4, 1, gpus=4)).gpus_on_node == 0  # torch can use none of them


def test_processes_of_a_node() -> None:
    assert Launch("srun", 4, 2).per_node == 2
    assert Launch("srun", 3, 2).per_node == 2
