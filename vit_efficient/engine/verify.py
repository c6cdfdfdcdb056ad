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
- fused blocks (`fused_run`), whose layers have no outputs of their own: the codes that entered each layer against the
  definition's, which was given the fused model's codes at the layers before. On a CPU every code equal, and the logits.
  On a GPU at least 99.99 %, and behind an MLP's activation, whose erf is a library's, 99.9 %; none off by more than 1
  (fp8: 97 %, as sums are rounded; fast 70 %); logits within 1e-5 (fp8: 1e-3; fast 1e-2) of their norm. How far whole
  runs are apart is reported, with the top-1 they share.
- under bf16 autocast: logits within 1e-2 of the reference's, or, where fp8 units sum, within what bf16 does to the
  reference; the share of equal codes is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.backends import BACKENDS, Backend, Seen, in_float32, observe
from vit_efficient.engine.fused_run import FusedRun, given_codes
from vit_efficient.engine.onnx_run import OnnxRun
from vit_efficient.engine.parts import (
    Inputs,
    code_layers,
    code_parts,
    comparable,
    definition,
    fp8_layers,
    integer_layers,
    output_bound,
)
from vit_efficient.engine.tally import (
    FUSED,
    ONNX,
    OUTPUT,
    REFERENCE,
    Tally,
    VerifyResult,
    judge,
    relative,
    worst,
)
from vit_efficient.engine.verify_table import show
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
    run_fused, reason = _fused(model)
    if reason is not None:
        result.absent[FUSED] = reason
    comparison = _Comparison(model, present, run_onnx, run_fused, result)
    for images in _checked(batches, image):
        comparison.add(images.to(device))
    if not result.layers:
        raise UserError("--verify: there are no images to run. Give at least one batch.")
    equal = all(output_bound(part) is None for part in code_parts(model).values())
    result.rounded_sums = device.type == "cuda" and bool(fp8_layers(model))
    exact = {name: backend.exact and equal for name, backend in present.items()}
    judge(result, exact | {ONNX: False, FUSED: run_fused is not None and run_fused.exact})
    show(result, console)
    return result


def _fused(model: nn.Module) -> tuple[FusedRun | None, str | None]:
    """A copy with fused blocks, or why there is none."""
    if not isinstance(getattr(model, "blocks", None), nn.Module):
        return None, "the model has no `blocks`"
    run = FusedRun(model)
    return (run, None) if run.absent() is None else (None, run.absent())


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
        self,
        model: nn.Module,
        present: dict[str, Backend],
        onnx: OnnxRun | None,
        fused: FusedRun | None,
        result: VerifyResult,
    ) -> None:
        self.model, self.present, self.onnx, self.fused, self.result = model, present, onnx, fused, result
        self.parts = code_parts(model)

    def add(self, images: Tensor) -> None:
        """Compare on one batch: in float32, then in bf16."""
        own, logits = self._run(REFERENCE, images)
        runs = {name: self._run(name, images, own)[1] for name in self.present if name != REFERENCE}
        if self.onnx is not None:
            runs[ONNX] = self._run_onnx(self.onnx, images, own)
        if self.fused is not None:
            runs[FUSED] = self._run_fused(self.fused, images, own)
        for name, out in runs.items():
            same, total = self.result.top1.get(name, (0, 0))
            self.result.top1[name] = same + int((out.argmax(1) == logits.argmax(1)).sum()), total + len(out)
            self.result.logits[name] = worst(self.result.logits.get(name, 0.0), relative(out, logits))
        with torch.autocast(images.device.type, torch.bfloat16):
            half = {name: self._run(name, images, count=False) for name in self.present}
            if self.fused is not None:
                in_half = self.fused(images)
        half["fp32"] = own, logits
        if self.fused is not None:
            entered = {name: comparable(codes.values).cpu() for name, codes in self.fused.entered.items()}
            self._half(FUSED, entered, in_half, own, logits)
        own, logits = half.pop(REFERENCE)
        for name, (codes, out) in half.items():
            self._half(name, codes, out, own, logits)

    def _half(self, name: str, codes: dict[str, Tensor], out: Tensor, own: dict[str, Tensor], logits: Tensor) -> None:
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

    def _run_fused(self, run: FusedRun, images: Tensor, reference: dict[str, Tensor]) -> Tensor:
        logits, tallies = run(images), self.result.layers.setdefault(FUSED, {})

        def see(name: str, codes: Tensor, defined_codes: Tensor) -> None:
            if name not in tallies:
                tallies[name] = run.tally(name)
            tallies[name].add_codes(codes, defined_codes, reference[name])

        on_same_codes = given_codes(self.model, images, run.entered, see)
        bound = 0.0 if run.exact else max(OUTPUT, *(output_bound(part) or 0.0 for part in self.parts.values()))
        so_far = 0.0 if self.result.given is None else self.result.given[0]
        self.result.given = worst(so_far, relative(logits, on_same_codes)), bound
        return logits

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
