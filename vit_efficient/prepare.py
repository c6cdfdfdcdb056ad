"""`python -m vit_efficient.prepare SOURCE [PATH] --out DIR`: images to webdataset shards."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vit_efficient.cli import Parser, run_command
from vit_efficient.data.indexing import index_pattern
from vit_efficient.data.manifest import Manifest
from vit_efficient.data.preparation import DEFAULT_SIZE, Options, prepare_source
from vit_efficient.data.preparation import Progress as Report
from vit_efficient.data.shards import ShardSize
from vit_efficient.data.sources.base import Inputs
from vit_efficient.data.sources.config import SourceConfig
from vit_efficient.errors import UserError

EXAMPLES = """\
examples:
  prepare digits --out data/digits
  prepare cifar10 cifar-10-binary.tar.gz --out data/cifar10
  prepare folder photos/ --val-fraction 0.1 --out data/photos
  prepare imagenet --train ILSVRC2012_img_train.tar --out data/in1k
  prepare index 'shards/x-{000000..000099}.tar'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, say what was made."""
    sources = {config.model_fields["name"].default: config for config in get_args(get_args(SourceConfig)[0])}
    args = _parser([*sources, "index"]).parse_args(argv)
    console = Console(stderr=True)
    if args.source == "index":
        if args.path is None or args.out is not None or args.train or args.val or args.val_fraction is not None:
            raise UserError("index takes a pattern alone: prepare index 'shards/x-{000000..000099}.tar'")
        names = _class_names(args.classes) if args.classes else None
        with _progress(console, "shards") as (report, tasks):
            made = {"index": index_pattern(args.path, names, report)}
        _tell(made, args.path, tasks)
        return 0
    if args.out is None:
        raise UserError(f"prepare {args.source} needs --out DIR, the folder to write the shards to")
    if args.classes:
        raise UserError("--classes belongs to `prepare index`; a source knows its class names")
    inputs = Inputs(args.path and Path(args.path), args.train, tuple(args.val or ()))
    options = Options(args.val_fraction, args.seed, args.shard_size, args.max_bad)
    with _progress(console, "images") as (report, tasks):
        made = prepare_source(sources[args.source]().open(inputs), args.out, options, report)
    _tell(made, str(args.out), tasks)
    return 0


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
    parser.add_argument("source", choices=sources, metavar="SOURCE", help=f"{', '.join(sources)}")
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder or archive; for `index` a brace pattern")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where train/ and val/ are written")
    parser.add_argument("--train", type=Path, metavar="TAR", help="imagenet: the official training archive")
    parser.add_argument("--val", type=Path, nargs="+", metavar="TAR", help="imagenet: archives of the same layout")
    parser.add_argument("--val-fraction", type=float, metavar="F", help="share of each class to set aside as val")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of what is set aside (default 0)")
    parser.add_argument(
        "--shard-size", type=parse_size, default=DEFAULT_SIZE, metavar="N", help="samples, or bytes (default 256MiB)"
    )
    parser.add_argument(
        "--max-bad", type=float, default=0.01, metavar="F", help="share of unusable images that stops it (default 0.01)"
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="index: class names by label, one a line")
    return parser


class _Speed(ProgressColumn):
    """Items a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _progress(console: Console, unit: str) -> Iterator[tuple[Report, dict[str, TaskID]]]:
    """A bar for each split, as it is reached; warnings appear above the bars."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logger = logging.getLogger("vit_efficient")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=5) as bars:
        tasks: dict[str, TaskID] = {}

        def report(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bars.add_task(split, total=total)
            bars.update(tasks[split], completed=done)

        logger.addHandler(handler)
        try:
            yield report, tasks
        finally:
            logger.removeHandler(handler)


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
    print(f"use them with {shlex.quote(f'data.shards={where}')}")


if __name__ == "__main__":
    run_command(main)
