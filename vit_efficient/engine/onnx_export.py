"""A deployed integer model as an ONNX file whose arithmetic is the model's own.

Codes are made by Abs, ReduceMax, Div, Round (ties to even) and Clip in float32, multiplied by MatMulInteger, and scaled
by Mul, Mul, Add in the order of `kernels.int8_linear.reference`. The nodes keep the names of the modules that they came
from, which is how `verify` finds each layer's codes again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.backends import in_float32
from vit_efficient.engine.checkpoint import atomic_write
from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.quantization.int8_layers import DeployedInt8
from vit_efficient.quantization.stored import QuantizedLayer

Products = Literal["exact", "signed"]
OPSET = 20
SIGN = 128  # flipping this bit of a byte takes codes from -127..127 to 1..255
LARGEST_FILE = 2**31 - 2**20  # protobuf's own limit, less the graph itself
PACKAGES = ("onnx", "onnxscript")


def missing_packages(*names: str) -> str | None:
    """Why packages of the extra `export` cannot be used, and what to do; None if they are all there."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"the package {absent[0]} is not installed. In the checkout: pip install -e '.[export]'."


@torch.no_grad()
def export_onnx(model: nn.Module, image: ImageSpec, path: Path, *, products: Products = "exact") -> int:
    """Write `model` as ONNX: input ``images`` (B, 3, S, S) float32, normalised; output ``logits`` (B, C); B is free.

    Weights stay one byte each in the file (4-bit ones too: ONNX Runtime multiplies no smaller integers), except in
    layers whose weights alone are quantized: those are floating point there.

    Args:
        model: deployed, on the CPU; what is not quantized becomes float32. Its attention must be one that runs on a
            CPU (`sdpa`).
        image: what it takes.
        path: the file, which is replaced whole or not at all.
        products: ``exact``: both operands as unsigned bytes, right on every processor. ``signed``: weights as signed
            bytes, several times as fast where the processor has VNNI instructions or is an ARM, and silently wrong
            elsewhere, because ONNX Runtime's kernel then saturates at 16 bits; `verify` finds out.

    Returns:
        The file's size in bytes.

    Raises:
        CapabilityError: a package is missing, or a layer has no ONNX form.
        UserError: the model is too large for one file.
    """
    if reason := missing_packages(*PACKAGES):
        raise CapabilityError(f"ONNX: {reason}")
    _check(model)
    images = torch.zeros(2, 3, image.size, image.size)
    with _unpacked(model):
        program: Any = torch.onnx.export(
            in_float32(model).eval(),
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={torch.ops.vit_efficient.int8_matmul.default: _translation(products)},
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    program.model.metadata_props["vit_efficient.products"] = products
    atomic_write(path, lambda temporary: program.save(str(temporary)))
    return path.stat().st_size


def floating_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `export_onnx` writes in floating point although their weights are quantized."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, DeployedInt8))
    return [name for name, layer in layers if layer.scheme.activations == "none"]


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """While it lasts, 4-bit layers hold their codes one a byte: ONNX cannot take two out of one."""
    layers = [module for module in model.modules() if isinstance(module, DeployedInt8)]
    packed = [layer for layer in layers if layer.scheme.weight_bits == 4]
    for layer in packed:
        layer.__dict__["weight_codes"] = partial(torch.clone, layer.weight_codes())
    try:
        yield
    finally:
        for layer in packed:
            del layer.__dict__["weight_codes"]


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not isinstance(module, DeployedInt8):
            raise CapabilityError(
                f"ONNX: `{name}` is a {type(module).__name__}, which has no exact ONNX form. "
                "Export a model of quantization=int8 in deployed form."
            )
        if hasattr(module, "lora_A"):
            raise CapabilityError(f"ONNX: `{name}` has an adapter. Merge it: python -m vit_efficient.export merge.")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise UserError(f"ONNX: {size / 2**30:.1f} GiB do not fit one ONNX file (2 GiB). Quantize more layers.")


def _translation(products: Products) -> Any:
    """The exact integer product in ONNX operations."""
    import onnx
    import onnxscript

    ops: Any = onnxscript.opset20
    unsigned = onnx.TensorProto.UINT8

    def product(q_MK: Any, q_NK: Any) -> Any:
        flip = ops.Constant(value=onnx.helper.make_tensor("sign", unsigned, (), [SIGN]))
        codes = ops.BitwiseXor(ops.Cast(q_MK, to=unsigned), flip)
        weight = ops.Transpose(q_NK, perm=[1, 0])
        if products == "signed":
            return ops.MatMulInteger(codes, weight, flip)
        return ops.MatMulInteger(codes, ops.BitwiseXor(ops.Cast(weight, to=unsigned), flip), flip, flip)

    return product


def signed_codes(codes: Tensor) -> Tensor:
    """Codes as int8 from the unsigned bytes in the graph."""
    return (codes.to(torch.int16) - SIGN).to(torch.int8)
