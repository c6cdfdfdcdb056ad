"""MLPs whose fc1 and GELU are one operator: where they are, and that nothing else changes. On a CPU the operator is
PyTorch's two operations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.kernels.half_linear import half_gelu
from vit_efficient.model import fused_mlp
from vit_efficient.model.build import for_speed
from vit_efficient.model.fused_mlp import FusedMlp, fuse_mlps

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SMALL).eval().to(dtype)
    for_speed(model)
    return model


def images(dtype: torch.dtype = torch.bfloat16, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the operator, as if a CPU had the kernel and any number of rows were enough."""
    rows: list[int] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return half_gelu(x, weight, bias)

    monkeypatch.setattr(fused_mlp, "half_gelu", counted)
    monkeypatch.setattr(fused_mlp, "has_half_kernel", lambda x: x.dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(fused_mlp, "FEWEST_ROWS", 1)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_cpu_nothing_changes(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    expected, names = model(images(dtype)), list(model.state_dict())
    assert fuse_mlps(model) == 2
    assert fuse_mlps(model) == 0
    assert list(model.state_dict()) == names
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one.blocks[0].mlp) is FusedMlp
        assert torch.equal(one(images(dtype)), expected)


@torch.no_grad()
def test_with_the_operator_the_answer_stays(calls: list[int]) -> None:
    model = model_of()
    expected = model(images())
    fuse_mlps(model)
    assert torch.equal(model(images()), expected)
    assert calls == [4 * 17] * 2


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_exports_take_any_batch(strict: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows there are is asked last: an export that asked would be for a range of batches alone."""
    monkeypatch.setattr(fused_mlp, "FEWEST_ROWS", 4096)
    model = model_of()
    fuse_mlps(model)
    shapes = ({0: torch.export.Dim("b", min=2, max=1024)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes, strict=strict)
    assert not any("half_gelu" in str(node.target) for node in program.graph.nodes)
    assert program.module()(images(batch=7)).shape[0] == 7


def test_where_the_operator_is_not_taken(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, in training, under autocast, in float32, with few rows."""
    model, single = model_of(), model_of(torch.float32)
    fuse_mlps(model)
    fuse_mlps(single)
    model(images())
    with torch.no_grad():
        model.train()(images())
        single(images(torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()(images())
            single(images())
        monkeypatch.setattr(fused_mlp, "FEWEST_ROWS", 4 * 17 + 1)
        model(images())
        assert not calls
        model(images(batch=5))
    assert len(calls) == 2


def _other_layer(mlp: nn.Module) -> None:
    mlp.fc1 = nn.Sequential(mlp.fc1)


def _other_form(mlp: nn.Module) -> None:
    mlp.act = nn.GELU(approximate="tanh")


def _no_bias(mlp: nn.Module) -> None:
    mlp.get_submodule("fc1").bias = None


def _hook(mlp: nn.Module) -> None:
    mlp.get_submodule("act").register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [_other_layer, _other_form, _no_bias, _hook])
@torch.no_grad()
def test_what_is_put_in_later_runs(change: Callable[[nn.Module], None], calls: list[int]) -> None:
    model = model_of()
    fuse_mlps(model)
    change(model.get_submodule("blocks.0.mlp"))
    model(images())
    assert len(calls) == 1  # of the other block


def test_an_inner_norm_comes_behind_it(calls: list[int]) -> None:
    mlp = timm.layers.Mlp(48, 96, norm_layer=nn.LayerNorm).eval().to(torch.bfloat16)
    x = torch.randn(3, 5, 48).to(torch.bfloat16)
    with torch.no_grad():
        expected = mlp(x)
        fuse_mlps(mlp)
        assert torch.equal(mlp(x), expected)
    assert calls


@torch.no_grad()
def test_it_compiles_whole_and_with_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.append(graph.code)
        return graph.forward

    monkeypatch.setattr(fused_mlp, "has_half_kernel", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(fused_mlp, "FEWEST_ROWS", 5 * 17)
    torch.compiler.reset()
    model = model_of()
    expected = [model(images(batch=batch)) for batch in (4, 5, 6, 7)]
    fuse_mlps(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, wanted in zip((4, 5, 6, 7), expected, strict=True):
        torch.testing.assert_close(compiled(images(batch=batch)), wanted)
        assert seen[-1].count("ops.vit_efficient.half_gelu") == (0 if batch == 4 else 2)
    count = len(seen)
    compiled(images(batch=8))  # one program for all that are enough
    assert len(seen) == count


@torch.no_grad()
def test_exports_are_plain(calls: list[int]) -> None:
    model = model_of()
    fuse_mlps(model)
    for strict in (False, True):
        exported = torch.export.export(model, (images(),), strict=strict)
        assert "half_gelu" not in exported.graph_module.code
    assert not calls
