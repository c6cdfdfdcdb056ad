"""Hooks of a library are taken off, the model's own stay."""

from __future__ import annotations

import torch
from torch import nn

from vit_efficient.parallel.hooks import drop_hooks


def test_only_those_of_the_package() -> None:
    module, seen = nn.Identity(), []

    def theirs(*_: object) -> None:
        seen.append("theirs")

    theirs.__module__ = "torch.distributed.fsdp._state"
    module.register_forward_pre_hook(theirs, with_kwargs=True)
    module.register_forward_hook(theirs, always_call=True)
    module.register_forward_pre_hook(lambda *_: seen.append("ours"), with_kwargs=True)
    module.register_forward_hook(lambda *_: seen.append("ours, behind"))
    drop_hooks(module, "torch.distributed")
    module(torch.zeros(1))
    assert seen == ["ours", "ours, behind"]
    assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 1
    assert len(module._forward_pre_hooks_with_kwargs) == 1
    assert not module._forward_hooks_always_called
