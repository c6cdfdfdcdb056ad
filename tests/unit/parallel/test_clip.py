"""Clipping on shards: the norm and the gradients that torch's own makes, in two real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vit_efficient.parallel.clip import clip_gradients, gradient_norm


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def gradients(model: nn.Module) -> list[Tensor]:
    model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("most", [0.01, 100.0])
def test_whole_gradients(most: float) -> None:
    model, other = small(), small()
    gradients(model), gradients(other)
    assert clip_gradients(model.parameters(), most).equal(nn.utils.clip_grad_norm_(other.parameters(), most))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.equal(theirs.grad)


def test_none_at_all() -> None:
    assert float(clip_gradients(small().parameters(), 1.0)) == 0


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for shape, names in (((2,), ("shard",)), ((1, 2), ("replicate", "shard")), ((2, 1), ("replicate", "shard"))):
        for most in (0.01, 100.0):
            model, plain = fully_shard(small(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)), small()
            before = gradient_norm(gradients(model) and model.parameters())
            norm = clip_gradients(model.parameters(), most)
            assert before.equal(norm)
            wanted = nn.utils.clip_grad_norm_(gradients(plain) and plain.parameters(), most)
            both = zip(model.parameters(), plain.parameters(), strict=True)
            found.append((float(norm), float(wanted), [(p.grad.full_tensor(), q.grad) for p, q in both]))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
    os._exit(0)  # what gloo leaves behind ends some processes by SIGABRT


def test_sharded_gradients(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for norm, wanted, pairs in torch.load(tmp_path / "found.pt"):
        assert norm == pytest.approx(wanted, rel=1e-6)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
