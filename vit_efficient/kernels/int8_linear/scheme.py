"""How an integer linear layer quantizes its two operands."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Scheme:
    """The choices that the arithmetic depends on.

    Args:
        weight_bits: 8 (codes within +-127) or 4 (+-7).
        activation_bits: the same of the activations.
        weights: one scale an output row (`channel`) or one for all (`tensor`).
        group: inputs that share a weight scale within a row; None: the whole row. The last group may be shorter.
        zero_point: codes of 4-bit weights are not symmetric but ``q - z``, q and z in 0 .. 15, one z for each scale:
            all 16 codes are used, and they lie where the weights do.
        activations: one scale a token or one for all tokens, chosen in each forward; or a given one (`static`); or
            not quantized at all (`none`: the product is in floating point, on the dequantized weight).
    """

    weight_bits: Literal[8, 4] = 8
    activation_bits: Literal[8, 4] = 8
    weights: Literal["channel", "tensor"] = "channel"
    group: int | None = None
    zero_point: bool = False
    activations: Literal["token", "tensor", "static", "none"] = "token"

    @classmethod
    def of(cls, described: Any) -> Scheme:
        """From anything with attributes of these names."""
        return cls(**{field.name: getattr(described, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        assert not self.zero_point or (self.weight_bits == 4 and self.weights == "channel")

    @property
    def largest_weight(self) -> int:
        """The largest weight code."""
        return 2 ** (self.weight_bits - 1) - 1

    @property
    def largest_activation(self) -> int:
        """The largest activation code."""
        return 2 ** (self.activation_bits - 1) - 1

    def groups(self, inputs: int) -> int:
        """Weight scales a row."""
        return 1 if self.group is None else -(-inputs // self.group)
