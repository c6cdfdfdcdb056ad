"""The patch embedding as a matrix product on GPUs.

Patches do not overlap, so the convolution is a product of pixels and weights. cuDNN does not see it: for ViT-L/16 at
batch 256 and bf16 on an H200 it took 2.6 ms (two changes of layout among them) of a forward of 42 ms.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.quantization.select import is_patches


class PatchConv2d(nn.Conv2d):
    """A convolution whose kernel is its stride. On a GPU it is one product; elsewhere the convolution.

    Parameters and their names are the convolution's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, D, H / p, W / q)."""
        divided = all(side % step == 0 for side, step in zip(x.shape[-2:], self.kernel_size, strict=True))
        return self.product(x) if x.is_cuda and divided else super().forward(x)

    def product(self, x: Tensor) -> Tensor:
        """`forward` by one product of pixels and weights: a view whose D are neighbours in memory."""
        p, q = self.kernel_size
        pixels = x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def patches_as_product(model: nn.Module) -> None:
    """Put `PatchConv2d` in place of a model's patch embedding, in place, where that is what it is."""
    embed = getattr(model, "patch_embed", None)
    conv = getattr(embed, "proj", None)
    if type(conv) is not nn.Conv2d or not is_patches(conv):
        return
    made = nn.utils.skip_init(
        PatchConv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None
    )
    made.weight, made.bias = conv.weight, conv.bias
    made.train(conv.training)
    embed.proj = made  # type: ignore[union-attr]
