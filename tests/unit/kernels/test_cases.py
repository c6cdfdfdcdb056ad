"""What is tuned and timed: the forms that models call, and the command line of the tuner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.engine.contenders import build_contender, load_entry
from vit_efficient.engine.entries import Entry
from vit_efficient.errors import UserError
from vit_efficient.kernels import tune
from vit_efficient.kernels.cases import FORMS, OPS, block_layers, forms_of, linear_case, tile_name
from vit_efficient.kernels.tuning import Shape, choose
from vit_efficient.machine import detect
from vit_efficient.measure import attention, attention_cases, kernels

CPU = torch.device("cpu")
WIDTH, HIDDEN, TOKENS = 48, 192, 17
SMALL = (
    "model.kwargs={patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3}", "model.image_size=32",
    "model.num_classes=10", "strategy.accelerator=cpu",
)  # fmt: skip


class Seen(TorchDispatchMode):
    """Notes each call of the linear operators, as (inputs, outputs) and the name of its form."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, int, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "vit_efficient" and name.startswith("linear"):
            form = name.removeprefix("linear").removeprefix("_") or "plain"
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            if given.get("gelu"):
                form = "gelu" if form == "plain" else f"gelu_{form}"
            outputs, inputs = given["q_NK"].shape
            self.found.add((inputs, outputs, form))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int8_sdpa", ()),
        ("int8_static_sdpa", ()),
        ("int8_static_sdpa", ("quantization.activations=hybrid", "quantization.attention=dynamic")),
        ("fp8_sdpa", ()),
    ],
)
def test_every_form_that_a_fused_model_calls_is_tuned_and_timed(source: str, words: tuple[str, ...]) -> None:
    entry = Entry(source, words)
    built = build_contender(entry, load_entry(entry, SMALL, detect()), lambda text: None)
    images = torch.randn(2, 3, 32, 32, dtype=built.dtype)
    with Seen() as seen:
        built.prepare(images)(images)
    layers = block_layers("int8_linear", 2, TOKENS, WIDTH, HIDDEN).values()
    known = {(layer.shape.inputs, layer.shape.outputs, form) for layer in layers for form in layer.forms}
    assert len(seen.found) == 4, "one form of each of the four layers"
    assert seen.found <= known


def test_the_layers_of_a_block() -> None:
    shapes = {name: str(layer.shape) for name, layer in block_layers("int8_linear", 256, 197, 1024, 4096).items()}
    assert shapes == {
        "qkv": "50432x1024x3072", "proj": "50432x1024x1024", "fc1": "50432x1024x4096", "fc2": "50432x4096x1024",
    }  # fmt: skip
    assert {layer.forms for layer in block_layers("int4_linear", 1, 197, 1024, 4096).values()} == {("plain",)}


@pytest.mark.parametrize(("op", "form"), [(op, form) for op in OPS for form in forms_of(op)])
def test_every_case_runs(form: str, op: str) -> None:
    result = linear_case(op, form, Shape(6, 64, 384), CPU, tokens=3)()
    first = result[0] if isinstance(result, tuple) else result
    assert isinstance(first, torch.Tensor)
    assert first.numel() == 6 * 384


def test_a_form_that_an_operator_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="int4_linear has no form 'gelu'; it has plain, token"):
        linear_case("int4_linear", "gelu", Shape(6, 64, 384), CPU)


def test_a_smoothed_output_is_another_one() -> None:
    for form in ("quant", "gelu_quant"):
        cases = []
        for smoothed in (False, True):
            torch.manual_seed(0)
            work = linear_case("int8_linear", form, Shape(6, 64, 384), CPU, smoothed=smoothed)
            cases.append(work()[0])  # type: ignore[index]
        assert not cases[0].equal(cases[1])


