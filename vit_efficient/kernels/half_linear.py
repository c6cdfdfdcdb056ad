"""GELU of a linear layer in 16 bits as one kernel, for inference without codes.

Behind a library's product GELU is a pass over the widest tensor of a block, compiled or not, and the library's own
epilogue has the tanh form alone. The kernel of codes (`kernels.linear`) takes operands of 16 bits too. No gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.capability import compute_capability
from vit_efficient.kernels.device import runs_triton, runs_triton_constant

HALF = (torch.bfloat16, torch.float16)


@torch.library.custom_op("vit_efficient::half_gelu", mutates_args=())
def half_gelu(x: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """GELU (erf form) of a linear layer, x (..., K) to (..., N), all of one dtype; elsewhere than on sm_90 in 16 bits
    PyTorch's two operations."""
    if x.dtype in HALF and x.numel() > 0 and runs_triton(x) and _has_tile(x.device.index):
        from vit_efficient.kernels.linear import launch

        return launch.half_gelu(x.reshape(-1, x.shape[-1]), weight_NK, bias_N).view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, weight_NK, bias_N))


@half_gelu.register_fake
def _(x, weight_NK, bias_N):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight_NK.shape[0]))


def has_half_kernel(x: Tensor) -> bool:
    """Whether `half_gelu` is a kernel where `x` is and in its dtype; a constant of compiled programs."""
    return x.is_cuda and x.dtype in HALF and runs_triton_constant(x.device.index) and _has_tile(x.device.index)


@torch.compiler.assume_constant_result
def _has_tile(index: int) -> bool:
    """On other chips no tile of this form is known to fit."""
    return compute_capability(index)[0] == 9
