"""What calibration asks of a layer, and what the layer says of it. `calibrate.py` knows no scheme but by this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vit_efficient.quantization.calibration import CalibrationConfig


@dataclass(frozen=True)
class Fit:
    """What was chosen for a layer. Errors are of its output, relative to the output's own power."""

    name: str
    exponent: float | None
    error: float
    constant: bool
    """Whether its inputs were all zero, or all the same after the shift: nothing could be learned of their range."""


class Calibratable(nn.Module):
    """A trainable quantized layer that can be fitted to the inputs it sees."""

    observing: bool
    """While it is set, the layer computes with its float weight and bias, and quantizes nothing."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float weight: (N, K), or (D, C, P, P) for patches."""
        raise NotImplementedError

    @property
    def deployed(self) -> Literal["linear", "patches"]:
        """What it is given: tokens (..., K), or images."""
        raise NotImplementedError

    @property
    def static(self) -> bool:
        """Whether it needs a range of its inputs, and so inputs that differ."""
        raise NotImplementedError

    def fit(self, name: str, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Fit:
        """Decide what `config` leaves open, in place.

        Args:
            name: for messages.
            x_TK: inputs that the layer saw, float32.
            weight_T: how much each row's error counts; None: all alike.
            config: what may be decided.

        Raises:
            UserError: x is empty or not finite.
        """
        raise NotImplementedError
