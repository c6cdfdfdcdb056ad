"""Recomputation and compilation change neither numbers nor names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_efficient.parallel.order import prepare_blocks


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3)) for _ in range(3)])


def step(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model(torch.randn(5, 8)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_checkpointing_keeps_gradients_and_names() -> None:
    plain, recomputed = make(), make()
    prepare_blocks(recomputed, checkpointing=True, compile=False)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    for a, b in zip(step(plain), step(recomputed), strict=True):
        assert torch.equal(a, b)  # dropout included: recomputation draws it again


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def saved(checkpointing: bool) -> int:
        model, seen = make(), []
        prepare_blocks(model, checkpointing=checkpointing, compile=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            model(torch.randn(5, 8))
        return len(seen)

    assert saved(True) < saved(False)


def test_evaluation_is_not_recomputed() -> None:
    model = make().eval()
    calls = []
    model[0][0].register_forward_hook(lambda *_: calls.append(1))
    prepare_blocks(model, checkpointing=True, compile=False)
    model(torch.randn(2, 8)).sum().backward()
    assert len(calls) == 1


@pytest.mark.slow
def test_compile_in_place_keeps_names_and_numbers() -> None:
    plain, compiled = make().eval(), make().eval()
    prepare_blocks(compiled, checkpointing=False, compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(x), plain(x))
