"""`python -m vit_efficient.prepare SOURCE [PATH] --out DIR`: images to webdataset shards."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from vit_efficient.bars import progress
from vit_efficient.cli import Parser, run_command
from vit_efficient.data import manifest as manifests
from vit_efficient.data.encode import Recode
from vit_efficient.data.indexing import index_pattern
from vit_efficient.data.manifest import Manifest, read_manifest
from vit_efficient.data.preparation import DEFAULT_SIZE, Options, prepare_source
from vit_efficient.data.shard_writer import ShardSize
from vit_efficient.data.sources.base import Inputs
from vit_efficient.data.sources.config import SourceConfig
from vit_efficient.data.verify import verify_folder
from vit_efficient.errors import UserError
from vit_efficient.machine import cores

_MOST_REASONS = 5

EXAMPLES = """\
examples:
  prepare digits --out data/digits
  prepare cifar10 cifar-10-binary.tar.gz --out data/cifar10
  prepare folder photos/ --val-fraction 0.1 --out data/photos
  prepare imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
      --devkit ILSVRC2012_devkit_t12.tar.gz --out data/in1k
  prepare tiny_imagenet tiny-imagenet-200.zip --out data/tiny_imagenet
  prepare csv photos.csv --val-fraction 0.1 --out data/photos
  prepare parquet beans/data --label-column labels --out data/beans
  prepare index 'shards/x-{000000..000099}.tar'
  prepare --verify data/in1k
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, say what was made."""
    sources = {config.model_fields["name"].default: config for config in get_args(get_args(SourceConfig)[0])}
    parser = _parser([*sources, "index"])
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    console = Console(stderr=True)
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes {args.processes}: expected at least 1")
    processes = args.processes or cores()
    if args.verify is not None:
        if args.source is not None:
            raise UserError("--verify DIR stands alone: python -m vit_efficient.prepare --verify data/in1k")
        _only("--verify", given, "verify", "no_decode", "processes")
        return _verify(args, console, processes)
    if args.no_decode:
        raise UserError("--no-decode belongs to --verify DIR")
    if args.source is None:
        raise UserError(f"prepare needs a SOURCE: {', '.join([*sources, 'index'])}; or --verify DIR")
    if args.source == "index":
        _only("index", given, "source", "path", "classes", "processes")
        return _index(args, console, processes)
    if args.out is None:
        raise UserError(f"prepare {args.source} needs --out DIR, the folder to write the shards to")
    if args.classes:
        raise UserError("--classes belongs to `prepare index`; a source knows its class names")
    if not 0 <= args.max_bad <= 1:
        raise UserError(f"--max-bad {args.max_bad:g}: expected a share, 0 to 1")
    options = Options(
        val_fraction=args.val_fraction,
        seed=args.seed,
        size=args.shard_size,
        max_bad=args.max_bad,
        recode=_recode(args),
        processes=processes,
        patience=1.0 if args.processes is None else 0.0,
    )
    try:
        with progress(console, "images") as report:
            made = prepare_source(sources[args.source]().open(_inputs(args)), args.out, options, report)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from the last whole shard.")
        return 130
    _tell(made, str(args.out), report.parts)
    return 0


def _index(args: argparse.Namespace, console: Console, processes: int) -> int:
    if args.path is None:
        raise UserError("index takes a pattern: prepare index 'shards/x-{000000..000099}.tar'")
    names = _class_names(args.classes) if args.classes else None
    with progress(console, "shards") as report:
        made = {"index": index_pattern(args.path, names, report, processes)}
    _tell(made, args.path, report.parts)
    return 0


def _verify(args: argparse.Namespace, console: Console, processes: int) -> int:
    """Check folders; faults go to standard output, a line each, and the exit code is 2 if there are any."""
    folder: Path = args.verify
    parts = [folder / name for name in ("train", "val") if (folder / name).is_dir()]
    if (folder / manifests.NAME).is_file() or not parts:
        parts = [folder]
    faults = 0
    with progress(console, "shards") as report:
        for part in parts:
            for fault in verify_folder(part, report, processes, decode=not args.no_decode):
                print(fault, flush=True)
                faults += 1
    if faults:
        print(f"{folder}: {faults} fault{'s' * (faults != 1)}; copy or prepare what is named again.")
        return 2
    made = [read_manifest(part) for part in parts]
    samples, shards = sum(one.samples for one in made), sum(len(one.shards) for one in made)
    decoded = "" if args.no_decode else ", every image decodes"
    print(f"{folder}: {samples:,} samples in {shards:,} shards are as they were written{decoded}.")
    return 0


def _only(what: str, given: set[str], *taken: str) -> None:
    """Refuse options that `what` has no use for."""
    if unused := sorted(given.difference(taken)):
        flags = ", ".join("PATH" if name == "path" else "--" + name.replace("_", "-") for name in unused)
        raise UserError(f"{what} has no use for {flags}. Leave that out.")


def _recode(args: argparse.Namespace) -> Recode:
    if args.shortest_side is None:
        if args.quality is not None:
            raise UserError("--quality belongs to --shortest-side: what is not resized is not encoded again")
        return Recode()
    if args.shortest_side < 1:
        raise UserError(f"--shortest-side {args.shortest_side}: expected pixels, at least 1")
    quality = Recode().quality if args.quality is None else args.quality
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: expected 1 to 100")
    return Recode(args.shortest_side, quality)


def _inputs(args: argparse.Namespace) -> Inputs:
    return Inputs(
        path=args.path and Path(args.path),
        train=args.train,
        val=tuple(args.val or ()),
        devkit=args.devkit,
        labels=args.labels,
        image_column=args.image_column,
        label_column=args.label_column,
    )


def parse_size(text: str) -> ShardSize:
    """`10000` samples, or `256MB`, `1GiB` of bytes.

    Raises:
        UserError: neither.
    """
    match = re.fullmatch(r"(\d+)\s*(?:([kMG])(i?)B)?", text)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--shard-size {text}: expected a number of samples (10000) or bytes (256MB, 1GiB)")
    if match[2] is None:
        return ShardSize(samples=int(match[1]))
    return ShardSize(bytes=int(match[1]) * (1024 if match[3] else 1000) ** ("kMG".index(match[2]) + 1))


def _class_names(path: Path) -> tuple[str, ...]:
    """One name a line, in the order of the labels."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _parser(sources: list[str]) -> Parser:
    parser = Parser(
        prog="python -m vit_efficient.prepare",
        description="Turn images into webdataset shards with a manifest and an offset index.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="?", choices=sources, metavar="SOURCE", help=f"{', '.join(sources)}")
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder, archive or file; for `index` a brace pattern")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where train/ and val/ are written")
    parser.add_argument("--train", type=Path, metavar="TAR", help="imagenet: the official training archive")
    parser.add_argument("--val", type=Path, nargs="+", metavar="TAR", help="imagenet: the official validation archive")
    parser.add_argument("--devkit", type=Path, metavar="TAR", help="imagenet: development kit, for the labels of --val")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="imagenet: image,synset for --val, instead")
    parser.add_argument("--image-column", metavar="NAME", help="csv, parquet: column of images (default path, image)")
    parser.add_argument("--label-column", metavar="NAME", help="csv, parquet: column of labels (default label)")
    parser.add_argument("--val-fraction", type=float, metavar="F", help="share of each class to set aside as val")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of what is set aside (default 0)")
    parser.add_argument(
        "--shard-size", type=parse_size, default=DEFAULT_SIZE, metavar="N", help="samples, or bytes (default 256MiB)"
    )
    parser.add_argument(
        "--max-bad", type=float, default=0.01, metavar="F", help="share of unusable images that stops it (default 0.01)"
    )
    parser.add_argument(
        "--shortest-side", type=int, metavar="PIXELS", help="resize images whose shorter side is longer, as JPEG"
    )
    parser.add_argument("--quality", type=int, metavar="Q", help="of those JPEGs, 1 to 100 (default 92)")
    parser.add_argument("--processes", type=int, metavar="N", help="that share the work (default: a core each)")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check shards down to every byte, and stop")
    parser.add_argument("--no-decode", action="store_true", help="verify: do not decode the images")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="index: class names by label, one a line")
    return parser


def _tell(made: dict[str, Manifest], where: str, written: Container[str]) -> None:
    for name, manifest in made.items():
        size = sum(shard.bytes for shard in manifest.shards)
        shards = f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) != 1)}"
        left_out = f", {len(manifest.left_out)} left out" if manifest.left_out else ""
        before = "" if name in written else " (complete already, kept as it is)"
        print(
            f"{name}: {manifest.samples:,} images of {len(manifest.class_names):,} classes in {shards}, "
            f"{size / 1e6:,.1f} MB{left_out}{before}"
        )
        for reason, number in Counter(item.reason for item in manifest.left_out).most_common(_MOST_REASONS):
            print(f"    left out, {number:,}: {reason}")
        if manifest.left_out:
            print(f"    all of them by name: left_out in {Path(where) / name / manifests.NAME}")
    print(f"use them with {shlex.quote(f'data.shards={where}')}")


if __name__ == "__main__":
    run_command(main)
