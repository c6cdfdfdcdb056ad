"""A model file that is not what was written is refused, wherever it differs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit_efficient.engine.deployed import digest, load_file, save_deployed
from vit_efficient.errors import CheckpointError
from vit_efficient.model.build import build_model
from vit_efficient.recipe.load import load_recipe

SMALL = "model.kwargs={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 3}"
CLASSES = [str(digit) for digit in range(10)]
WORDS = {
    "int8": ("quantization=int8",),
    "int8 of 4 bits": ("quantization=int8", "quantization.weight_bits=4", "quantization.group=32",
                       "quantization.zero_point=true"),
    "fp8": ("quantization=fp8",),
    "none": ("quantization=none",),
}  # fmt: skip


def write(path: Path, name: str = "int8", *words: str, precision: str = "fp32") -> Path:
    recipe = load_recipe("int8_sdpa", [SMALL, *WORDS[name], f"quantization.precision={precision}", *words]).recipe
    torch.manual_seed(0)
    built = build_model(recipe, len(CLASSES))
    recipe.quantization.finalize(built.model)
    save_deployed(path, built.model, recipe, CLASSES, source={"weights": "w.safetensors", "sha256": "0" * 64})
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digest") / "model.safetensors")


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata())


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_written_is_read(name: str, precision: str, tmp_path: Path) -> None:
    """Every type of tensor there is; and once more, the same file has the same digest."""
    first = write(tmp_path / "a.safetensors", name, precision=precision)
    loaded = load_file(first)
    assert loaded.source == {"weights": "w.safetensors", "sha256": "0" * 64}
    assert loaded.class_names == CLASSES
    assert (
        content(first)[1]["digest"]
        == content(write(tmp_path / "b.safetensors", name, precision=precision))[1]["digest"]
    )


@pytest.mark.parametrize("name", WORDS)
def test_one_flipped_bit_in_any_tensor(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", name)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    for place in (start, len(whole) - 1, *(generator.randrange(start, len(whole)) for _ in range(6))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
            load_file(path)


def test_one_flipped_byte_anywhere_in_the_header(file: Path, tmp_path: Path) -> None:
    """Sizes, names, shapes, offsets, the recipe, the digest itself: never another model, never another error."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    path, generator = tmp_path / "model.safetensors", random.Random(0)
    for place in (*range(8), *(generator.randrange(8, end) for _ in range(300))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_file(path)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_files(left: int, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="damaged"):
        load_file(path)


Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def _swap(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    a, b = "blocks.0.norm1.weight", "blocks.0.norm2.bias"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["norm.weights"] = tensors.pop("norm.weight")


def _cast(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].view(torch.int32)  # the same bytes


def _reshape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.0.attn.proj.weight"] = tensors["blocks.0.attn.proj.weight"].view(48, 12)


def _add(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["extra"] = torch.zeros(1)


def _classes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["class_names"] = json.dumps(CLASSES[::-1])


def _source(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["source"] = json.dumps({"weights": "other.safetensors", "sha256": "1" * 64})


def _scheme(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace('"token"', '"tensor"')


def _undigested(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["digest"]


def _note(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["note"] = "hello"


@pytest.mark.parametrize(
    "change", [_swap, _rename, _cast, _reshape, _add, _classes, _source, _scheme, _undigested, _note]
)
def test_changes_that_keep_the_file_sound(change: Change, file: Path, tmp_path: Path) -> None:
    tensors, metadata = content(file)
    before = dict(tensors), dict(metadata)
    change(tensors, metadata)
    assert (tensors.keys(), metadata) != (before[0].keys(), before[1]) or any(
        tensors[name] is not before[0][name] for name in tensors
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
        load_file(tmp_path / "model.safetensors")


def test_the_order_in_which_things_are_stored_does_not_matter(file: Path) -> None:
    tensors, metadata = content(file)
    assert digest(dict(reversed(tensors.items())), dict(reversed(metadata.items()))) == metadata["digest"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("version", "1", "version '1'; this program reads version"),
        ("version", "999", "version '999'; this program reads version"),
        ("format", "other", "is not a model that this package deployed"),
    ],
)
def test_files_of_another_version_or_program(key: str, value: str, text: str, file: Path, tmp_path: Path) -> None:
    """Said so, and not that they were altered: an older version had no digest."""
    tensors, metadata = content(file)
    metadata[key] = value
    del metadata["digest"]
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=text):
        load_file(tmp_path / "model.safetensors")


def test_plain_weights_are_no_model_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.weights="):
        load_file(tmp_path / "w.safetensors")


def test_a_description_of_another_model_is_refused(file: Path, tmp_path: Path) -> None:
    """By somebody who renews the digest: the recipe says another depth than the tensors have."""
    tensors, metadata = content(file)
    recipe = json.loads(metadata["recipe"])
    recipe["model"]["kwargs"]["depth"] = 2
    metadata["recipe"] = json.dumps(recipe)
    metadata["digest"] = digest(tensors, metadata)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"another model.*blocks\.1\."):
        load_file(tmp_path / "model.safetensors")
