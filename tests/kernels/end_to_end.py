"""End to end on real images: the fast int8 (or fp8) ViT-Ti, its blocks fused, against the reference, in one table.

    python tests/kernels/end_to_end.py --images 800 --output end_to_end.json

Pretrained weights are quantized without training (hybrid, weights to nearest), then run in two forms: fast, as deployed
with fused blocks; and the reference, the unfused layers by their definitions in plain PyTorch. `real_images` says where
weights and images are looked for.

Two comparisons, since sound programs drift apart: one rounding in a norm changes a code, that the next layer's input,
and blocks later both differ in many codes. *Same codes*: each layer of the reference is given the codes that entered
the fast one, after its own were compared with them (`vit_efficient.engine.fused_run`). In bf16 that reference is the
fused form by the definitions of its kernels, as the unfused layers round to 16 bits in other places. *Whole runs*:
codes, logits and top-1 of both, each on its own; beside it, for scale, the reference against itself on images that are
larger by 2**-23, the smallest change that float32 knows.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from real_images import find, load
from safetensors.torch import load_file
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.engine.backends import defined
from vit_efficient.engine.fused_run import FusedRun, given_codes
from vit_efficient.engine.parts import Layer, comparable, fp8_layers, product, quantized
from vit_efficient.engine.tally import Tally, relative
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fused_linear import Codes
from vit_efficient.quantization.int8 import Int8Config

LOGITS, TOP1 = 1e-2, 0.995  # of whole runs
QUICK = CalibrationConfig(rounding="nearest", importance=False)
SCHEMES: dict[str, Callable[[], Any]] = {
    "int8": lambda: Int8Config(activations="hybrid", calibration=QUICK),
    "fp8": lambda: Fp8Config(activations="hybrid", calibration=QUICK),
}


Run = tuple[Tensor, dict[str, Codes]]  # logits, and what entered each layer


def deployed(weights: Path, scheme: str, images: Tensor) -> nn.Module:
    """ViT-Ti, quantized without training on the images' device."""
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(weights))
    swap_attention(model, SdpaConfig().build())
    config = SCHEMES[scheme]()
    config.apply(model, compute_dtype=torch.float32)
    model.to(images.device)
    calibrate(model, list(images.split(16)), QUICK)
    config.finalize(model)
    return model.eval()


