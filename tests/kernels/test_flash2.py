"""FlashAttention-2 and PyTorch's forced kernels on a GPU, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vit_efficient.attention import reference
from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.flash2 import Flash2Config
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import detect

pytestmark = pytest.mark.gpu
HALF = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # twice the unit of rounding, relative to the norm


def backend(name: str) -> AttentionBackend:
    config: Any = Flash2Config() if name == "flash2" else SdpaConfig(kernel=name)  # type: ignore[arg-type]
    if refusal := config.refusal(detect(), "bf16", 64, "cuda"):
        pytest.skip(refusal)
    return config.build()


def inputs(tokens: int, heads: int, width: int, dtype: torch.dtype, logits: float = 1.0) -> list[Tensor]:
    """q, k, v as views of one fused projection."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    qkv = torch.randn(2, tokens, 3, heads, width, generator=generator, device="cuda", dtype=torch.float32)
    qkv[:, :, 0] *= logits
    return [x.detach().requires_grad_() for x in qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)]


def compare(name: str, tensors: list[Tensor], tolerance: float) -> None:
    scale = tensors[0].shape[-1] ** -0.5
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got = backend(name).attend(*tensors, scale=scale)
    wanted = reference.attend(*exact, scale=scale)
    weight = torch.randn(wanted.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    weight = weight.to(got.dtype)
    got_grads = torch.autograd.grad(got, tensors, weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    floor = 1e-3 * max(float(g.norm()) for g in wanted_grads)  # with one token q and k have no gradient at all
    for one, other in zip((got, *got_grads), (wanted, *wanted_grads), strict=True):
        assert (one.detach().double() - other.detach()).norm() < tolerance * max(float(other.norm()), floor)


@pytest.mark.parametrize("name", ["flash2", "flash", "cudnn", "efficient"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 63, 196, 197, 198, 256, 257, 577])
def test_output_and_gradients_equal_the_definition(name: str, dtype: torch.dtype, tokens: int) -> None:
    if (name, tokens) == ("cudnn", 1):  # cuDNN has no attention over a single key, and says so
        with pytest.raises(CapabilityError, match=r"attention\.kernel=cudnn"):
            compare(name, inputs(tokens, heads=3, width=64, dtype=dtype), HALF[dtype])
        return
    compare(name, inputs(tokens, heads=3, width=64, dtype=dtype), HALF[dtype])


@pytest.mark.parametrize("name", ["flash2", "flash", "cudnn", "efficient"])
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (5, 64), (16, 64), (3, 32), (3, 80), (3, 96)])
def test_head_counts_and_widths(name: str, heads: int, width: int) -> None:
    compare(name, inputs(197, heads, width, torch.bfloat16), HALF[torch.bfloat16])


@pytest.mark.parametrize("name", ["flash2", "flash", "cudnn", "efficient"])
@pytest.mark.parametrize("tokens", [63, 197, 577])
def test_small_logits(name: str, tokens: int) -> None:
    """Near uniform attention is the mean of the values: a padded key that is counted shows at once."""
    q, k, v = inputs(tokens, heads=3, width=64, dtype=torch.float16, logits=1e-3)
    compare(name, [q, k, v], 2e-3)
    y = backend(name).attend(q, k, v, scale=0.125).double()
    mean = v.double().mean(2, keepdim=True).expand_as(y)
    assert (y - mean).norm() < 2e-2 * mean.norm()


def test_attention_dropout_is_random_and_unbiased() -> None:
    flash2 = backend("flash2")
    q, k, _ = inputs(197, heads=8, width=64, dtype=torch.float16)
    v = torch.ones_like(q)
    first, second = (flash2.attend(q, k, v, scale=0.125, dropout=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    assert abs(first.float().mean() - 1) < 0.01
    assert torch.allclose(flash2.attend(q, k, v, scale=0.125), v, atol=1e-2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_a_model_under_autocast_equals_that_with_sdpa(name: str) -> None:
    import timm

    torch.manual_seed(0)
    patch = 14 if "14" in name else 16
    model = timm.create_model(name, depth=2, num_classes=5, img_size=5 * patch).cuda().eval()
    x = torch.randn(2, 3, 5 * patch, 5 * patch, device="cuda")
    logits = {}
    for kind in ("flash2", "math"):
        swap_attention(model, backend(kind))
        with torch.autocast("cuda", torch.bfloat16):
            logits[kind] = model(x).float()
    assert (logits["flash2"] - logits["math"]).norm() < 2e-2 * logits["math"].norm()


def test_flash2_compiles_without_a_graph_break() -> None:
    flash2 = backend("flash2")
    q, k, v = inputs(197, heads=3, width=64, dtype=torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash2.attend(q, k, v, scale=0.125)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


def test_flash2_passes_on_why_it_cannot() -> None:
    x = torch.randn(1, 2, 16, 264, device="cuda", dtype=torch.bfloat16)  # wider than any build takes
    with pytest.raises(CapabilityError, match=r"heads of width 264: .+attention=sdpa"):
        backend("flash2").attend(x, x, x, scale=0.1)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_forced_kernel_refuses_float32(kernel: str) -> None:
    x = torch.randn(1, 2, 16, 64, device="cuda")
    with pytest.raises(CapabilityError, match=rf"attention\.kernel={kernel}.*float32 on cuda"):
        backend(kernel).attend(x, x, x, scale=0.125)
