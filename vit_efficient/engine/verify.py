"""`quantize --verify`: do all backends of a deployed integer or fp8 model make the same codes?

Every backend runs the whole model on the same images. At every layer, and at every attention on codes, what it made
(the codes that entered the product, and the output) is compared with what the definition in `kernels` makes of *the
same input of that layer*. So a fault is found where it is, and in no layer behind it. Comparing only whole runs would
say less: a float sum in another order changes a norm's last bit, that one code in 10^5, that the next layer's input,
and some blocks later two sound programs differ in most codes (and, on a trained ViT-Ti, by 3 % in their logits).

The bounds, for every layer:

- backends that are exact by construction: every code equal, and every output of an integer layer, bit for bit; outputs
  of float sums within 1e-5 of their norm (integer attention), or 1e-3 (fp8 matrix units, which sum in fewer bits; 1e-2
  where the scheme asks for the fast accumulation); attention within 1.5e-2 where its queries and keys are e4m3, and
  5e-2 where its weights are, which depend on the order of sums;
- others: at least 99.99 % of the codes equal, none off by more than 1, outputs within 1e-5 of their norm.
- under bf16 autocast: logits within 1e-2 of the reference's; the share of equal codes is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.backends import BACKENDS, Backend, Seen, in_float32, observe
from vit_efficient.engine.onnx_run import OnnxRun
from vit_efficient.engine.parts import (
    Inputs,
    code_layers,
    code_parts,
    definition,
    fp8_layers,
    integer_layers,
    output_bound,
)
from vit_efficient.engine.tally import (
    BF16_LOGITS,
    OFF_BY,
    ONNX,
    OUTPUT,
    REFERENCE,
    SHARE,
    Tally,
    VerifyResult,
    judge,
    relative,
    worst,
)
from vit_efficient.errors import UserError
from vit_efficient.quantization.int8_attention import code_attention


def run_verify(
    model: nn.Module,
    image: ImageSpec,
    batches: Iterable[Tensor],
    console: Console,
    *,
    onnx: Path | None = None,
) -> VerifyResult:
    """Compare all backends that are present, and print a row a layer and a verdict.

    Args:
        model: deployed, with integer layers, on the device to verify; what is not quantized becomes float32.
        image: what it takes.
        batches: normalised images, each (B, 3, S, S) float32.
        console: where people read.
        onnx: an exported file of the same model, to be verified too.

    Returns:
        The result; `ok` decides a command's exit code.

    Raises:
        UserError: no integer layer, no images, images of another size or with NaN, or a wrong ONNX file.
    """
    if not code_layers(model):
        raise UserError(
            "--verify: the model has no layer that multiplies codes (quantization=int8 or fp8), so none to compare."
        )
    if onnx is not None and (fp8_layers(model) or code_attention(model)):
        raise UserError(
            "--verify --onnx: fp8 layers and attention on codes are not exported to ONNX. Leave --onnx out."
        )
    in_float32(model).eval()
    device = next(tensor.device for tensor in model.state_dict().values())
    result, present = VerifyResult(), {}
    for name, backend in BACKENDS.items():
        if not backend.serves(model):
            continue
        if reason := backend.absent(device):
            result.absent[name] = reason
        else:
            present[name] = backend
    run_onnx = OnnxRun(onnx, list(integer_layers(model))) if onnx is not None else None
    if onnx is None and not fp8_layers(model):
        result.absent[ONNX] = "not exported (python -m vit_efficient.export onnx)"
    comparison = _Comparison(model, present, run_onnx, result)
    for images in _checked(batches, image):
        comparison.add(images.to(device))
    if not result.layers:
        raise UserError("--verify: there are no images to run. Give at least one batch.")
    equal = all(output_bound(part) is None for part in code_parts(model).values())
    judge(result, {name: backend.exact and equal for name, backend in present.items()} | {ONNX: False})
    _show(result, console)
    return result


def _checked(batches: Iterable[Tensor], image: ImageSpec) -> Iterator[Tensor]:
    for images in batches:
        if images.ndim != 4 or images.shape[1:] != (3, image.size, image.size) or not len(images):
            raise UserError(f"--verify: images are {tuple(images.shape)}, not (B, 3, {image.size}, {image.size}).")
        if not images.isfinite().all():
            raise UserError("--verify: the images hold NaN or infinity, of which codes say nothing. Check the data.")
        yield images.to(torch.float32)


class _Comparison:
    """Runs batches through all backends and counts."""

    def __init__(
        self, model: nn.Module, present: dict[str, Backend], onnx: OnnxRun | None, result: VerifyResult
    ) -> None:
        self.model, self.present, self.onnx, self.result = model, present, onnx, result
        self.parts = code_parts(model)

    def add(self, images: Tensor) -> None:
        """Compare on one batch: in float32, then in bf16."""
        own, logits = self._run(REFERENCE, images)
        runs = {name: self._run(name, images, own)[1] for name in self.present if name != REFERENCE}
        if self.onnx is not None:
            runs[ONNX] = self._run_onnx(self.onnx, images, own)
        for name, out in runs.items():
            self.result.logits[name] = worst(self.result.logits.get(name, 0.0), relative(out, logits))
        with torch.autocast(images.device.type, torch.bfloat16):
            half = {name: self._run(name, images, count=False) for name in self.present}
        half["fp32"] = own, logits
        own, logits = half.pop(REFERENCE)
        for name, (codes, out) in half.items():
            share, difference = self.result.bf16.get(name, (1.0, 0.0))
            self.result.bf16[name] = min(share, _share(codes, own)), worst(difference, relative(out, logits))

    def _run(
        self, name: str, images: Tensor, reference: dict[str, Tensor] | None = None, *, count: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Codes by layer, on the CPU, and logits (B, C).

        Args:
            name: the backend.
            images: (B, 3, S, S).
            reference: codes of the reference's own run, where there was one.
            count: whether to add to the tallies.
        """
        made: dict[str, Tensor] = {}

        def see(seen: Seen) -> None:
            codes, y = definition(seen.part, seen.inputs, seen.y.dtype)
            made[seen.name] = (codes if name == REFERENCE else seen.codes).cpu()
            if count:
                run = made if reference is None else reference
                self._tally(name, seen.name).add(made[seen.name], seen.y, codes, y, run[seen.name])

        return made, observe(self.model, images, self.present[name], see)

    def _run_onnx(self, run: OnnxRun, images: Tensor, reference: dict[str, Tensor]) -> Tensor:
        layers = integer_layers(self.model)
        logits, seen = run(images)
        for name, x, codes, y in seen:
            layer = layers[name]
            if layer.deployed == "linear":  # the exporter merges reshapes: the heads may still be apart
                x = x.reshape(-1, layer.in_features)
            defined = definition(layer, Inputs((x.to(images.device),), {}), torch.float32)
            self._tally(ONNX, name).add(codes, y, *defined, reference[name])
        return logits.to(images.device)

    def _tally(self, backend: str, layer: str) -> Tally:
        tallies = self.result.layers.setdefault(backend, {})
        if layer not in tallies:
            exact = backend in self.present and self.present[backend].exact
            own = output_bound(self.parts[layer])
            tallies[layer] = Tally(exact, (own or 0.0) if exact else max(OUTPUT, own or 0.0))
        return tallies[layer]


