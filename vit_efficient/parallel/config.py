"""How the work is spread over devices: the hardware part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vit_efficient.config import Config


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


class DdpConfig(_Strategy):
    """DistributedDataParallel: one process a device, parameters replicated."""

    name: Literal["ddp"] = "ddp"
    devices: PositiveInt | Literal["auto"] = Field("auto", description="Devices (processes) on each node.")
    nodes: PositiveInt = Field(1, description="Number of nodes.")


class AutoConfig(_Strategy):
    """`single` where there is one device, `ddp` where there are several; the run says which."""

    name: Literal["auto"] = "auto"


StrategyConfig = Annotated[SingleConfig | DdpConfig | AutoConfig, Field(discriminator="name")]
