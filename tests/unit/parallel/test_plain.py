"""DDP as the recipe's strategy makes it: gradients lie in the reducer's buckets, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partialmethod

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vit_efficient.parallel.config import DdpConfig
from vit_efficient.parallel.order import prepare_blocks
from vit_efficient.parallel.strategies import build_strategy


class Layers(nn.Sequential):
    """With a forward pass of its own: of PyTorch's own modules torch 2.11 compiles none."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Probe(L.LightningModule):
    """Notes where gradients lie before the optimizer's step, and whether they are gone before the next forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        inside = (nn.Linear(width, width), nn.Linear(width, width))
        self.model = Layers(nn.Linear(8, width), *inside, nn.Linear(width, 4))
        self.storages: list[int] = []
        self.sent: bool | None = None
        self.left: list[int] = []

    def on_train_start(self) -> None:
        self.sent = self.trainer.strategy.model.broadcast_buffers  # type: ignore[union-attr, assignment]

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.left.append(sum(p.grad is not None for p in self.parameters()))
        loss: Tensor = self.model(batch).square().mean()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)
        self.storages.append(len({g.untyped_storage().data_ptr() for g in gradients if g is not None}))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.fixture
def alone() -> Iterator[None]:
    """Nothing of the process group is left afterwards, nor of what Lightning tells processes that it would start."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def fit(module: Probe, bucket_mb: int | None = 25) -> None:
    strategy = build_strategy(DdpConfig(accelerator="cpu", devices=1, bucket_mb=bucket_mb))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(torch.randn(12, 8)), batch_size=4))


def test_gradients_are_the_buckets(alone: None) -> None:
    module = Probe()
    fit(module)
    assert module.storages == [1, 1, 1]  # all parameters in one bucket, before and after the buckets are made anew
    assert module.left == [0, 0, 0]


@pytest.mark.parametrize(("bucket_mb", "buckets"), [(None, 2), (1, 3), (64, 1)])
def test_buckets_are_as_large_as_the_recipe_says(alone: None, bucket_mb: int | None, buckets: int) -> None:
    """Two weights of 1.4 MiB among small ones. PyTorch's first bucket is small; in the first step there is only one."""
    module = Probe(600)
    fit(module, bucket_mb)
    assert module.storages == [1, buckets, buckets]


@pytest.mark.parametrize("changing", [False, True])
def test_buffers_are_sent_where_training_changes_them(alone: None, changing: bool) -> None:
    """A constant is not; a batch norm's statistics, which each rank would have of its own images, are."""
    module = Probe()
    module.model.register_buffer("constant", torch.ones(3))
    if changing:
        module.model.insert(1, nn.BatchNorm1d(16))
    fit(module)
    assert module.sent is changing


def test_a_compiled_block_is_one_program(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would cut it where a bucket is full."""
    seen: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compiler))
    module = Probe(600)
    prepare_blocks([module.model], checkpointing=False, compile=True)
    fit(module, bucket_mb=1)
    assert seen == [4]
