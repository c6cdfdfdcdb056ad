"""Sharding in one process: what it does to a model, and that the model comes back."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vit_efficient.parallel import order
from vit_efficient.parallel.full import gather, local, spread, unshard
from vit_efficient.parallel.order import MOST, UNIT, prepare_blocks, shard, units


class Model(nn.Module):
    """Two blocks between two layers of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return cast(Tensor, self.head(x)) + self.shift


@pytest.mark.parametrize(
    ("width", "count", "sizes"),
    [(1024, 24, [4] * 6), (2048, 6, [2] * 3), (192, 12, [MOST] * 3), (192, 6, [4, 2]), (4096, 3, [1] * 3), (8, 0, [])],
)
def test_units_of_blocks(width: int, count: int, sizes: list[int]) -> None:
    """A ViT's block has 12 width^2 weights: ViT-L's four together are a unit, a 7B model's are one each."""
    blocks = [nn.Linear(width, 12 * width, bias=False, device="meta") for _ in range(count)]
    found = units(blocks)
    assert [len(unit) for unit in found] == sizes
    assert [block for unit in found for block in unit] == blocks
    assert [len(unit) for unit in units(blocks, 0)] == [1] * count


@pytest.fixture
def pair() -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("unit", [0, UNIT])  # a block for itself, both together
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("checkpointing", "compile"), [(False, False), (True, False), (True, True)])
def test_order_changes_neither_names_nor_answers(
    pair: tuple[Model, Model], mesh: DeviceMesh, checkpointing: bool, compile: bool, offload: bool, unit: int
) -> None:
    plain, model = pair
    prepare_blocks(model.blocks, checkpointing=checkpointing, compile=compile)
    shard(model, list(model.blocks), mesh, offload=offload, unit=unit)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(local(ours.grad), theirs.grad)


def test_a_step_gathers_once_and_an_evaluation_sees_what_changed(
    pair: tuple[Model, Model], mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    shard(model, list(model.blocks), mesh, unit=0)
    gathered: list[nn.Module] = []
    for block in model.blocks:
        state: Any = cast(FSDPModule, block)._get_fsdp_state()
        group = state._fsdp_param_group if hasattr(state, "_fsdp_param_group") else state._fsdp_param_groups[0]
        inner = group._to_unsharded
        monkeypatch.setattr(group, "_to_unsharded", lambda inner=inner, block=block: (gathered.append(block), inner()))
    x = torch.randn(4, 6)
    model.train()
    model(x).sum().backward()
    assert gathered == list(model.blocks)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "after a step nothing is gathered"
    parts = list(model.blocks.parameters())
    old = model(x)  # no backward pass follows, and blocks are left gathered
    for part in parts:
        local(part.detach()).mul_(0.5)
    assert not torch.allclose(model.eval()(x), old), "the first evaluation gathers anew"
    for evaluate in (torch.no_grad(), torch.enable_grad()):
        with evaluate:
            before = model(x)
            assert all(isinstance(p, DTensor) for p in model.blocks.parameters())
            for parameter in model.parameters():
                local(parameter.detach()).mul_(0.5)
            assert not torch.allclose(model(x), before)


def test_the_next_unit_is_gathered_ahead(pair: tuple[Model, Model], mesh: DeviceMesh) -> None:
    _, model = pair
    shard(model, list(model.blocks), mesh, unit=0)
    first, last = (cast(Any, block)._get_fsdp_state() for block in model.blocks)
    assert first._states_to_forward_prefetch == [last]
    assert last._states_to_forward_prefetch == []


def test_large_models_let_go_in_between(
    pair: tuple[Model, Model], mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    monkeypatch.setattr(order, "KEPT", sum(p.numel() * 2 for p in model.blocks.parameters()))
    assert order.stays_gathered(model.blocks, torch.bfloat16)
    assert not order.stays_gathered(model.blocks, None)
    shard(model, list(model.blocks), mesh)
    model.train()(torch.randn(4, 6))
    assert all(isinstance(p, DTensor) for p in model.blocks.parameters())


def test_narrow_gathering_leaves_integers_and_the_root_alone(pair: tuple[Model, Model], mesh: DeviceMesh) -> None:
    _, model = pair
    packed = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    model.blocks[0].packed = nn.Parameter(packed.clone(), requires_grad=False)
    shard(model, list(model.blocks), mesh, gather=torch.bfloat16)
    block = model.blocks[0]
    assert isinstance(block, FSDPModule)
    block.unshard()
    assert torch.equal(block.packed, packed)
    assert block.get_parameter("0.weight").dtype == torch.bfloat16
    block.reshard()
    assert isinstance(model, FSDPModule)
    model.unshard()
    assert model.embed.weight.dtype == torch.float32
    model.reshard()
    assert block.get_parameter("0.weight").dtype == torch.float32


def test_a_model_comes_back_whole(pair: tuple[Model, Model], mesh: DeviceMesh) -> None:
    plain, model = pair
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("root"))
    model.blocks[1].register_forward_hook(lambda *_: calls.append("block"))
    shard(model, list(model.blocks), mesh)
    model(torch.randn(2, 6))
    unshard(model)
    calls.clear()
    assert type(model) is Model
    assert not isinstance(model.blocks[0], FSDPModule)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), plain(x))
    assert calls == ["root", "block"], "hooks of the model's own stay"
    assert len(model._forward_pre_hooks) == 1, "and no others"
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_whole_tensors_become_parts_and_whole_again(pair: tuple[Model, Model], mesh: DeviceMesh) -> None:
    _, model = pair
    shard(model, list(model.blocks), mesh)
    full = torch.randn_like(model.head.weight.full_tensor())  # type: ignore[operator]
    parts = spread(full, model.head.weight)
    assert isinstance(parts, DTensor)
    assert spread(parts, model.head.weight) is parts
    tree = gather({"a": [parts, 3], "b": {"c": torch.ones(2)}})
    assert torch.equal(tree["a"][0], full)
    assert tree["a"][1] == 3
    assert torch.equal(tree["b"]["c"], torch.ones(2))
