"""Optimizer states by name: between optimizers whose groups differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.named import by_name, by_position, names_of


def trained(order: list[list[int]], steps: int = 2) -> tuple[nn.Sequential, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    every = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [every[i] for i in group], "weight_decay": len(group)} for group in order]
    )
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_states_follow_their_parameters() -> None:
    model, optimizer = trained([[3, 1], [0, 2]])
    saved = by_name(optimizer.state_dict(), names_of(optimizer, model))
    assert [group["params"] for group in saved["param_groups"]] == [["1.bias", "0.bias"], ["0.weight", "1.weight"]]
    assert saved["state"]["0.weight"]["exp_avg"].shape == (4, 3)
    other, fresh = trained([[0], [1, 2], [3]], steps=0)
    fresh.load_state_dict(by_position(saved, names_of(fresh, other), fresh.state_dict()["param_groups"]))
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(fresh.state[mine]["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"]), name


def test_another_model_is_refused() -> None:
    model, optimizer = trained([[0, 1, 2, 3]])
    saved = by_name(optimizer.state_dict(), names_of(optimizer, model))
    with pytest.raises(CheckpointError, match=r"other parameters than this run's: 0\.bias"):
        by_position(saved, ["0.weight", "1.weight", "1.bias"], [])
