"""What attention is timed at and with: shapes, their floors, and every backend that a machine has.

Shapes: B batch, N tokens, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vit_efficient.attention.flash2 import Flash2Config
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.switched_flash import Flash3Config, Flash4Config
from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_fp8
from vit_efficient.kernels.fp8_attention.op import fp8_attend
from vit_efficient.kernels.int8_attention.op import int8_attend
from vit_efficient.kernels.quantize.op import quantize
from vit_efficient.machine import Machine
from vit_efficient.measure.roofline import DATASHEET

SETS = {  # (tokens, images)
    "vit": ((197, 512), (577, 256), (785, 128), (1024, 128), (4096, 16)),
    "qattn": tuple((tokens, 512) for tokens in (197, 577, 785, 1024, 2048, 4096, 8192)),
}
# Exponentials a second: 16 a clock and multiprocessor (CUDA's table of throughputs), at the datasheet's boost clock.
EXPONENTIALS = {
    "NVIDIA H200": 132 * 16 * 1.98e9, "NVIDIA H100 80GB HBM3": 132 * 16 * 1.98e9,
    "NVIDIA A100-SXM4-80GB": 108 * 16 * 1.41e9, "NVIDIA GeForce RTX 4090": 128 * 16 * 2.52e9,
}  # fmt: skip
OTHERS: dict[str, Any] = {  # configs of attention backends
    "sdpa flash": SdpaConfig(kernel="flash"), "sdpa cudnn": SdpaConfig(kernel="cudnn"),
    "sdpa efficient": SdpaConfig(kernel="efficient"), "flash-attn": Flash2Config(), "flash3": Flash3Config(),
    "flash4": Flash4Config(),
}  # fmt: skip
# Behind PyTorch's switch for its flash kernel, which the host needs time to move: not in turn with the others.
SWITCHED = ("flash3", "flash4")
Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape."""

    tokens: int
    images: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"N {self.tokens} B {self.images} H {self.heads} E {self.width}"

    @property
    def pairs(self) -> float:
        """Logits."""
        return float(self.images * self.heads * self.tokens**2)

    @property
    def operations(self) -> float:
        """Of both products."""
        return 4 * self.pairs * self.width

    def floors(self, name: str, chip: str) -> dict[str, float]:
        """Milliseconds that the units of a chip need at least; empty of one that is not listed."""
        if chip not in DATASHEET:
            return {}
        rate, memory = DATASHEET[chip]
        first = 2 if name.startswith(("int8", "fp8")) else 4  # operations a logit and channel; 16 bits count twice
        second = 2 if name.endswith("e4m3 values") else 4
        moved = 8.0 * self.images * self.heads * self.tokens * self.width
        return {
            "products": 1e3 * (first + second) * self.pairs * self.width / rate,
            "exponentials": 1e3 * self.pairs / EXPONENTIALS[chip],
            "memory": 1e3 * moved / memory,
        }


def cases(words: Sequence[str], heads: Sequence[int], width: int) -> list[Case]:
    """The shapes that were asked for, with each number of heads.

    Raises:
        UserError: a word is neither a set nor NxB, both above 0.
    """
    shapes: list[tuple[int, int]] = []
    for word in words:
        tokens, cross, images = word.partition("x")
        if word in SETS:
            shapes += SETS[word]
        elif cross and tokens.isdecimal() and images.isdecimal() and int(tokens) * int(images):
            shapes.append((int(tokens), int(images)))
        else:
            raise UserError(f"--shapes {word}: neither {' nor '.join(SETS)} nor tokens x images, such as 1370x64.")
    return [Case(n, b, each, width) for each in heads for n, b in shapes]


def operands(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, E) of one projection (B, N, 3, H, E), bf16."""
    shape = (case.images, case.tokens, 3, case.heads, case.width)
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def refusals(machine: Machine, width: int) -> dict[str, str]:
    """The backends of `OTHERS` that this machine cannot run for heads of a width, and why."""
    reasons = {name: config.refusal(machine, "bf16", width, "cuda") for name, config in OTHERS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def others(machine: Machine, q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Work]:
    """The backends that this machine has, by PyTorch and the packages of FlashAttention."""
    refused = refusals(machine, q.shape[-1])
    able = {name: config.build() for name, config in OTHERS.items() if name not in refused}
    return {name: partial(backend.attend, q, k, v, scale=scale) for name, backend in able.items()}


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Work]:
    """The forms of int8 and fp8 attention that this machine runs."""
    whole = partial(int8_attend, q, k, v, scale=scale)
    one = torch.full((), 0.03, device=q.device)
    (q_codes, q_scale), (k_codes, k_scale) = quantize(q), quantize(k)
    given = partial(int8_attend, q_codes, k_codes, v, q_scale, k_scale, scale=scale, values="float")
    works: dict[str, Work] = {
        "int8": whole,
        "int8, float values": partial(whole, values="float"),
        "int8 a block, float values": partial(whole, values="float", keys="block"),
        "int8 static, codes out": partial(int8_attend, q, k, v, one, one, one, scale=scale, out_scale=one),
        "int8, codes given": partial(given, dtype=torch.bfloat16),
    }
    if lacks_fp8(q.device) is None:
        rotated = partial(fp8_attend, q, k, v, scale=scale)
        works |= {
            "int8 a block, e4m3 values": partial(whole, values="fp8", keys="block"),
            "fp8, float values": rotated,
            "fp8, e4m3 values": partial(rotated, values="fp8"),
        }
    return works
