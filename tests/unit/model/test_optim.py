"""Parameter groups, schedules and the moving average."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import nn

from vit_efficient.errors import CheckpointError
from vit_efficient.model.ema import WeightAverage
from vit_efficient.model.optim import build_optimizer, build_schedule, parameter_groups, warmup_cosine
from vit_efficient.recipe.schema import OptimConfig


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)


def rates(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_every_trainable_parameter_is_in_one_group(vit: nn.Module) -> None:
    groups = parameter_groups(vit, OptimConfig(lr=1e-3, epochs=1, layer_decay=0.8), 1e-3)
    assert sum(len(g["params"]) for g in groups) == len(list(vit.parameters()))


def test_norms_biases_and_positions_do_not_decay(vit: nn.Module) -> None:
    table = rates(parameter_groups(vit, OptimConfig(lr=1e-3, epochs=1, weight_decay=0.1), 1e-3), vit)
    for name, (_, decay) in table.items():
        spared = name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token")
        assert decay == (0.0 if spared else 0.1), name


def test_layer_decay_halves_from_block_to_block(vit: nn.Module) -> None:
    table = rates(parameter_groups(vit, OptimConfig(lr=1.0, epochs=1, layer_decay=0.5), 1.0), vit)
    block = [table[f"blocks.{i}.mlp.fc1.weight"][0] for i in range(4)]
    assert [b / a for a, b in itertools.pairwise(block)] == [2.0, 2.0, 2.0]
    assert table["head.weight"][0] == 1.0
    assert table["patch_embed.proj.weight"][0] == block[0] / 2


def test_frozen_parameters_are_left_out() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("head")
    groups = parameter_groups(model, OptimConfig(lr=1e-3, epochs=1), 1e-3)
    assert sum(len(g["params"]) for g in groups) == 2


def test_warmup_then_cosine() -> None:
    factor = warmup_cosine(10, 110, 0.1)
    assert [factor(0), factor(4), factor(9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert math.isclose(factor(109), 0.1)
    assert math.isclose(factor(500), 0.1)
    values = [factor(i) for i in range(10, 110)]
    assert values == sorted(values, reverse=True)


def test_schedule_counts_steps_of_the_manifest() -> None:
    layer = nn.Linear(2, 2)
    config = OptimConfig(lr=0.5, min_lr=0.05, epochs=4, warmup_epochs=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    schedule = build_schedule(optimizer, config, steps_per_epoch=5)
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert seen[-1] == pytest.approx(0.05)


def test_adamw8bit_steps(vit: nn.Module) -> None:
    pytest.importorskip("bitsandbytes")
    layer = nn.Linear(128, 128)  # 16,384 weights: enough for bitsandbytes to keep 8-bit states
    optimizer = build_optimizer(layer, OptimConfig(name="adamw8bit", lr=1e-2, epochs=1), 1e-2)
    before = layer.weight.detach().clone()
    layer(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8


def test_average_follows_and_gives_the_weights_back() -> None:
    layer = nn.Linear(3, 3)
    average = WeightAverage(layer, decay=0.9)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.update()
    own = layer.weight.detach().clone()
    decay = min(0.9, 2 / 11)
    with average.applied():
        torch.testing.assert_close(layer.weight.detach(), start * decay + own * (1 - decay))
    assert torch.equal(layer.weight, own)


def test_average_round_trips_and_refuses_another_model() -> None:
    layer = nn.Linear(3, 3)
    average = WeightAverage(layer, 0.9)
    average.update()
    other = WeightAverage(nn.Linear(3, 3), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.steps == 1
    assert torch.equal(other.state_dict()["average"]["weight"], average.state_dict()["average"]["weight"])
    with pytest.raises(CheckpointError, match="other weights"):
        WeightAverage(nn.Conv2d(1, 1, 1, bias=False), 0.9).load_state_dict(average.state_dict())
