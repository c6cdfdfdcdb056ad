"""How much each token of each layer matters to the logits.

To second order, the divergence of the logits' distribution from the full-precision one is a quadratic form in the
change of a layer's output, whose matrix is the Fisher information (Amari, "Natural gradient works efficiently in
learning", 1998). Its trace for one token is what an error there costs. In the last block, for example, an error of a
patch token costs nothing where the head reads the class token alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

DRAWS = 2
AT_ONCE = 16  # images: a whole forward is kept for its backward
SHARE = 0.7  # of importance in what weights are rounded for


def token_importance(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Trace of the Fisher information of each layer's output, a token at a time.

    With logits z and p = softmax(z), a vector v of covariance ``diag(p) - p pᵀ`` is drawn; the squared norm of the
    gradient of ``v · z`` is then an unbiased estimate.

    Args:
        model: in full precision; images (B, 3, S, S) to logits (B, C).
        layers: modules of it, each called once a forward, with outputs (B, ..., N), or (B, N, rows, columns). Those
            that are never called are left out of the result.
        batches: images.

    Returns:
        For each layer (T,), T all tokens of all batches in order, with mean 1.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            for images in (part for batch in batches for part in batch.split(AT_ONCE)):
                logits_BC = model(images.detach().requires_grad_()).float()
                p_BC = logits_BC.detach().softmax(dim=1)
                sums: dict[str, Tensor] = {}
                for draw in range(DRAWS):
                    noise_BC = torch.randn(p_BC.shape, generator=generator).to(p_BC)
                    root_BC = p_BC.sqrt() * noise_BC
                    v_BC = root_BC - p_BC * (p_BC.sqrt() * noise_BC).sum(dim=1, keepdim=True)
                    gradients = torch.autograd.grad(
                        (logits_BC * v_BC).sum(),
                        list(outputs.values()),
                        retain_graph=draw + 1 < DRAWS,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    for name, gradient in zip(outputs, gradients, strict=True):
                        channels = 1 if gradient.dim() == 4 else -1  # of patches (B, D, rows, columns)
                        sums[name] = sums.get(name, 0) + gradient.float().square().sum(dim=channels).flatten()
                for name, total in sums.items():
                    found[name].append(total)
                outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _of_mean_one(torch.cat(parts)) for name, parts in found.items() if parts}


def _of_mean_one(weights_T: Tensor) -> Tensor:
    mean = weights_T.mean()
    # Nothing reaches the logits (a head of zeros, say): all alike, and not 0 / 0.
    return torch.where(mean > 0, weights_T / mean, torch.ones_like(weights_T))


def tempered(weight_T: Tensor) -> Tensor:
    """What rounding of weights counts a token with: its importance (of mean 1), and for the rest all tokens alike.

    In the last blocks the class tokens alone matter, and a layer has more inputs than the calibration set has images:
    all tokens together keep the weights from learning these images by heart.
    """
    return SHARE * weight_T + (1 - SHARE)
