"""AdamW on the shards of FSDP2: the steps of AdamW on whole tensors, states sharded, no operation on a `DTensor`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.model.sharded_adamw import ShardedAdamW


class Operations(TorchDispatchMode):
    """Those on a `DTensor`, while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.planned: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(issubclass(kind, DTensor) for kind in types):
            self.planned.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(model.parameters())]


def test_steps_on_shards_are_steps(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model, usual = (fully_shard(copy.deepcopy(plain), mesh=mesh) for _ in range(2))
    x = torch.randn(4, 6)
    ours, theirs, slow = (kind(groups(m)) for kind, m in ((ShardedAdamW, model), (AdamW, plain), (AdamW, usual)))
    for step in range(3):
        planned = {}
        for module, optimizer in ((model, ours), (plain, theirs), (usual, slow)):
            module(x).square().mean().backward()
            with Operations() as operations:
                optimizer.step()
            planned[optimizer] = operations.planned
            optimizer.zero_grad()
        if step:  # the first one makes the states
            assert not planned[ours]
            assert planned[slow]
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(sharded, DTensor)
        assert sharded.full_tensor().equal(whole)
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(ours.state[sharded][name], DTensor)
            assert ours.state[sharded][name].full_tensor().equal(theirs.state[whole][name])