@torch.no_grad()
def reference(model: nn.Module, images: Tensor) -> Run:
    """Logits (B, C) of the definition, float32, and what entered each layer."""
    entered: dict[str, Codes] = {}

    def answer(name: str, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
        entered[name] = Codes(*quantized(layer, x))
        return product(layer, *entered[name], dtype)

    with defined(model, answer):
        return model(images).float(), entered


@dataclass
class Whole:
    """Two programs, each on its own, over all images."""

    ours: list[Tensor] = field(default_factory=list)
    theirs: list[Tensor] = field(default_factory=list)
    equal: int = 0
    total: int = 0

    def add(self, logits: Tensor, codes: dict[str, Codes], others: Tensor, other_codes: dict[str, Codes]) -> None:
        self.ours.append(logits.cpu())
        self.theirs.append(others.cpu())
        for name, one in codes.items():
            same = comparable(one.values) == comparable(other_codes[name].values)
            self.equal, self.total = self.equal + int(same.sum()), self.total + same.numel()

    def figures(self) -> dict[str, float]:
        ours, theirs = torch.cat(self.ours), torch.cat(self.theirs)
        return {
            "codes_equal": self.equal / self.total,
            "logits_error": relative(ours, theirs),
            "top1_agreement": float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        }


class Measurement:
    """The fast model in one dtype, against the reference in the same and in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.exact, self.own, self.dtype = model, copy.deepcopy(model).to(dtype), dtype
        self.fast = FusedRun(self.own)
        self.layers: dict[str, Tally] = {}
        self.given = 0.0
        self.whole: dict[str, Whole] = {}

    def add(self, images: Tensor) -> None:
        """Take in a batch (B, 3, S, S) float32."""
        given, exact = images.to(self.dtype), reference(self.exact, images)
        fast = self.fast(given), self.fast.entered
        own = reference(self.own, given)

        def see(name: str, codes: Tensor, wanted: Tensor) -> None:
            tally = self.layers.setdefault(name, self._tally(name))
            tally.add_codes(codes, wanted, comparable(own[1][name].values).cpu())

        if self.dtype == torch.float32:
            on_same = given_codes(self.own, given, self.fast.entered, see)
            self._whole("fast against reference", fast, exact)
            self._whole("reference on larger images", reference(self.exact, images * (1 + 2**-23)), exact)
        else:
            on_same = self.fast.by_definition(given, see)
            self._whole("fast against reference in float32", fast, exact)
            self._whole("fast against reference in this dtype", fast, own)
            self._whole("reference in this dtype against float32", own, exact)
        self.given = max(self.given, relative(fast[0], on_same))

    def _tally(self, name: str) -> Tally:
        tally = self.fast.tally(name)
        if self.dtype != torch.float32 and fp8_layers(self.own):
            # A scale one bit of bfloat16 apart moves a whole row of codes: on an H200 up to 6.6 % of a layer's.
            tally.least = 1 - 3 * (1 - tally.least)
        return tally

    def _whole(self, what: str, one: Run, other: Run) -> None:
        self.whole.setdefault(what, Whole()).add(*one, *other)

    def figures(self) -> dict[str, Any]:
        """For the record: shares of 1, and errors of norms."""
        total, equal = (sum(getattr(one, what) for one in self.layers.values()) for what in ("total", "equal"))
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "same_codes": {
                "codes_equal": equal / total,
                "logits_error": self.given,
                "layers": {
                    name: {
                        "codes_equal": one.share,
                        "largest_difference": one.largest,
                        "bound": 1.0 if one.exact else one.least,
                        "off_by": 0 if one.exact else one.off_by,
                        "holds": one.breach() is None,
                        "codes_equal_in_whole_runs": one.running / one.total,
                    }
                    for name, one in self.layers.items()
                },
            },
            "whole_runs": {name: one.figures() for name, one in self.whole.items()},
        }


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The record for a person to read, in 80 columns."""
    first, *_ = measured = record["measurements"]
    yield f"{record['device']}, {record['scheme']}, {record['images']} images, torch {record['torch']}"
    yield "codes entering each layer, fast against reference: equal on the same codes,"
    yield "largest difference, equal in whole runs"
    yield " " * 20 + "".join(f"{one['dtype']:<30}" for one in measured)
    for name in first["same_codes"]["layers"]:
        cells = [one["same_codes"]["layers"][name] for one in measured]
        shown = "".join(
            f"{percent(one['codes_equal']):>11} {one['largest_difference']:>3}"
            f" {percent(one['codes_equal_in_whole_runs']):>11}   "
            for one in cells
        )
        yield f"{name:<20}{shown}".rstrip()
    for one in measured:
        same, whole = one["same_codes"], one["whole_runs"]
        yield f"{one['dtype']}, same codes: {percent(same['codes_equal'])}, logits {same['logits_error']:.1e}"
        for what, figures in whole.items():
            yield f"  {what}:"
            yield (
                f"    codes {percent(figures['codes_equal'])}, logits {figures['logits_error']:.1e}, "
                f"top-1 {percent(figures['top1_agreement'])}"
            )
    yield "bounds, same codes:"
    for one in measured[:1]:
        for bound in sorted({(layer["bound"], layer["off_by"]) for layer in one["same_codes"]["layers"].values()}):
            kept = [name for name, layer in one["same_codes"]["layers"].items() if layer["bound"] == bound[0]]
            yield f"  {100 * bound[0]:.2f} % of each of {len(kept)} layers ({kept[0]} ..), off by {bound[1]}"
    for one in measured:
        broken = [name for name, layer in one["same_codes"]["layers"].items() if not layer["holds"]]
        yield f"  {one['dtype']}: " + (f"broken at {', '.join(broken)}" if broken else "held")
    whole = first["whole_runs"]["fast against reference"]
    yield "bounds, whole runs in float32"
    yield f"  logits within {LOGITS:.0e}: {held(whole['logits_error'] <= LOGITS)}"
    yield f"  same top-1 on {100 * TOP1:.1f} %: {held(whole['top1_agreement'] >= TOP1)}"


def held(holds: bool) -> str:
    return "held" if holds else "not held"


def percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"


def main() -> int:
    """0 if every layer keeps its bound on the same codes, else 1; 2 without weights and images."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--images", type=int, default=800, metavar="N")
    words.add_argument("--calibration", type=int, default=64, metavar="N", help="images to calibrate on, of 200")
    words.add_argument("--batch", type=int, default=100, metavar="N")
    words.add_argument("--scheme", choices=SCHEMES, default="int8")
    words.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    words.add_argument("--output", type=Path, metavar="FILE.json")
    options = words.parse_args()
    found = find()
    if isinstance(found, str):
        print(found, file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding: float32 means float32 here
    calibration, images = load(found[1], options.images, options.calibration)
    model = deployed(found[0], options.scheme, calibration.to(options.device))
    measurements = [Measurement(model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for batch in images.split(options.batch):
        for one in measurements:
            one.add(batch.to(options.device))
    on_gpu = torch.device(options.device).type == "cuda"
    record = {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "scheme": options.scheme,
        "images": len(images),
        "calibration_images": len(calibration),
        "fused": measurements[0].fast.report.lines(),
        "measurements": [one.figures() for one in measurements],
    }
    for line in lines(record):
        print(line)
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    layers = [layer for one in record["measurements"] for layer in one["same_codes"]["layers"].values()]
    return 0 if all(layer["holds"] for layer in layers) else 1


if __name__ == "__main__":
    sys.exit(main())
