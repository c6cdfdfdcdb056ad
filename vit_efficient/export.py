"""Make other files of a trained run.

python -m vit_efficient.export merge RUN --out FILE.safetensors     adapters and base become one plain model
python -m vit_efficient.export onnx MODEL --out FILE.onnx           an integer model for ONNX Runtime, the same codes
python -m vit_efficient.export consolidate RUN --out FILE.safetensors   the weights of a checkpoint, in parts or not
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vit_efficient.cli import Parser, run_command
from vit_efficient.errors import UserError

IMAGES = 1000  # that the loss of quantizing again is measured on, unless told otherwise

EXAMPLES = """\
examples:
  export merge runs/int4_sdpa-digits-20260101-120000 --out merged.safetensors
  export merge RUN --out merged.safetensors --precision bf16
  export merge RUN --out again_in_4_bits.safetensors --requantize --shards data/in1k/val
  evaluate --checkpoint merged.safetensors
  export onnx runs/int8_sdpa-digits-20260101-120000 --out model.onnx
  export consolidate runs/fp32_sdpa-imagenet_vit_l16-4242 --out weights.safetensors
"""


def parser() -> Parser:
    """The command line of `export`."""
    words = Parser(
        prog="python -m vit_efficient.export",
        description="Make other files of a trained run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = words.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    merge = what.add_parser(
        "merge",
        help="adapters (LoRA, DoRA, rsLoRA) and their base become one plain model",
        description="Merge adapters into their base, dequantized if need be, check that the answers are the same, and "
        "write a model file that needs neither.",
        allow_abbrev=False,
    )
    merge.add_argument("source", metavar="RUN_OR_MODEL", help="a run's folder, its model.safetensors, or a checkpoint")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")
    merge.add_argument(
        "--precision", choices=["bf16", "fp32"], help="of the float layers; unset: bf16 if the run was, or else fp32"
    )
    merge.add_argument(
        "--requantize", action="store_true", help="quantize the merged weights again, and measure what that loses"
    )
    merge.add_argument("--shards", metavar="DIR", help="images to measure it on; unset: the recipe's evaluation images")
    merge.add_argument("--images", type=int, metavar="N", help=f"how many of them at most (default {IMAGES})")
    merge.add_argument("--base", metavar="FILE", help="the base of a checkpoint, if it has moved; its hash is checked")
    onnx = what.add_parser(
        "onnx",
        help="an integer model (quantization=int8) as ONNX, with the same codes",
        description="Write a deployed integer model as ONNX, its arithmetic spelled out, so that ONNX Runtime makes "
        "the same codes. `quantize --verify` compares them.",
        allow_abbrev=False,
    )
    onnx.add_argument("source", metavar="MODEL", help="a model file of this package, or a finished run's folder")
    onnx.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="the file to write")
    onnx.add_argument(
        "--products",
        choices=["exact", "signed"],
        default="exact",
        help="signed: several times as fast where the processor has VNNI or is an ARM, and wrong on others; "
        "default: right on all",
    )
    weights = what.add_parser(
        "consolidate",
        help="the weights of a checkpoint, whichever strategy wrote it, as one file",
        description="Write the weights of a checkpoint, one file or a folder of parts, as one safetensors file by "
        "timm's names, which `model.weights=` takes. Their moving average, where there is one, as in evaluation. Of a "
        "run with adapters: what was trained; `export merge` makes one model of adapters and base.",
        allow_abbrev=False,
    )
    weights.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest whole one), or a checkpoint"
    )
    weights.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")
    weights.add_argument("--live", action="store_true", help="the weights as trained, not their moving average")
    weights.add_argument(
        "--trust", action="store_true", help="let code run that a folder written by DeepSpeed itself may hold"
    )
    return words


def consolidate(options: argparse.Namespace, console: Console) -> None:
    """Run `export consolidate`."""
    from vit_efficient.engine.trainer import quiet

    quiet()  # before the packages are imported that it is about
    from vit_efficient.engine.consolidate import consolidate as write
    from vit_efficient.engine.merging import check_free
    from vit_efficient.measure.units import size

    check_free(options.out)

    def say(line: str) -> None:
        console.print(f"[bold]{'damaged':>13}[/]  {line}", soft_wrap=True)

    made = write(options.source, options.out, live=options.live, trust=options.trust, say=say)
    kind = "their moving average" if made.averaged else "as trained"
    rows = [
        ("checkpoint", f"{made.path}, step {made.step:,}"),
        ("written", f"{options.out}, {size(made.size)}, {made.tensors} tensors, {kind}"),
    ]
    if made.base is None:
        rows.append(("use it", f"model.weights={options.out}"))
    else:
        rows.append(("note", f"adapters and what else was trained; the base is {made.base}. For one model of both: "
                             f"`python -m vit_efficient.export merge {options.source} --out FILE`"))  # fmt: skip
    for what, text in rows:
        console.print(f"[bold]{what:>13}[/]  {text}", soft_wrap=True)


def onnx(options: argparse.Namespace, console: Console) -> None:
    """Run `export onnx`."""
    from vit_efficient.engine.trainer import quiet

    quiet()  # before the packages are imported that it is about
    from vit_efficient.attention.sdpa import SdpaConfig
    from vit_efficient.engine.deployed import load_file
    from vit_efficient.engine.merging import check_free
    from vit_efficient.engine.onnx_export import export_onnx, floating_layers
    from vit_efficient.engine.rundir import MODEL
    from vit_efficient.measure.units import size

    check_free(options.out, ".onnx")
    path = Path(options.source)
    path = path / MODEL if path.is_dir() else path
    deployed = load_file(path, attention=SdpaConfig())
    floating = len(floating_layers(deployed.model))
    written = export_onnx(deployed.model, deployed.image, options.out, products=options.products)
    side = deployed.image.size
    for what, text in (
        ("written", f"{options.out}, {size(written)}, products {options.products}"),
        ("takes", f"`images` (B, 3, {side}, {side}) float32, normalised with mean {deployed.image.mean} "
                  f"and std {deployed.image.std}; gives `logits` (B, {deployed.model.num_classes})"),
    ):  # fmt: skip
        console.print(f"[bold]{what:>13}[/]  {text}", soft_wrap=True)
    if floating:
        text = (
            f"{floating} layers have quantized weights alone, and ONNX Runtime has no product for them: they are "
            f"floating point in this file, and it is {written / path.stat().st_size:.1f} times as large as the model's"
        )
        console.print(f"[bold]{'note':>13}[/]  {text}", soft_wrap=True)


def merge(options: argparse.Namespace, console: Console) -> None:
    """Run `export merge`."""
    from vit_efficient.engine.trainer import quiet

    quiet()  # before the packages are imported that it is about
    from vit_efficient.engine.merging import check_free, load_source, merge_source
    from vit_efficient.measure.units import size

    if not options.requantize and (options.shards or options.images is not None):
        raise UserError("--shards and --images are for --requantize: a plain merge needs no images.")
    if options.images is not None and options.images < 1:
        raise UserError(f"--images {options.images}: at least one image is needed.")
    check_free(options.out)

    def tell(what: str, text: str) -> None:
        console.print(f"[bold]{what:>13}[/]  {text}", soft_wrap=True)

    source = load_source(options.source, base=options.base)
    tell("merging", f"{source.path}: {source.recipe.model.name}, quantization={source.recipe.quantization.name}")
    made = merge_source(
        source,
        options.out,
        precision=options.precision,
        requantize=options.requantize,
        shards=options.shards,
        images=options.images or IMAGES,
    )
    tell("adapters", f"{made.merged.adapters} merged in float32; {made.merged.dequantized} quantized layers made float")
    tell("answers", f"logits differ from adapters + base by {made.error:.1e} of their norm (8 images of noise)")
    if not made.merged.exact:
        tell("", "of that, most is the base's: LLM.int8 quantizes its inputs too, and a float layer does not")
    if made.loss is not None:
        loss = made.loss
        figures = f"logit SNR {loss.snr_db:.1f} dB, KL {loss.kl:.4f}, agreement {loss.agreement:.1%} (n = {loss.n:,})"
        tell("requantized", f"{made.recipe.quantization.name}; against the merged weights in float32: {figures}")
    tell("written", f"{options.out}, {size(made.size)}, {made.recipe.quantization.precision}")
    tell("as stored", f"logits differ from adapters + base by {made.stored:.1e} of their norm")
    tell("evaluate it", f"python -m vit_efficient.evaluate --checkpoint {options.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    options = parser().parse_args(argv)
    {"merge": merge, "onnx": onnx, "consolidate": consolidate}[options.what](options, Console(highlight=False))


if __name__ == "__main__":
    run_command(main)