def test_the_tuner_takes_each_layer_in_each_form_that_models_call() -> None:
    options = tune.parser().parse_args(["--op", "int8_linear", "int4_linear", "--batch", "256", "1"])
    wanted = tune.cases(options)
    forms = [(case.op, case.form, case.shape.outputs) for case in wanted if case.shape.rows == 197]
    assert forms == [
        ("int8_linear", "plain", 3072), ("int8_linear", "heads_quant", 3072), ("int8_linear", "residual", 1024),
        ("int8_linear", "gelu", 4096), ("int8_linear", "gelu_quant", 4096), ("int8_linear", "residual", 1024),
        ("int4_linear", "plain", 3072), ("int4_linear", "plain", 1024), ("int4_linear", "plain", 4096),
        ("int4_linear", "plain", 1024),
    ]  # fmt: skip
    assert len(wanted) == 2 * len(forms)


def test_the_tuner_takes_named_shapes() -> None:
    words = ["--op", "int4_linear", "--forms", "plain", "token", "--shapes", "1x2x3"]
    wanted = tune.cases(tune.parser().parse_args(words))
    assert [(case.form, case.shape) for case in wanted] == [("plain", Shape(1, 2, 3)), ("token", Shape(1, 2, 3))]
    words = ["--op", "int4_linear", "--forms", "residual", "--shapes", "1x2x3"]
    with pytest.raises(UserError, match=r"--forms residual: int4_linear has no such form\. It has plain, token"):
        tune.cases(tune.parser().parse_args(words))


def test_outputs_that_are_not_whole_heads_are_refused() -> None:
    for words in (["--width", "224"], ["--forms", "plain", "heads", "--shapes", "6x64x672"]):
        with pytest.raises(UserError, match="672 outputs are not queries, keys and values of heads that are 64 wide"):
            tune.cases(tune.parser().parse_args(words))
    assert tune.cases(tune.parser().parse_args(["--width", "224", "--op", "int4_linear"]))
    with pytest.raises(UserError, match="heads_quant at 6x64x672"):
        linear_case("int8_linear", "heads_quant", Shape(6, 64, 672), CPU)


def test_tiles_are_kept_under_the_names_that_kernels_look_up() -> None:
    assert tile_name("int8_linear", "gelu") == "int8_linear.gelu"
    assert tile_name("int4_linear", "token") == "int4_linear"
    for op in OPS:
        for rows in (1, 197, 50432):
            shape = Shape(rows, 1024, 4096)
            assert choose(tile_name(op, "plain"), CPU, shape)
            tiles = tune.candidates(op, shape)
            assert len(set(tiles)) == len(tiles)
            if op == "int4_linear":
                assert {(tile.block_k, tile.group, tile.parts) for tile in tiles} == {(64, 8, 1)}, "what it looks at"


def test_all_forms_can_be_named() -> None:
    for form in FORMS:
        assert tune.parser().parse_args(["--forms", form, "--shapes", "1x2x3"]).forms == [form]


NOT_ABOVE_0 = (
    ["--batch", "0"], ["--batch", "8", "-1"], ["--tokens", "-1"], ["--width", "0"], ["--hidden", "0"],
)  # fmt: skip


@pytest.mark.parametrize("words", [*NOT_ABOVE_0, ["--processes", "0"], ["--shapes", "0x0"], ["--shapes", "1x0x3"]])
def test_the_tuner_takes_numbers_above_0_only(words: list[str]) -> None:
    text = "is no MxKxN" if "0x0" in words else "not above 0"
    with pytest.raises(UserError, match=f"argument {words[0]}: .*{text}"):
        tune.parser().parse_args(words)


@pytest.mark.parametrize("words", [*NOT_ABOVE_0, ["--repetitions", "0"]])
def test_timings_of_kernels_take_numbers_above_0_only(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"argument {words[0]}: .* is not above 0"):
        kernels.parser().parse_args(words)


@pytest.mark.parametrize("words", [["--heads", "16", "0"], ["--width", "-64"], ["--repetitions", "0"]])
def test_timings_of_attention_take_numbers_above_0_only(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"argument {words[0]}: .* is not above 0"):
        attention.parser().parse_args(words)
    with pytest.raises(UserError, match="--shapes 0x8: neither"):
        attention_cases.cases(["0x8"], [16], 64)
