"""The command line that all commands share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vit_efficient.cli import base_parser, output_file
from vit_efficient.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "r", "optim.lr=1", "data.workers=0", "--dry-run"],
        ["optim.lr=1", "--dry-run", "data.workers=0", "--recipe", "r"],
        ["optim.lr=1", "--recipe=r", "data.workers=0", "--dry-run"],
    ],
)
def test_overrides_may_stand_anywhere(words: list[str]) -> None:
    parser = base_parser("fit", "Test.")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_intermixed_args(words)
    assert (options.recipe, options.overrides, options.dry_run) == ("r", ["optim.lr=1", "data.workers=0"], True)


def test_several_recipes() -> None:
    options = base_parser("compare", "Test.", several=True).parse_intermixed_args(["--recipe", "a", "--recipe", "b"])
    assert options.recipe == ["a", "b"]
    assert options.overrides == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recpie", "r"], "there is no option --recpie"),
        (["--recipe", "r", "--optim.lr=3"], "no option --optim.lr; overrides are written without dashes"),
        (["--recipe", "r", "--rec", "x"], "there is no option --rec"),  # no abbreviations
        (["optim.lr=3"], "required: --recipe"),
        (["--recipe"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(words: list[str], message: str) -> None:
    parser = base_parser("fit", "Test.", required="--recpie" not in words)
    with pytest.raises(UserError, match=message) as caught:
        parser.parse_intermixed_args(words)
    assert "python -m vit_efficient.fit" in str(caught.value)


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = f"from vit_efficient.cli import run_command\nfrom vit_efficient.errors import *\n{body}\nrun_command(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def main(): print('hello')", 0),
        ("def main(): return 3", 3),
        ("def main(): raise CapabilityError('no GPU [here]')", 2),
        ("def main(): raise KeyboardInterrupt", 130),
        ("def main(): raise BrokenPipeError", 0),
        ("def main(): raise SystemExit(7)", 7),
        ("def main(): raise RuntimeError('ours')", 1),
    ],
)
def test_exit_codes(body: str, code: int) -> None:
    ran = run(body)
    assert ran.returncode == code, ran.stderr
    assert ("Traceback" in ran.stderr) == (code == 1)


def test_an_error_is_shown_as_it_is() -> None:
    path = "/data/[train]/" + "x" * 200
    ran = run(
        f"def main(): raise RecipeError([Problem('data.shards', 'is not at {path}', 'a.yaml:3', 'b', 'c'), "
        "Problem('optim.lr', 'is missing')])"
    )
    assert ran.stdout == ""
    assert ran.stderr == (
        "error: 2 mistakes in the recipe\n"
        f"  data.shards: is not at {path}\n"
        "    set in   a.yaml:3\n"
        "    allowed  b\n"
        "    did you mean 'c'?\n"
        "  optim.lr: is missing\n"
    )


def test_an_output_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    words = base_parser("fit", "Words.")
    words.add_argument("--output", type=output_file)
    given = ["--recipe", "r", "--output"]
    made = words.parse_args([*given, str(tmp_path / "new" / "f.json")]).output
    assert made.parent.is_dir()
    assert not made.exists()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "f.json", Path("/proc/nobody/f.json")):
        with pytest.raises(UserError, match=f"{path} cannot be written: "):
            words.parse_args([*given, str(path)])
