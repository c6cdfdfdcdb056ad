"""MLPs of 16-bit models without codes: the first product and GELU in one kernel, where that is possible."""

from __future__ import annotations

import torch
from timm.layers import GELU, Mlp
from torch import Tensor, nn

from vit_efficient.kernels.half_linear import half_gelu, has_half_kernel
from vit_efficient.model.gelu import CompiledGELU

FEWEST_ROWS = 4096  # measured with 50,432; of few rows nothing is known


class FusedMlp(Mlp):
    """timm's MLP, whose fc1 and GELU may be one kernel (`half_gelu`). Make it with `fuse_mlps`.

    That is decided at each call, as models are trained, exported and given other layers after they were made.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to (..., D)."""
        if not (self._ends_in_gelu() and self._is_inference(x) and self._suits(x)):  # its size last: that is a guard
            return super().forward(x)
        return self.drop2(self.fc2(self.norm(self.drop1(half_gelu(x, self.fc1.weight, self.fc1.bias)))))

    def _suits(self, x: Tensor) -> bool:
        return has_half_kernel(x) and x.numel() >= FEWEST_ROWS * x.shape[-1]

    def _ends_in_gelu(self) -> bool:
        """Whether fc1 and the activation are what they were made as, and nobody looks at what they give."""
        fc1, act = self.fc1, self.act
        exact = type(act) in (GELU, CompiledGELU, nn.GELU) and getattr(act, "approximate", "none") == "none"
        seen = any(part._forward_hooks or part._forward_pre_hooks for part in (fc1, act))
        return exact and type(fc1) is nn.Linear and fc1.bias is not None and not seen

    def _is_inference(self, x: Tensor) -> bool:
        """... in the dtype of the weights; exported programs have PyTorch's operations alone."""
        same = x.dtype == self.fc1.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        return same and not (self.training or torch.is_grad_enabled() or _exporting())


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """Asked outside the program: inside one, the compiler of torch 2.11 answers that it exports whatever it does."""
    return torch.compiler.is_exporting()


def fuse_mlps(model: nn.Module) -> int:
    """Make each plain MLP of timm's a `FusedMlp`, in place; parameters, names and hooks stay.

    fc1 and GELU become one kernel in evaluation without gradients, in 16 bits, on sm_90, from 4,096 rows (images times
    tokens) on: fewer were not measured. A program that is compiled for batches of all sizes has that as a guard. In all
    other cases, as under autocast and in exported programs, timm's own operations run.

    Returns:
        How many there are.
    """
    plain = [module for module in model.modules() if type(module) is Mlp]
    for mlp in plain:
        mlp.__class__ = FusedMlp
    return len(plain)
