"""Runs an exported ONNX file and shows what entered and left each of its integer layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_efficient.engine.onnx_export import missing_packages, signed_codes
from vit_efficient.errors import CapabilityError, CheckpointError

SCOPES = "pkg.torch.onnx.name_scopes"  # torch.onnx's own key: the modules that a node came from, outermost first


@dataclass
class Taps:
    """Names of the graph's values at one integer layer: its input, its codes (one for each group), its output."""

    x: str
    codes: list[str]
    y: str


class OnnxRun:
    """An ONNX Runtime session on the CPU, with the integer layers' values as further outputs.

    Args:
        path: written by `export_onnx`.
        layers: names of the model's integer layers.

    Raises:
        CapabilityError: onnx or onnxruntime is not installed.
        CheckpointError: not such a file, or of another model.
    """

    def __init__(self, path: Path, layers: list[str]) -> None:
        if reason := missing_packages("onnx", "onnxruntime"):
            raise CapabilityError(f"ONNX: {reason}")
        import onnx
        import onnxruntime
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            model: Any = onnx.load(path)
        except (OSError, DecodeError) as error:
            raise CheckpointError(f"Cannot read the ONNX file {path}: {error or type(error).__name__}.") from error
        self.taps = find_taps(model, layers)
        if absent := [name for name in layers if name not in self.taps]:
            raise CheckpointError(
                f"{path} has no integer product for {absent[0]} ({len(absent)} of {len(layers)} are missing): it is of "
                "another model, or another program rewrote it. Export it anew: python -m vit_efficient.export onnx."
            )
        named = {name for tap in self.taps.values() for name in (tap.x, *tap.codes, tap.y)}
        self.outputs = ["logits", *sorted(named - {"images", "logits"})]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs[1:])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Iterator[tuple[str, Tensor, Tensor, Tensor]]]:
        """Logits of normalised images (B, 3, S, S), and in the order of their products the layers': (name, input,
        codes (M, K) int8, output (M, N)).
        """
        arrays = self.session.run(self.outputs, {"images": images.cpu().numpy()})
        values = dict(zip(self.outputs, map(torch.from_numpy, arrays), strict=True)) | {"images": images.cpu()}
        seen = (
            (name, values[tap.x], signed_codes(torch.cat([values[code] for code in tap.codes], dim=1)), values[tap.y])
            for name, tap in self.taps.items()
        )
        return values["logits"], seen


def find_taps(model: Any, layers: list[str]) -> dict[str, Taps]:
    """Where each integer layer's values are in a graph that `export_onnx` wrote, in the order of the products."""
    import onnx

    known = set(layers)
    producers = {name: node for node in model.graph.node for name in node.output}
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.input)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    taps: dict[str, Taps] = {}
    for node in model.graph.node:
        layer = _layer(node, known)
        if layer is None:
            continue
        if node.op_type == "MatMulInteger":
            if layer not in taps:
                taps[layer] = Taps(_entering(node.input[0], producers, known, floats), [], "")
            taps[layer].codes.append(node.input[0])
        elif node.op_type in ("Mul", "Add") and layer in taps:
            taps[layer].y = node.output[0]  # the last of them ends the epilogue
    return taps


def _scopes(node: Any) -> list[str]:
    """The modules that a node came from; none for one that the exporter made in rewriting the graph."""
    return ast.literal_eval(next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]"))


def _layer(node: Any, known: set[str]) -> str | None:
    """The integer layer that a node came from."""
    return next((name for name in reversed(_scopes(node)) if name in known), None)


def _entering(codes: str, producers: dict[str, Any], known: set[str], floats: set[str]) -> str:
    """The float value outside all integer layers that codes were made of. Layers with one input may share codes."""
    waiting, found = [codes], set()
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is not None and (_layer(node, known) is not None or not _scopes(node)):
            waiting += node.input
        elif name in floats and (node is not None or name == "images"):
            found.add(name)
    if len(found) != 1:
        raise CheckpointError(f"The ONNX file has {len(found)} inputs for one integer layer. Export it anew.")
    return found.pop()
