"""What Lightning is told of processes that srun or torchrun started."""

from __future__ import annotations

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from vit_efficient.cluster.environment import SlurmTasks, cluster_environment
from vit_efficient.machine import Launch

TASK = {
    "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "MASTER_ADDR": "first", "MASTER_PORT": "20017",
}  # fmt: skip


@pytest.fixture
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_task")
def test_tasks_of_a_step() -> None:
    """Whatever the job is called, and without --ntasks-per-node."""
    environment = cluster_environment(Launch("srun", 4, 2))
    assert isinstance(environment, SlurmTasks)
    assert not environment.auto_requeue  # the job's script requeues, and nobody saves inside a signal handler
    assert environment.creates_processes_externally
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (4, 3, 1)
    assert (environment.main_address, environment.main_port, environment.node_rank()) == ("first", 20017, 1)
    environment.validate_settings(num_devices=1, num_nodes=2)  # recipe/compat.py has compared them, in words


@pytest.mark.usefixtures("_task")
def test_a_gpu_of_its_own_is_number_0() -> None:
    environment = cluster_environment(Launch("srun", 4, 2), bound=True)
    assert environment is not None
    assert environment.local_rank() == 0
    assert environment.global_rank() == 3


@pytest.mark.usefixtures("_task")
def test_alone_inside_a_job() -> None:
    assert isinstance(cluster_environment(None), LightningEnvironment)


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cluster_environment(None) is None
    assert isinstance(cluster_environment(Launch("torchrun", 2)), TorchElasticEnvironment)
