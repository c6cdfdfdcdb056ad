"""Integer attention in a model: queries, keys and values in int8, softmax and values' product in floating point.

`Int8Attend` takes the place of the attention backend of every swapped attention module (`attention.modules`), so that
position biases, masks, rotations and norms stay where they are. The arithmetic is `kernels.int8_attention`.

Legend: B batch, H heads, N tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.kernels.fp8_attention.reference import Values as Fp8Values
from vit_efficient.kernels.int8_attention.op import int8_attend, int8_attention
from vit_efficient.kernels.int8_attention.reference import Granularity, Keys, Scales, Values
from vit_efficient.quantization.fp8_attention import Fp8Attend

Mode = Literal["dynamic", "static"]
Operand = Literal["q", "k", "v"]
OPERANDS: tuple[Operand, ...] = get_args(Operand)
See = Callable[[str, Operand, Tensor], None]


class Int8Attend(nn.Module):
    """An attention backend that multiplies queries and keys in integers (QAttn, equations 15 to 18).

    In training and in evaluation the same arithmetic; gradients are straight-through.

    Buffers: `q_scale`, `k_scale` and, of int8 values, `v_scale`, float32 scalars, in the static form only; NaN until
    `set_scales`, so that a model that was not calibrated answers NaN and nothing else.

    Args:
        mode: ``dynamic``: scales chosen in each forward; ``static``: calibrated ones, a scalar each of q, k and v.
        granularity: of dynamic scales: one a token and head, or one a tensor (then an image's answer depends on the
            other images of its batch).
        values: how values are multiplied: quantized to int8 and back (equations 17 and 18), as they are (``float``), or
            in e4m3 like the attention weights (``fp8``).
        keys: dynamic scales of keys: as `granularity` says (``token``), or one a head and block of 128 tokens.

    Raises:
        ValueError: blocks of keys beside scales that are calibrated, or of whole tensors.
    """

    name: ClassVar[str] = "int8"
    takes_bias: ClassVar[bool] = True
    form: ClassVar[str] = "int8"  # of the codes that `attend_direct` can end in
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor

    def __init__(
        self,
        mode: Mode = "dynamic",
        granularity: Granularity = "token",
        values: Values = "int8",
        keys: Keys = "token",
    ) -> None:
        super().__init__()
        if keys == "block" and (mode, granularity) != ("dynamic", "token"):
            raise ValueError(f"one scale a block of keys is for dynamic scales a token, not {mode}, a {granularity}")
        self.mode, self.granularity, self.values, self.keys = mode, granularity, values, keys
        self.plain: Any = None  # the backend in whose place it stands
        self.observing = False  # attends through that one while its scales are looked for
        if mode == "static":
            for operand in self.operands:
                self.register_buffer(f"{operand}_scale", torch.full((), torch.nan, dtype=torch.float32))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Those that become int8 codes."""
        return OPERANDS if self.values == "int8" else OPERANDS[:2]

    @property
    def scales(self) -> Scales | None:
        """Of queries, keys and values, where those are int8; None in the dynamic form."""
        if self.mode == "dynamic":
            return None
        return self.q_scale, self.k_scale, self.v_scale if self.values == "int8" else None

    @property
    def direct(self) -> bool:
        """Whether `attend_direct` says what `attend` says, without bias, mask, dropout and gradient."""
        return self.granularity == "token" and not self.observing

    @property
    def hands_codes(self) -> bool:
        """Whether a projection can make the codes of queries and keys: no row of one knows the scale of a block."""
        return self.keys == "token"

    @torch.no_grad()
    def set_scales(self, **scales: Tensor | float) -> None:
        """Give the static form its scales, by operand: ``set_scales(q=amax_q / 127, k=..., v=...)``.

        Raises:
            UserError: one is zero, negative or not finite: its operand was zero, or not finite, on all that it was
                calibrated with. Nothing is set then.
            ValueError: this is the dynamic form, or not one for each of `operands` is given.
        """
        if self.mode != "static" or set(scales) != set(self.operands):
            raise ValueError(f"{self.mode} integer attention has no scales {', '.join(scales)} to be given")
        made = {operand: torch.as_tensor(scale, dtype=torch.float32) for operand, scale in scales.items()}
        for operand, scale in made.items():
            if scale.numel() != 1 or not usable(scale):
                raise UserError(
                    f"Integer attention: the scale of {operand} must be one number above 0, and is {scale.tolist()}. "
                    "Check the calibration images and `model.weights`, or use quantization.attention=dynamic."
                )
        for operand, scale in made.items():
            self.get_buffer(f"{operand}_scale").copy_(scale.reshape(()))

    def attend(
        self,
        q_BHNE: Tensor,
        k_BHNE: Tensor,
        v_BHNE: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """As `attention.base.AttentionBackend.attend`."""
        if self.observing:
            return self.plain.attend(q_BHNE, k_BHNE, v_BHNE, bias=bias, mask=mask, scale=scale, dropout=dropout)
        return int8_attention(
            q_BHNE,
            k_BHNE,
            v_BHNE,
            bias=bias,
            mask=mask,
            scale=scale,
            dropout=dropout,
            granularity=self.granularity,
            scales=self.scales,
            values=self.values,
            keys=self.keys,
        )

    def attend_direct(
        self,
        operands: list[Tensor],
        rows: list[Tensor | None],
        *,
        scale: float,
        out_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Attention without bias, mask, dropout or gradient, from operands in any form: (B, H, N, E).

        Args:
            operands: queries, keys and values (B, H, N, E), floating point or codes.
            rows: the scales of those that are codes; else None.
            scale: factor on the logits.
            out_scale: of the codes that it shall end in, a float32 scalar; None: it ends in `dtype`.
            dtype: of the output.
        """
        options: dict[str, Any] = {"values": self.values, "keys": self.keys, "out_scale": out_scale, "dtype": dtype}
        return int8_attend(*operands, *rows, scale=scale, **options)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales stay float32, whatever dtype the model is cast to; they follow it to its device."""
        scales = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = self.get_buffer(name)
            if scale is not None and not (moved.is_meta or scale.is_meta):  # a cast would have rounded it
                setattr(self, name, scale.to(moved.device))
        return self

    def extra_repr(self) -> str:
        scales = "" if self.mode == "static" else f", one scale a {self.granularity}"
        scales += ", keys one a block" if self.keys == "block" else ""
        return f"{self.mode}{scales}, {self.values} values"


def usable(scale: Tensor) -> bool:
    """Whether all of a scale is finite and above 0."""
    return bool((scale.isfinite() & (scale > 0)).all())


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The swapped attention modules, those that attend through a backend, by name."""
    return {
        name: module for name, module in model.named_modules() if hasattr(getattr(module, "backend", None), "attend")
    }


def quantize_attention(
    model: nn.Module, mode: Mode, granularity: Granularity = "token", values: Values = "int8", keys: Keys = "token"
) -> list[str]:
    """Make every swapped attention of `model` attend in integers, in place.

    The static form has no scales yet: give them with `set_scales` or by loading a state dict.

    Returns:
        The names of the attention modules.

    Raises:
        UserError: no attention of the model was swapped.
    """
    return _replace(model, mode, lambda: Int8Attend(mode, granularity, values, keys))


def quantize_attention_fp8(model: nn.Module, values: Fp8Values = "float") -> list[str]:
    """The same in fp8 (`Fp8Attend`)."""
    return _replace(model, "fp8", lambda: Fp8Attend(values))


def _replace(model: nn.Module, asked: str, make: Callable[[], Int8Attend | Fp8Attend]) -> list[str]:
    found = attention_modules(model)
    if not found:
        raise UserError(
            f"quantization.attention={asked}: {type(model).__name__} has no attention that goes through a backend. "
            "Swap it first (vit_efficient.attention.swap.swap_attention)."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for module in found.values():
        attend = make().to(device).train(module.training)
        attend.plain, module.backend = module.backend, attend
    return list(found)


def code_attention(model: nn.Module) -> dict[str, Int8Attend | Fp8Attend]:
    """The backends of a model that multiply codes, by the name of their attention module."""
    return {
        name: module.backend
        for name, module in attention_modules(model).items()
        if isinstance(module.backend, (Int8Attend, Fp8Attend))
    }


def integer_attention(model: nn.Module) -> dict[str, Int8Attend]:
    """The integer backends of a model, by the name of their attention module."""
    return {
        name: module.backend
        for name, module in attention_modules(model).items()
        if isinstance(module.backend, Int8Attend)
    }


class _Observed:
    """Shows what a backend is given, and lets it attend."""

    def __init__(self, backend: Any, name: str, see: See) -> None:
        self.backend, self.owner, self.see = backend, name, see
        self.name, self.takes_bias = backend.name, backend.takes_bias

    def attend(self, *operands: Tensor, **options: Any) -> Tensor:
        for operand, x in zip(OPERANDS, operands, strict=True):
            self.see(self.owner, operand, x.detach())
        return self.backend.attend(*operands, **options)


@contextmanager
def observe_attention(model: nn.Module, see: See) -> Iterator[list[str]]:
    """While it lasts, show `see` the queries, keys and values of every attention before they are attended with.

    What the model answers does not change. The shown tensors are in the dtype of the model's arithmetic, without
    gradient, after norms and rotations: what `Int8Attend` would quantize.

    Args:
        model: its attention swapped; in integers or not.
        see: called with (name of the attention module, operand, tensor (B, H, N, E)).

    Yields:
        The names of the attention modules.
    """
    found = attention_modules(model)
    # In the instance's own dictionary, which goes before registered submodules: a backend may be one, or not.
    own = {name: module.__dict__.get("backend") for name, module in found.items()}
    for name, module in found.items():
        module.__dict__["backend"] = _Observed(module.backend, name, see)
    try:
        yield list(found)
    finally:
        for name, module in found.items():
            if own[name] is None:
                del module.__dict__["backend"]
            else:
                module.__dict__["backend"] = own[name]
