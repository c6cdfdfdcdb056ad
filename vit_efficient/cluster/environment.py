"""Tells Lightning who started the processes, and keeps its own requeueing out of the way."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from vit_efficient.machine import Launch


class SlurmTasks(SLURMEnvironment):
    """Processes that srun started, one for each device.

    Lightning would save inside its signal handler and requeue from there; `cluster/preempt.py` owns the signals, and
    the job's script requeues. That the recipe and srun agree is checked by `recipe/compat.py`, in words.

    Args:
        bound: whether each process sees a GPU of its own only (`--gpus-per-task=1`), which is then number 0 for it.
    """

    def __init__(self, bound: bool = False) -> None:
        self.bound = bound
        super().__init__(auto_requeue=False)

    def local_rank(self) -> int:
        return 0 if self.bound else super().local_rank()

    def world_size(self) -> int:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])  # SLURM_NTASKS is the job's, and a step may have fewer

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass

    @staticmethod
    def _validate_srun_used() -> None:
        pass  # it was

    @staticmethod
    def _validate_srun_variables() -> None:
        pass  # wants --ntasks-per-node; --ntasks serves as well


def cluster_environment(launch: Launch | None, *, bound: bool = False) -> ClusterEnvironment | None:
    """The environment that fits how this process was started; None: Lightning may find out.

    Alone inside a Slurm job, Lightning starts the others, where it would else take the job's tasks for them.
    """
    if launch is None:
        return LightningEnvironment() if "SLURM_JOB_ID" in os.environ else None
    return SlurmTasks(bound) if launch.by == "srun" else TorchElasticEnvironment()
