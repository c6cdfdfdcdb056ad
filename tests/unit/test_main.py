"""`python -m vit_efficient`: the commands, and what this machine can run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vit_efficient
from vit_efficient.__main__ import COMMANDS, commands, machine_table, variants
from vit_efficient.machine import Gpu, Machine
from vit_efficient.recipe import files

PACKAGES = {"torch": "2.11", "bitsandbytes": "0.50.2", "peft": "0.21.2", "flash-attn": "2.8.3"}
T4 = Machine((Gpu("Tesla T4", (7, 5), 16 << 30),), "535.1", 8, PACKAGES)
A100 = Machine((Gpu("NVIDIA A100", (8, 0), 40 << 30),) * 2, "580.1", 64, PACKAGES)


def text(table: Table, width: int = 200) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def rows(table: Table) -> dict[str, str]:
    """Lines by their first word; continuation lines belong to the word above."""
    found: dict[str, str] = {}
    for line in text(table).splitlines()[1:]:
        if not line.startswith(" "):
            name = line.split()[0]
        found[name] = found.get(name, "") + " " + line
    return found


def test_every_command_is_listed_and_exists() -> None:
    package = Path(vit_efficient.__file__).parent
    modules = {path.stem for path in package.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert modules - {"__main__"} == set(COMMANDS)
    assert set(rows(commands())) == set(COMMANDS)


def test_what_this_machine_is() -> None:
    found = text(machine_table(A100))
    assert "GPU 1    " in found
    assert "NVIDIA A100, sm_80, 40 GiB" in found
    assert "580.1" in found
    lines = rows(machine_table(A100))
    assert "2.8.3" in lines["flash-attn"]
    assert "absent: pip install deepspeed" in lines["deepspeed"]
    assert "missing: pip install timm" in lines["timm"]


def test_which_variants_run_where() -> None:
    here = rows(variants(A100))
    assert set(here) == set(files.names("variant"))
    assert {name for name, line in here.items() if " yes " not in line} == {"fp8_sdpa"}
    assert "sm_80" in here["fp8_sdpa"]
    assert "bf16 on the GPU" in here["int8_flash2"]
    old = rows(variants(T4))
    assert {name for name, line in old.items() if " no " in line} == {"fp8_sdpa", "int8_flash2", "int4_flash2"}
    assert "sm_75" in old["int8_flash2"]
    assert "smaller on a Tesla T4, not faster" in old["int8_sdpa"]
    assert "absent, needed for attention=flash2" in text(machine_table(Machine(cores=2)))


def test_the_page_fits_a_terminal() -> None:
    for table in (commands(), machine_table(T4), variants(T4)):
        assert max(len(line.rstrip()) for line in text(table, width=100).splitlines()) <= 100


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vit_efficient", *words], capture_output=True, text=True, check=False, timeout=240
    )


def test_the_command() -> None:
    ran = run()
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    for word in (*COMMANDS, "cores", "torch", "int8_sdpa", "flash-attn"):
        assert word in ran.stdout


def test_a_command_written_as_a_word() -> None:
    ran = run("fit", "--recipe", "int8_sdpa")
    assert ran.returncode == 2
    assert "python -m vit_efficient.fit --help" in ran.stderr


def test_a_word_that_is_no_command() -> None:
    ran = run("evalute", "model.safetensors")
    assert ran.returncode == 2
    assert "no command 'evalute'. Did you mean evaluate?" in ran.stderr
    assert all(name in ran.stderr for name in COMMANDS)
