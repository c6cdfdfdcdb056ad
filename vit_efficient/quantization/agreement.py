"""How close a model's logits are to those of the model that it was made from. Legend: B images, C classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_efficient.errors import UserError


@dataclass(frozen=True)
class LogitComparison:
    """A model beside its reference, over the same images.

    Args:
        snr_db: 10 log10(sum of reference^2 / sum of (reference - logits)^2), sums over all images and classes, in
            decibels. Infinite where they are equal.
        kl: mean over the images of KL(softmax(reference) || softmax(logits)), in nats.
        agreement: share of the images that both give the same class, of 1.
        n: number of images.
        broken: images for which the model gave a NaN or an infinity. They agree with nothing, and a single one makes
            `snr_db` minus infinity and `kl` infinity: such a model is worse than any that computes.
    """

    snr_db: float
    kl: float
    agreement: float
    n: int
    broken: int = 0


class Comparer:
    """Compares batch by batch, holding sums only, in float64."""

    def __init__(self) -> None:
        self.n = self.broken = self._equal = 0
        self._signal = self._noise = self._kl = 0.0

    @torch.no_grad()
    def update(self, reference_BC: Tensor, logits_BC: Tensor) -> None:
        """Count one batch.

        Args:
            reference_BC: logits of the reference, (B, C), of any dtype.
            logits_BC: logits of the model that is judged, likewise.

        Raises:
            ValueError: the shapes differ or are not (B, C).
            UserError: the reference itself has NaN or infinite logits, so there is nothing to compare with.
        """
        if reference_BC.ndim != 2 or reference_BC.shape != logits_BC.shape:
            raise ValueError(f"logits are (B, C), got {tuple(reference_BC.shape)} and {tuple(logits_BC.shape)}")
        require_finite(reference_BC)
        reference, logits = reference_BC.double(), logits_BC.to(reference_BC.device).double()
        finite_B = logits.isfinite().all(1)
        reference, logits = reference[finite_B], logits[finite_B]
        self.n += len(finite_B)
        self.broken += len(finite_B) - len(logits)
        self._equal += int((reference.argmax(1) == logits.argmax(1)).sum())
        self._signal += float(reference.square().sum())
        self._noise += float((reference - logits).square().sum())
        log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(logits, 1)
        self._kl += float((log_p.exp() * (log_p - log_q)).sum())

    def result(self) -> LogitComparison:
        """The figures so far.

        Raises:
            ValueError: no image was counted.
        """
        if self.n == 0:
            raise ValueError("no images to compare")
        agreement = self._equal / self.n
        if self.broken:
            return LogitComparison(-math.inf, math.inf, agreement, self.n, self.broken)
        kl = max(0.0, self._kl / self.n)  # equal logits may give -1e-17
        return LogitComparison(_decibels(self._signal, self._noise), kl, agreement, self.n)


def compare(reference_BC: Tensor, logits_BC: Tensor) -> LogitComparison:
    """Compare all logits at once: signal-to-noise ratio, KL divergence, share of equal classes.

    Args:
        reference_BC: logits of the full-precision model, (B, C).
        logits_BC: logits of the model that is judged, for the same images.

    Raises:
        ValueError: the shapes differ or are not (B, C), or B is 0.
        UserError: the reference has NaN or infinite logits. The judged model may have them: see `LogitComparison`.
    """
    comparer = Comparer()
    comparer.update(reference_BC, logits_BC)
    return comparer.result()


def correct(labels_B: Tensor, logits_BC: Tensor) -> Tensor:
    """Which images are classified correctly, (B,) of bool; logits with a NaN or an infinity never are."""
    return (logits_BC.argmax(1) == labels_B.to(logits_BC.device)) & logits_BC.isfinite().all(1)


def require_finite(reference_BC: Tensor) -> None:
    """Refuse a reference that is broken itself.

    Raises:
        UserError: it has a NaN or an infinity.
    """
    broken = len(reference_BC) - int(reference_BC.isfinite().all(1).sum())
    if broken:
        raise UserError(
            f"The full-precision model gives NaN or infinite logits for {broken} of {len(reference_BC)} images, so "
            "nothing can be compared with it. Check `model.weights` and the images, or set quantization.precision=fp32."
        )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
