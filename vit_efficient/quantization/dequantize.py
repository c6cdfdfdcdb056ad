"""A model file's weights in floating point again, to train on from them.

The result answers as the file does but for the rounding of activations: smoothing is divided out of the weights, and
what a shift moved into the bias is taken out of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError
from vit_efficient.kernels.int8_linear.op import dequantize_weight
from vit_efficient.quantization.int8_layers import DeployedInt8
from vit_efficient.quantization.stored import ADAPTERS, LAYERS


def float_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The float32 state dict of the model that a file describes, under timm's names.

    Args:
        tensors: of the file.
        metadata: its description, of the version that this program writes.

    Raises:
        UserError: it holds adapters, or layers of a kind that does not become float again.
    """
    layers = LAYERS.validate_json(metadata["layers"])
    if ADAPTERS.validate_json(metadata["adapters"]):
        raise CheckpointError(
            "The file holds adapters beside their base. Make one plain model of them first: "
            "`python -m vit_efficient.export merge FILE --out MERGED.safetensors`."
        )
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, stored in layers.items():
        own = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        if problem := stored.check(own):
            raise CheckpointError(f"The tensors of {name} are not what the file says of them: {problem}.")
        layer = stored.build("bias" in own)
        layer.load_state_dict(own)
        weight, bias = _float(name, layer)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = weight.view(stored.shape)
        if bias is not None:
            state[f"{name}.bias"] = bias
    return {key: tensor for key, tensor in state.items() if ".backend." not in key}  # scales of integer attention


def _float(name: str, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, DeployedInt8):
        weight_NK = dequantize_weight(layer.weight_codes(), layer.weight_scale.float(), layer.scheme, torch.float32)
        if layer.smooth is not None:
            weight_NK = weight_NK / layer.smooth
        bias_N = layer.bias
        if layer.shift is not None:
            assert bias_N is not None, "a shift needs a bias to go to"
            bias_N = bias_N - weight_NK @ layer.shift
        return weight_NK, bias_N
    from vit_efficient.quantization.merge import float_weight

    bias = getattr(layer, "bias", None)
    return float_weight(layer, name), None if bias is None else bias.detach().float()
