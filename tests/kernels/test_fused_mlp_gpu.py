"""fc1 and GELU in one kernel on a GPU: in 16 bits as near the float32 model as two operations are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.kernels.linear import launch
from vit_efficient.model.build import for_speed
from vit_efficient.model.fused_mlp import fuse_mlps

pytestmark = pytest.mark.gpu
SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
BATCH = 64  # of 65 tokens: 4,160 rows


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for sm_90")
    rows, plain = [], launch.half_gelu

    def counted(x: Tensor, *rest: Tensor) -> Tensor:
        rows.append(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(launch, "half_gelu", counted)
    torch.compiler.reset()
    return rows


def model_of() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which begin at 1 and 0
            parameter.data += 0.1 * torch.randn_like(parameter)
    for_speed(model)
    swap_attention(model, SdpaConfig().build())
    return model


def ways(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"eager": model, "compiled": torch.compile(model, fullgraph=True, dynamic=False)}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_as_near_as_two_operations(dtype: torch.dtype, how: str, launched: list[int]) -> None:
    model, images = model_of(), torch.randn(BATCH, 3, 64, 64)
    exact = model(images).double()
    model, images = model.to("cuda", dtype), images.to("cuda", dtype)

    def apart(found: Tensor) -> float:
        return float((found.cpu().double() - exact).norm() / exact.norm())

    plain = apart(ways(model)[how](images))
    assert not launched
    assert fuse_mlps(model) == 4
    torch.compiler.reset()
    assert apart(ways(model)[how](images)) < 1.5 * plain
    assert launched == [BATCH * 65] * 4


@torch.no_grad()
def test_few_rows_are_left_alone(launched: list[int]) -> None:
    model = model_of().to("cuda", torch.bfloat16)
    fuse_mlps(model)
    for run in ways(model).values():
        run(torch.randn(BATCH - 1, 3, 64, 64, device="cuda", dtype=torch.bfloat16))
    assert not launched


@pytest.mark.parametrize("how", ["eager", "compiled"])
@torch.no_grad()
def test_in_a_cuda_graph(how: str, launched: list[int]) -> None:
    model = model_of().to("cuda", torch.bfloat16)
    fuse_mlps(model)
    run = ways(model)[how]
    images = torch.randn(BATCH, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(images)
        run(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), len(launched)
    with torch.cuda.graph(graph):
        found = run(images)
    assert len(launched) == before + 4
    images.normal_()
    graph.replay()
    torch.testing.assert_close(found, run(images))
