"""How the work is spread over devices: the hardware part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vit_efficient.config import Config

# Numbers that ZeRO reduces or gathers at once. DeepSpeed's default, 5e8, takes 3.7 GiB in two buffers: more than ZeRO
# saves on a ViT-L.
ZERO_BUCKET = 25_000_000


class _Strategy(Config):
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` takes the GPU if there is one.")
    micro_batch: PositiveInt | None = Field(
        None,
        description="Images that one device holds at once. `data.batch_size` must be a multiple of "
        "micro_batch x devices; the quotient is the number of accumulated micro-batches. "
        "Unset: the whole batch, divided by the number of devices.",
    )
    checkpointing: bool = Field(False, description="Recompute each block in the backward pass instead of keeping it.")
    compile: bool = Field(False, description="`torch.compile` each block, in place.")


class SingleConfig(_Strategy):
    """One process, one device."""

    name: Literal["single"] = "single"


class DistributedConfig(_Strategy):
    """What all strategies of several processes have in common: how many there are, and how long they wait."""

    devices: PositiveInt | Literal["auto"] = Field("auto", description="Devices (processes) on each node.")
    nodes: PositiveInt = Field(1, description="Number of nodes.")
    timeout: PositiveFloat = Field(
        600.0,
        description="Seconds that a process waits for the others in a collective operation before the run fails. It "
        "must cover the slowest thing that one process does alone: calibrating, or writing a checkpoint.",
    )


class DdpConfig(DistributedConfig):
    """DistributedDataParallel: one process a device, parameters replicated."""

    name: Literal["ddp"] = "ddp"
    bucket_mb: PositiveInt | None = Field(
        100,
        description="MiB of gradients that are averaged at once, as soon as they are all there. Larger: fewer "
        "collectives beside the backward pass, and less of them hidden behind it. `null`: PyTorch's choice, 25, and 1 "
        "for the first.",
    )


class FsdpConfig(DistributedConfig):
    """FSDP2: parameters, gradients and optimizer states spread over the devices, gathered a few blocks at a time."""

    name: Literal["fsdp"] = "fsdp"
    shard: Literal["full", "hybrid"] = Field(
        "full",
        description="`full`: over all devices. `hybrid`: over those of a node, with a copy on each node, so that only "
        "gradients cross between nodes.",
    )
    offload: bool = Field(
        False, description="Keep parameters, gradients and optimizer states in the CPU's memory, and step there."
    )


class DeepspeedConfig(DistributedConfig):
    """DeepSpeed ZeRO: optimizer states (1), gradients too (2), parameters too (3) spread over the devices."""

    name: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = Field(2, description="What is spread: optimizer states, + gradients, + parameters.")
    offload_optimizer: bool = Field(False, description="Keep optimizer states in the CPU's memory, and step there.")
    offload_parameters: bool = Field(False, description="Keep parameters in the CPU's memory; `stage: 3` only.")


class AutoConfig(_Strategy):
    """The simplest that fits the GPUs' memory by estimate: of `single` or `ddp`, smaller micro-batches, checkpointing,
    `fsdp`, and `fsdp` with offload the first that leaves 8 % free (docs/scaling.md). The run says what was tried. A
    `micro_batch` or `checkpointing` that is given stays. What srun or torchrun started is taken as it is. On CPUs, and
    where memory cannot be estimated, `single` or `ddp`.
    """

    name: Literal["auto"] = "auto"


StrategyConfig = Annotated[
    SingleConfig | DdpConfig | FsdpConfig | DeepspeedConfig | AutoConfig, Field(discriminator="name")
]


Concrete = SingleConfig | DdpConfig | FsdpConfig | DeepspeedConfig | AutoConfig


def devices(strategy: object) -> tuple[int, int]:
    """(devices a node, nodes) of a resolved strategy."""
    if isinstance(strategy, DistributedConfig):
        assert isinstance(strategy.devices, int), "resolve() makes the number of devices concrete"
        return strategy.devices, strategy.nodes
    return 1, 1


def replicated(strategy: Concrete) -> Concrete:
    """The same processes, each with the whole model: how a deployed model is evaluated after sharded training."""
    if not isinstance(strategy, DistributedConfig):
        return strategy
    return DdpConfig(**strategy.model_dump(include=set(DdpConfig.model_fields) - {"name"}))
