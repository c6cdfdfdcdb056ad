"""What every command of `python -m vit_efficient.COMMAND` shares: its words, its errors, its exit codes.

Exit codes:
    0    done
    1    a fault of ours: a traceback says where
    2    something that the user can mend: a message says what, and no traceback is shown
    75   another process of the run died or failed; this one ended with it (docs/faults.md)
    76   the run got nowhere for too long and was ended (docs/faults.md)
    130  interrupted (Ctrl-C)
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vit_efficient.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130
PEER_LOST = 75
STALLED = 76

EPILOG = (
    "key=value words override the recipe, in any order and anywhere among the options: optim.lr=1e-4, "
    "protocol=cifar10, attention=flash2, data.workers=null. docs/recipes.md lists every key. "
    "Exit codes: 0 done, 2 a mistake that you can mend, 75 another process died, 76 no progress, 130 interrupted, "
    "1 a fault of this program."
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a UserError, like any other mistake."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = f"there is no option {unknown.split()[0].partition('=')[0]}"
            if "=" in unknown or "." in unknown:
                message += "; overrides are written without dashes, such as optim.lr=1e-4"
        raise UserError(f"{message}\n{self.format_usage().strip()}\n`{self.prog} --help` explains them.")


def above_zero(text: str) -> int:
    """The type of a word that counts something: a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def base_parser(command: str, description: str, *, several: bool = False, required: bool = True) -> Parser:
    """The words that commands on a recipe have in common; parse with `parse_intermixed_args`.

    Args:
        command: module name in the package, such as ``fit``.
        description: one sentence for ``--help``.
        several: whether ``--recipe`` may be repeated; `recipe` is then a list.
        required: whether there must be a ``--recipe``; where a run's folder can stand for it, there need not.

    Returns:
        A parser whose result has `recipe` (name or path) and `overrides` (list of ``key=value``).
    """
    parser = Parser(
        prog=f"python -m vit_efficient.{command}", description=description, epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "--recipe",
        required=required,
        metavar="R",
        action="append" if several else "store",
        help="a variant by name (int8_sdpa) or path (recipes/int8_sdpa.yaml), or a run's recipe.yaml"
        + ("; may be repeated" if several else ""),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser


def output_file(text: str) -> Path:
    """For ``type=`` of an option that names a file to write: that it can be written is known before the work begins."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from None
    return path


def show_error(error: UserError) -> None:
    """Print a user's mistake on stderr, legible with and without colours. Lines are never broken."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), str(error))
    text.highlight_regex(r"(?m)^  [^\s:]+(?=: )", "bold")
    text.highlight_regex(r"(?m)^    (set in|allowed|did you mean)", "dim")
    text.highlight_regex(r"(?m)(?<=^    did you mean ).*(?=\?$)", "green")
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with the code that fits how it ended."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        show_error(error)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
