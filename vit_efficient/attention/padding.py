"""Token alignment: the sequence is filled up to a round number of tokens, and nobody can tell from the outside.

197 tokens are an odd number for matrix units; the authors of QAttn found that odd lengths cost speed. Zeros are
appended before the first block and cut off behind the last, so pooling and norms never see them. In between, attention
is handed the keys and values of the real tokens only, so every kernel can do it: there is no mask to add, the softmax
has fewer keys. What the padding computes for itself is thrown away, and no gradient comes from it.

Shapes: B batch, N tokens, M tokens after padding, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.modules import SelfAttention
from vit_efficient.errors import UserError


class TokenPadding:
    """Of one model: how many tokens are real, and how many a sequence is filled up to.

    Args:
        multiple: of it the padded length is.
    """

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.enabled = True
        self.real: int | None = None  # of the sequence that is in the blocks now, or was last

    def append(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the first block: (B, N, D) to (B, M, D)."""
        x_BND, *rest = inputs
        self.real = x_BND.shape[1] if self.enabled else None
        if self.real is None:
            return inputs
        return F.pad(x_BND, (0, 0, 0, -self.real % self.multiple)), *rest

    def remove(self, block: nn.Module, inputs: tuple[Any, ...], y_BMD: Tensor) -> Tensor:
        """Behind the last block: (B, M, D) to (B, N, D)."""
        return y_BMD if self.real is None else y_BMD[:, : self.real]

    def readable(
        self, k_BHME: Tensor, v_BHME: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The keys and values of the real tokens; a bias or a mask of real queries, for all of them."""
        if self.real is None:
            return k_BHME, v_BHME, bias, mask
        missing = k_BHME.shape[2] - self.real
        k_BHNE, v_BHNE = k_BHME[:, :, : self.real], v_BHME[:, :, : self.real]
        return k_BHNE, v_BHNE, _more_queries(bias, self.real, missing), _more_queries(mask, self.real, missing)


def _more_queries(x: Tensor | None, real: int, missing: int) -> Tensor | None:
    """A bias or mask (..., N, N) for `missing` more queries, which may look at all keys."""
    if x is None or x.ndim < 2 or x.shape[-2] != real:
        return x
    return F.pad(x, (0, 0, 0, missing), value=0.0 if x.is_floating_point() else True)


def pad_tokens(model: nn.Module, multiple: int) -> TokenPadding:
    """Make the blocks of a model work on a number of tokens that is a multiple of `multiple`, in place.

    `forward`, `forward_features` and their gradients are those of the model without padding, but for rounding: sums may
    be added in another order. What `forward_intermediates` collects between blocks is padded. Parameters, names and
    files do not change.

    Args:
        model: of timm, its attention swapped, its blocks in `blocks`.
        multiple: for example 8 (197 tokens become 200) or 32 (224).

    Raises:
        UserError: an attention of the blocks cannot leave keys out.
    """
    blocks = list(model.get_submodule("blocks").children())
    padding = TokenPadding(multiple)
    found = [(name, m) for block in blocks for name, m in block.named_modules() if hasattr(m, "backend")]
    for name, module in found:
        if not isinstance(module, SelfAttention):
            raise UserError(
                f"`model.pad_tokens={multiple}` cannot be: `{name}` is a {type(module).__name__}, which cannot leave "
                "the padding out of its keys. Take model.pad_tokens=0."
            )
    if not found:
        raise UserError("`model.pad_tokens` needs an attention that was swapped (vit_efficient.attention.swap).")
    for _, module in found:
        module.padding = padding
    blocks[0].register_forward_pre_hook(padding.append)
    blocks[-1].register_forward_hook(padding.remove)
    return padding


@contextmanager
def unpadded(model: nn.Module) -> Iterator[None]:
    """While it lasts, sequences are as long as they are: for calibration, which shall see real tokens only."""
    paddings = {m.padding for m in model.modules() if isinstance(m, SelfAttention) and m.padding is not None}
    before = {padding: padding.enabled for padding in paddings}
    try:
        for padding in paddings:
            padding.enabled = False
        yield
    finally:
        for padding, enabled in before.items():
            padding.enabled = enabled
