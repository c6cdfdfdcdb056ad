"""Quantized layers sharded over two real processes: the packed bytes, the answers and the gradients of one.

One pair of processes tries them all and writes down what it found; a test reads its line.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from vit_efficient.parallel.full import copy as write
from vit_efficient.parallel.full import gather, unshard
from vit_efficient.parallel.order import UNIT, prepare_blocks, shard

WIDTH = 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 37), nn.Linear(37, WIDTH)  # packed, an odd number of bytes to share

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.fc1(x).relu())
        return y


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def adapted(change: Callable[[nn.Linear], nn.Module]) -> Tower:
    """A frozen base of quantized layers, adapters that add something, and a trained head: QLoRA."""
    import peft

    model = Tower()
    for block in model.blocks:
        block.fc1, block.fc2 = change(block.fc1), change(block.fc2)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # type: ignore[assignment]  # peft reads them
    settings = peft.LoraConfig(r=3, target_modules=["fc1", "fc2"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    model.head.requires_grad_(True)
    return model


def four_bits(kind: str, double_quant: bool) -> Tower:
    from vit_efficient.quantization.int4_layers import FrozenLinear4bit

    options = {"type": kind, "double_quant": double_quant, "compute_dtype": torch.float32}
    return adapted(lambda layer: FrozenLinear4bit.of(layer, **options))  # type: ignore[arg-type]


def eight_bits() -> Tower:
    from vit_efficient.quantization.bnb_int8_layers import FrozenLinear8bit

    return adapted(lambda layer: FrozenLinear8bit.of(layer, threshold=6.0))


def learned_ranges() -> Tower:
    from vit_efficient.quantization.int8_layers import learn_scales, trainable

    model = Tower()
    for block in model.blocks:
        block.fc1, block.fc2 = trainable(block.fc1), trainable(block.fc2)
    learn_scales(model)
    return model


MODELS: dict[str, Callable[[], Tower]] = {
    "nf4": lambda: four_bits("nf4", False),
    "nf4-double": lambda: four_bits("nf4", True),
    "fp4": lambda: four_bits("fp4", True),
    "bnb_int8": eight_bits,
    "int8-learned": learned_ranges,
}
CASES = [*((name, "shard", False) for name in MODELS), ("nf4", "shard", True), ("nf4", "hybrid", False)]


def bytes_are_kept(make: Callable[[], Tower], mesh: DeviceMesh) -> None:
    """Gathered in their own dtypes or, as bf16 mixed precision does, narrow: packed weights come back bit for bit."""
    plain, there, packed = make(), make().to(mesh.device_type), 0
    for gathered, unit in ((None, UNIT), (torch.bfloat16, 0)):  # both blocks together, and each for itself
        model = make()
        shard(model, list(model.blocks), mesh, gather=gathered, unit=unit)
        for ours, theirs in zip(model.blocks, there.blocks, strict=True):
            assert isinstance(ours, FSDPModule)
            ours.unshard()
            originals = dict(theirs.named_parameters())
            for name, parameter in ours.named_parameters():
                if not parameter.is_floating_point():
                    assert torch.equal(parameter, originals[name]), f"the bytes of {name} changed"
                    packed += 1
            ours.reshard()
        unshard(model)
        if dist.get_rank() == 0:
            model.cpu()
            assert model.state_dict().keys() == plain.state_dict().keys()
            for name, tensor in plain.state_dict().items():
                assert torch.equal(model.state_dict()[name], tensor), f"{name} changed"
            torch.testing.assert_close(model(torch.ones(2, WIDTH)), plain(torch.ones(2, WIDTH)), rtol=0, atol=0)
    assert packed == (0 if any(p.requires_grad for p in plain.blocks[0].fc1.parameters(recurse=False)) else 8)


def trains_alike(make: Callable[[], Tower], mesh: DeviceMesh, checkpointing: bool) -> None:
    """Answers and gradients of both halves of a batch are those of the whole batch in one process."""
    device = mesh.device_type
    plain, model = make().to(device), make()
    prepare_blocks(model.blocks, checkpointing=checkpointing, compile=False)
    shard(model, list(model.blocks), mesh)
    weight = model.head.weight  # as an average or an optimizer holds it
    x, y = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1)).to(device), torch.arange(6).to(device) % 5
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # an average put in the weights' place between two passes must count, the root's too
        model.eval()(x)
        plain.head.weight.mul_(0.5)
        write(weight, plain.head.weight)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    model.train()
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    whole, own = nn.functional.cross_entropy(plain(x), y), nn.functional.cross_entropy(model(x[mine]), y[mine])
    whole.backward()
    own.backward()
    assert own.item() > 0.1, "others saw losses of zero here"
    compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            grad = gather(ours.grad)
            if dist.get_rank() == 0:
                torch.testing.assert_close(grad, theirs.grad.cpu(), rtol=2e-4, atol=2e-6)
                assert grad.abs().sum() > 0, f"no gradient reached {name}"
            compared += 1
    assert compared >= 6


def try_all(rank: int, folder: str, backend: str, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    meshes = {
        "shard": init_device_mesh(device, (2,), mesh_dim_names=("shard",)),
        "hybrid": init_device_mesh(device, (2, 1), mesh_dim_names=("replicate", "shard")),
    }
    found = {}
    for name, over, checkpointing in CASES:
        try:
            bytes_are_kept(MODELS[name], meshes[over])
            trains_alike(MODELS[name], meshes[over], checkpointing)
            found[f"{name} {over} {checkpointing}"] = ""
        except Exception:  # whatever it is, the test reports it
            found[f"{name} {over} {checkpointing}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process found: a traceback for each case, empty where all was well."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("pair")
    backend = {"cpu": "gloo", "cuda": "nccl"}[request.param]
    mp.spawn(try_all, (str(folder), backend, request.param), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "over", "checkpointing"), CASES)
def test_two_processes_are_one(found: list[dict[str, str]], name: str, over: str, checkpointing: bool) -> None:
    for rank, results in enumerate(found):
        assert not results[f"{name} {over} {checkpointing}"], (
            f"rank {rank}: {results[f'{name} {over} {checkpointing}']}"
        )
