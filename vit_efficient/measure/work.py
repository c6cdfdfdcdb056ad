"""What a training step asks of a device, counted operation by operation: products, bytes, launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vit_efficient.kernels.attention_gradient.op import fits

# Operations that move nothing.
VIEWS = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "detach",
        "alias",
        "permute",
        "transpose",
        "t",
        "unbind",
        "select",
        "slice",
        "split",
        "squeeze",
        "unsqueeze",
        "as_strided",
        "_unsafe_view",
        "unflatten",
        "chunk",
        "split_with_sizes",
        "lift_fresh",
        "empty",
        "empty_strided",
        "empty_like",
        "new_empty",
        "sym_size",
        "is_same_size",
    ]
)
SDPA = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Work:
    """Of one device's step.

    Args:
        half: floating-point operations of matrix products in bf16 or fp16.
        full: the same in float32.
        int8: the same in integers.
        attention: those inside the attention kernel.
        traffic: bytes that everything else reads and writes, each operation for itself.
        launches: kernels.
        short: of `attention`, what this package has a backward pass of its own for (`kernels/attention_gradient`).
    """

    half: float = 0
    full: float = 0
    int8: float = 0
    attention: float = 0
    traffic: float = 0
    launches: float = 0
    short: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * part for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return (self.half, self.full, self.int8, self.attention, self.traffic, self.launches, self.short)


class WorkCounter(TorchDispatchMode):
    """Adds up the work of the operations that pass. Multiply-adds count twice, as everywhere.

    Args:
        own: whether attention has this package's backward pass where that one fits.
    """

    def __init__(self, *, own: bool = False) -> None:
        super().__init__()
        self.work, self._own = Work(), own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.work += _of(func, args, kwargs or {}, result, self._own)
        return result


def _of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, own: bool) -> Work:
    name = func._schema.name.split("::")[-1]
    if name in VIEWS or func._schema.name.startswith("prim::"):
        return Work()
    if name.startswith(SDPA):
        return _attention(args, own, backward="backward" in name)
    operations = _operations(func, name, args, kwargs, result)
    if operations is not None:
        return Work(**{_arithmetic(args): operations}, launches=1)
    tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
    return Work(traffic=sum(t.numel() * t.element_size() for t in tensors), launches=1)


def _operations(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float | None:
    """Of a matrix product; None for anything else."""
    if name in ("int8_matmul", "gemm_4bit"):
        rows = args[0].numel() // args[0].shape[-1]
        return 2.0 * rows * args[0].shape[-1] * result.shape[-1]
    formula: Callable[..., float] | None = flop_registry.get(func._overloadpacket)
    return None if formula is None else float(formula(*args, **kwargs, out_val=result))


def _arithmetic(args: tuple[Any, ...]) -> str:
    dtypes = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    if dtypes & {torch.bfloat16, torch.float16}:
        return "half"
    return "int8" if torch.int8 in dtypes else "full"


def _attention(args: tuple[Any, ...], own: bool, *, backward: bool) -> Work:
    """FlashAttention's own count: 4 B H N^2 E forward, two and a half times that backward (arXiv:2307.08691)."""
    query = args[1] if backward else args[0]
    key = args[2] if backward else args[1]
    batch, heads, tokens, width = query.shape
    forward = 4.0 * batch * heads * tokens * key.shape[-2] * width
    operations = 2.5 * forward if backward else forward
    short = operations if own and fits(query) else 0.0
    return Work(attention=operations, launches=1 if not backward else 3, short=short)