def _share(codes: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    equal = sum(int((codes[name] == others[name]).sum()) for name in codes)
    return equal / max(1, sum(tensor.numel() for tensor in codes.values()))


def _show(result: VerifyResult, console: Console) -> None:
    table = Table(title="digests of the codes entering each layer, and of its output", title_justify="left", box=SIMPLE)
    table.add_column("layer", overflow="fold")
    table.add_column("backend", no_wrap=True)
    table.add_column("codes    output", no_wrap=True)
    table.add_column("equal", justify="right", no_wrap=True)
    table.add_column("off", justify="right")
    broken = {(name, layer) for name, layer, _ in result.failures}
    for layer in result.layers[REFERENCE]:
        for name, tallies in result.layers.items():
            tally, first = tallies[layer], name == REFERENCE
            mark = "[bold red]" if (name, layer) in broken else ""
            own = ("", "") if first else (f"{mark}{_percent(tally.share)}", f"{mark}{tally.largest}")
            table.add_row(layer if first else "", name, tally.digests(), *own)
    console.print(table)
    console.print(
        "equal, off: codes against the definition's on the same input of the layer (of fp8 in steps of the format). "
        "Bounds: all codes, and all outputs of integer layers, bit for bit; outputs of attention within 1e-5 "
        "(of e4m3 queries and keys 1.5e-2, of e4m3 weights 5e-2), of fp8 "
        f"units 1e-3 (fast: 1e-2); of onnx {100 * SHARE:.2f} % of codes, off by {OFF_BY}, outputs within {OUTPUT:.0e}. "
        "Digests are of whole runs: those of a backend that rounds norms or softmax otherwise, as onnx does, soon "
        "differ.",
        soft_wrap=True,
    )
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(result: VerifyResult) -> Iterator[str]:
    for name, difference in result.logits.items():
        last = list(result.layers[name].values())[-1]
        yield (
            f"{name}, whole runs: logits differ from the reference's by {difference:.1e} of their norm; "
            f"{_percent(last.running / max(1, last.total))} of the last layer's codes are equal"
        )
    for name, (share, difference) in result.bf16.items():
        what = "reference in fp32" if name == "fp32" else name
        yield (
            f"bf16, {what} against the reference in bf16: {_percent(share)} of all codes equal, "
            f"logits differ by {difference:.1e} of their norm"
            + ("" if name == "fp32" else f" (bound {BF16_LOGITS:.0e})")
        )
    for name, reason in result.absent.items():
        yield f"{name}: absent, {reason}"
    if result.ok:
        yield f"[bold green]verified[/]: {', '.join(result.layers)} keep their bounds in every layer"
        return
    for name, layer, reason in result.failures[:5]:
        yield f"[bold red]broken[/]: {name}, {layer}: {reason}"
    if len(result.failures) > 5:
        yield f"and {len(result.failures) - 5} more"


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"
