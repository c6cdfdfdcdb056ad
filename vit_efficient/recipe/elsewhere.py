"""A run that goes on elsewhere: what its recipe holds of the machine that it began on gives way to the one here.

The recipe in a run's folder is complete, so it also holds what `compat.resolve` decided there. Of that, what cannot be
here is decided anew; what the command line says stays, and so does everything that says what is trained.
"""

from __future__ import annotations

from typing import Any

from vit_efficient.machine import Machine
from vit_efficient.parallel.config import Concrete, DdpConfig, DistributedConfig, FsdpConfig, SingleConfig
from vit_efficient.recipe.load import Loaded
from vit_efficient.recipe.merge import COMMAND_LINE
from vit_efficient.recipe.schema import Recipe


def move(loaded: Loaded, machine: Machine) -> tuple[Recipe, list[str]]:
    """Fit the recipe of a run that is resumed to the processes and devices that there are now.

    - `strategy.name`: one process becomes `ddp` where srun or torchrun started several.
    - `strategy.devices` and `strategy.nodes`: as they were started; where nothing started any, one node, and no more
      devices than it has.
    - `strategy.micro_batch`: the largest that divides a device's images and is no larger than before, so that what
      fitted a device goes on fitting it.
    - `checkpoint.sharded`: dropped where the strategy writes one file.

    `strategy.accelerator` stays: a run on GPUs never goes on on a CPU unasked.

    Args:
        loaded: the recipe in a run's folder, with the command line laid over it.
        machine: where it goes on.

    Returns:
        The recipe, and a line for each thing that was decided anew.
    """
    notes: list[str] = []

    def given(key: str) -> bool:
        return loaded.origins.get(key) == COMMAND_LINE

    def changed(key: str, new: object, old: object, why: str) -> None:
        notes.append(f"{key} = {new} instead of {old}: {why}")

    recipe, strategy = loaded.recipe, loaded.recipe.strategy
    launch = machine.launch
    several = launch is not None and launch.processes > 1
    if isinstance(strategy, SingleConfig) and launch is not None and several and not given("strategy.name"):
        changed("strategy.name", "ddp", "single", f"{launch.by} starts {launch.processes} processes")
        strategy = DdpConfig(**strategy.model_dump(exclude={"name"}), devices=launch.per_node, nodes=launch.nodes)
    elif isinstance(strategy, DistributedConfig):
        for key, (now, why) in _places(strategy, machine).items():
            before = getattr(strategy, key)
            if before not in (now, "auto") and not given(f"strategy.{key}"):
                changed(f"strategy.{key}", now, before, why)
                strategy = strategy.model_copy(update={key: now})

    micro = strategy.micro_batch
    world = _world(strategy, machine)
    if micro is not None and not given("strategy.micro_batch"):
        share = recipe.data.batch_size // world
        if share and share % micro:
            fitting = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
            changed("strategy.micro_batch", fitting, micro, f"each of {world} devices has {share} images of a step")
            strategy = strategy.model_copy(update={"micro_batch": fitting})

    update: dict[str, Any] = {"strategy": strategy}
    if recipe.checkpoint.sharded and not isinstance(strategy, FsdpConfig) and not given("checkpoint.sharded"):
        changed("checkpoint.sharded", "false", "true", f"under strategy={strategy.name} a checkpoint is one file")
        update["checkpoint"] = recipe.checkpoint.model_copy(update={"sharded": False})
    return recipe.model_copy(update=update), notes


def _places(strategy: DistributedConfig, machine: Machine) -> dict[str, tuple[int, str]]:
    """Devices and nodes as they must be here, and why."""
    if (launch := machine.launch) is not None:
        why = f"as {launch.by} started them"
        return {"devices": (launch.per_node, why), "nodes": (launch.nodes, why)}
    places = {"nodes": (1, "nothing started this process together with those of other nodes")}
    here = len(machine.gpus)
    if strategy.accelerator == "gpu" and here and isinstance(strategy.devices, int) and strategy.devices > here:
        places["devices"] = (here, f"{here} GPU{'s' * (here != 1)} here")
    return places


def _world(strategy: Concrete, machine: Machine) -> int:
    """Processes, as `compat.resolve` will have them."""
    if isinstance(strategy, SingleConfig):
        return 1
    devices, nodes = getattr(strategy, "devices", "auto"), getattr(strategy, "nodes", 1)
    if isinstance(devices, int):
        return devices * nodes
    if machine.launch is not None:
        return machine.launch.per_node * machine.launch.nodes
    return nodes * (max(1, len(machine.gpus)) if strategy.accelerator != "cpu" else 1)
