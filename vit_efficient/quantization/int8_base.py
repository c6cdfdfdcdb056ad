"""What trainable and deployed integer layers share: one forward around one product, and patches as tokens.

Legend: B batch, C channels, H and W pixels, D outputs, P patch side, M tokens, K inputs, N outputs, G groups.

What a layer may have beside weight and bias, all float32 whatever the model is cast to:

- `shift` (K,): subtracted from the inputs; the bias has what that takes away (Outlier Suppression+, arXiv:2304.09145).
- `smooth` (K,): inputs are divided by it, and the weight has been multiplied by it (SmoothQuant, arXiv:2211.10438).
- `input_scale` (): the step of static activations.
- `weight_scale` (N, G), or (1, 1): given steps of the weight; without them its largest magnitude decides.
- `weight_zero` (N, G): zero points beside given steps, of 4-bit weights that have them; bytes in deployed form.
- `log_input_scale`, `log_weight_scale`: the logarithms of these two where they are learned. A step is positive, and
  the optimizer's rate is then a relative change of it, the same for weights and activations of any size (Jain et al.,
  arXiv:1903.08066, section 3, argue so for thresholds). The factor 1 / sqrt(values x largest code) by which LSQ (Esser
  et al., arXiv:1902.08153, section 2.2) scales the gradient of a step is left out on purpose: Adam divides by the
  gradient's size, so the factor would change nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_efficient.kernels.int8_linear.op import output_dtype, quantize_activations
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.kernels.quantize.reference import smoothed
from vit_efficient.quantization.stored import StoredInt8

FLOAT32 = ("shift", "smooth", "input_scale", "weight_scale", "log_input_scale", "log_weight_scale")


class IntegerLayer(nn.Module):
    """What trainable and deployed integer layers share."""

    scheme: Scheme
    weight: Tensor
    bias: Any  # a parameter, a buffer, or None
    shift: Tensor | None
    smooth: Tensor | None
    input_scale: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    float32_too: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float weight: (N, K), or (D, C, P, P) for patches."""
        return tuple(self.weight.shape)

    @property
    def deployed(self) -> Literal["linear", "patches"]:
        return "patches" if len(self.shape) == 4 else "linear"

    def describe(self) -> StoredInt8:
        """How the deployed form is stored."""
        scheme = {key: getattr(self.scheme, key) for key in self.scheme.__dataclass_fields__}
        return StoredInt8(shape=self.shape, smooth=self.smooth is not None, shift=self.shift is not None, **scheme)

    def smoothed(self, x: Tensor) -> Tensor:
        """The input (..., K) that is quantized: less `shift`, divided by `smooth`, each rounded to float32."""
        return smoothed(x, self.shift, self.smooth)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the product: int8 codes (M, K) and their scales (M, 1) float32.

        Args:
            x: the layer's input: (..., K), or images (B, C, H, W) for patches.

        Raises:
            ValueError: its activations are not quantized.
        """
        tokens = to_patches(x, self.shape[2:])[0] if self.deployed == "patches" else x
        tokens = self.smoothed(tokens)
        return quantize_activations(tokens.reshape(-1, tokens.shape[-1]), self.scheme, self.current_input_scale())

    def current_input_scale(self) -> Tensor | None:
        """The step of static activations, learned or not."""
        return self.input_scale

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., K) to (..., N) in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)  # before `smooth` makes it float32
        if self.deployed == "linear":
            return self.multiply(self.smoothed(x), dtype)
        tokens, grid = to_patches(x, self.shape[2:])
        return to_image(self.multiply(self.smoothed(tokens), dtype), grid)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales stay float32, whatever dtype the model is cast to; they follow it to its device."""
        before = {name: getattr(self, name, None) for name in (*FLOAT32, *self.float32_too)}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name, None)
            if isinstance(tensor, Tensor) and not tensor.is_meta and isinstance(now, Tensor) and not now.is_meta:
                kept = tensor.detach().to(now.device)  # a cast would have rounded it
                if isinstance(now, nn.Parameter):
                    now.data = kept
                else:
                    setattr(self, name, kept)
        return self


def bias_as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def to_patches(x_BCHW: Tensor, patch: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """Cut images into patches (B, rows * columns, C * P * P) and their grid; what is left over is cut off."""
    batch, channels, height, width = x_BCHW.shape
    rows, columns = height // patch[0], width // patch[1]
    x = x_BCHW[:, :, : rows * patch[0], : columns * patch[1]]
    x = x.reshape(batch, channels, rows, patch[0], columns, patch[1]).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, -1), (rows, columns)


def to_image(x_BMD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens back to (B, D, rows, columns), as the convolution would have returned them."""
    return x_BMD.transpose(1, 2).unflatten(2, grid)
