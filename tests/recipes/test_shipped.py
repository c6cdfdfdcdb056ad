"""Everything that ships: loads, differs where it should and nowhere else, survives a round trip, is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vit_efficient.machine import Gpu, Machine
from vit_efficient.recipe import files
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.document import SUPPORT, TARGET, document
from vit_efficient.recipe.load import dump_recipe, load_recipe
from vit_efficient.recipe.schema import VARIANT_SECTIONS, Recipe
from vit_efficient.recipe.shape import all_keys
from vit_efficient.recipe.support import page

VARIANTS = (
    "fp32_sdpa", "int8_sdpa", "int8_flash2", "int8_static_sdpa", "w4a8_sdpa", "fp8_sdpa", "int4_sdpa", "int4_flash2",
    "int4_group_sdpa", "lora_sdpa",
)  # fmt: skip
PROTOCOLS = ("digits", "cifar10", "cifar10_vit_ti", "folder", "tiny_imagenet", "imagenet_vit_l16", "dinov3_7b")
PACKAGES = {"bitsandbytes": "0.50.2", "peft": "0.21.2", "flash-attn": "2.8.3"}
NODE = Machine((Gpu("NVIDIA H100", (9, 0), 80 << 30),) * 8, "580", 128, PACKAGES)
FILES = [*files.packaged().glob("*.yaml"), *(files.packaged() / "protocols").glob("*.yaml")]


def test_what_ships() -> None:
    assert set(files.names("variant")) == set(VARIANTS)
    assert set(files.names("protocol")) == set(PROTOCOLS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_under_every_protocol(variant: str, protocol: str, tmp_path: Path) -> None:
    loaded = load_recipe(variant, [f"protocol={protocol}", "data.shards=somewhere"])
    assert (loaded.recipe.variant, loaded.recipe.protocol) == (variant, protocol)
    assert loaded.notes == []
    assert check(loaded.recipe, NODE) == []
    resolved, _ = resolve(loaded.recipe, NODE)
    for recipe in (loaded.recipe, resolved):
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(str(path)).recipe == recipe


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_variants_under_one_protocol_differ_in_the_variant_only(protocol: str) -> None:
    def held_equal(variant: str) -> dict[str, object]:
        recipe = load_recipe(variant, [f"protocol={protocol}"]).recipe
        return recipe.model_dump(exclude={"variant", *VARIANT_SECTIONS})

    first, *others = map(held_equal, VARIANTS)
    assert all(other == first for other in others)
    assert set(first) == set(Recipe.model_fields) - {"variant", *VARIANT_SECTIONS}


def test_variants_differ_from_each_other() -> None:
    def own(variant: str) -> str:
        return load_recipe(variant).recipe.model_dump_json(include=set(VARIANT_SECTIONS))

    assert len(set(map(own, VARIANTS))) == len(VARIANTS)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_attention_alone_tells_sdpa_from_flash2(scheme: str) -> None:
    sdpa, flash2 = (resolve(load_recipe(f"{scheme}_{name}").recipe, NODE)[0] for name in ("sdpa", "flash2"))
    assert sdpa.quantization == flash2.quantization  # the precision too
    assert sdpa.attention != flash2.attention


def test_lora_is_int4_without_the_4_bits() -> None:
    int4, lora = (load_recipe(name).recipe for name in ("int4_sdpa", "lora_sdpa"))
    assert int4.quantization.lora == lora.quantization.lora  # type: ignore[union-attr]
    assert int4.attention == lora.attention


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_opens_with_what_to_expect(path: Path) -> None:
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))
    assert head.startswith(f"# {path.stem}: ")
    for label in ("hardware", "time", "top-1", "command"):
        assert re.search(rf"^# {label} {{2,}}\S", head, re.MULTILINE), f"{path.name} does not say {label}"
    commands = re.findall(r"python -m vit_efficient\.(?:fit|quantize) --recipe (\S+)(?: protocol=(\w+))?", head)
    assert commands
    for recipe, protocol in commands:
        load_recipe(recipe, [f"protocol={protocol}"] if protocol else [])


def test_the_documentation_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), "run `make docs`"
    assert SUPPORT.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_key_is_documented() -> None:
    page = TARGET.read_text(encoding="utf-8")
    assert [path for path in map(".".join, all_keys()) if f"| `{path}` |" not in page] == []


HEAVY = "timm lightning peft bitsandbytes flash_attn torchvision sklearn torchmetrics tensorboard matplotlib"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vit_efficient", f"torch pydantic numpy rich yaml {HEAVY}"),
        ("vit_efficient.recipe.schema", HEAVY),
        ("vit_efficient.recipe.load", HEAVY),
        ("vit_efficient.recipe.compat", HEAVY),
    ],
)
def test_imports_stay_lean(module: str, absent: str) -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        f"import {module}\n"
        "took = time.process_time() - start\n"
        f"loaded = [name for name in {absent.split()} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        f"assert {module != 'vit_efficient'} or took < 1, took\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_support_page_says_where_a_quantized_model_runs() -> None:
    """fp8 from sm_89 on; weights alone anywhere, though nothing of them can be trained."""
    table = page().partition("## Running a quantized model")[2]
    rows = {line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" | ")[1:] for line in table.splitlines()}
    assert rows["fp8"] == ["fp32", "no (3)", "no (4)", "bf16", "bf16"]
    assert rows["int4, groups"] == ["fp32", "fp16", "bf16", "bf16", "bf16"]
    assert "no fp8 matrix units" in table
