"""The performance model: against the measured rows, against its limits, and in what it may not do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vit_efficient.errors import RecipeError, UserError
from vit_efficient.measure.choose import choose_strategy
from vit_efficient.measure.estimate import machine_of, main, placed, shape_of, table
from vit_efficient.measure.forecast import Forecast, forecast
from vit_efficient.measure.gpus import H200, KINDS, GpuKind, gpu_kind, kind_of
from vit_efficient.measure.layout import Layout, Weights
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import all_reduce, collective_seconds, compute_seconds, gather, ring, step_time, tree
from vit_efficient.measure.scaling_plot import draw, scaling_figure
from vit_efficient.measure.work import Work
from vit_efficient.recipe.load import load_recipe

GIGA = 1e9
VIT_L = Weights(
    1_217_306_528, 0, 304_326_632, 25_192_448, 12_596_224, 9_900_000, 4 * 25_192_448, 24 * 25_192_448, 4 * 12_596_224
)
NARROW = 2 * 304_326_632  # bytes of it as FSDP2 gathers it


def of_images(images: int, half: float, full: float, traffic: float, launches: int) -> Work:
    """ViT-L/16's counts for an image, in 10^9 (test_counts holds them against a count)."""
    attention = 13.35 * GIGA * images
    return Work(half * GIGA * images, full * GIGA * images, 0, attention, traffic * GIGA * images, launches)


def mixed(images: int) -> Work:
    return of_images(images, 357.6, 0, 1.019, 1330)


def subset(images: int, traffic: float) -> Work:
    """Of a step that leaves out what stochastic depth drops, at its rate of 0.2."""
    attention = 12.0 * GIGA * images
    return Work(321.3 * GIGA * images, 0, 0, attention, traffic * GIGA * images, 1722, short=attention)


def narrow(images: int) -> Work:
    return of_images(images, 357.6, 0, 0.615, 789)


# ViT-L/16 at 224, synthetic batches, H200, torch 2.11: images a second and GPU. docs/scaling.md has the conditions.
# Plain loops of PyTorch:
PLAIN = [
    ("fp32, eager", of_images(64, 0, 357.6, 1.229, 787), 64, Layout(), False, 122),
    ("bf16-mixed, eager", mixed(128), 128, Layout(), False, 941),
    ("bf16-mixed, compiled", mixed(256), 256, Layout(), True, 1180),
    ("DDP on one", mixed(128), 128, Layout("ddp", 1), True, 1116),
    ("DDP on two", mixed(128), 128, Layout("ddp", 2), True, 1050),
    ("FSDP2 on one", narrow(128), 128, Layout("fsdp", 1), True, 1144),
    ("FSDP2 on two", narrow(128), 128, Layout("fsdp", 2), True, 1065),
]


# This package's, compiled; stochastic depth leaves out what it drops (docs/results/h200-two.json, h200-training.json).
OWN = [
    ("one", subset(128, 1.406), 128, Layout(), 1284),
    ("step", subset(256, 1.391), 256, Layout(), 1326),
    ("DDP on two", subset(128, 1.406), 128, Layout("ddp", 2), 1201),
    ("FSDP2 on two", subset(128, 1.377), 128, Layout("fsdp", 2), 1220),
]
WAITS = 7e-3  # of a step of the plain loops, for the host


def seconds(work: Work, images: int, layout: Layout, compiled: bool) -> float:
    return step_time(work, layout, VIT_L, H200, images=images, compiled=compiled, gathered=NARROW, blocks=24).seconds


@pytest.mark.parametrize(("name", "work", "images", "layout", "compiled", "measured"), PLAIN, ids=lambda v: str(v)[:24])
def test_plain_loops(name: str, work: Work, images: int, layout: Layout, compiled: bool, measured: float) -> None:
    step = seconds(work, images, layout, compiled) + WAITS
    assert images / step == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize(("name", "work", "images", "layout", "measured"), OWN, ids=lambda v: str(v)[:24])
def test_measured_speed(name: str, work: Work, images: int, layout: Layout, measured: float) -> None:
    assert images / seconds(work, images, layout, True) == pytest.approx(measured, rel=0.02)


def test_one_gpu_has_no_collectives() -> None:
    for kind in ("single", "ddp", "fsdp"):
        assert step_time(mixed(64), Layout(kind), VIT_L, H200, images=64).exposed == 0
    assert all_reduce(GIGA, Layout(), H200) == gather(GIGA, Layout(), H200) == 0


def test_collectives_grow_with_bytes_and_parts() -> None:
    sizes = [all_reduce(size, Layout("ddp", 8, 4), H200) for size in (1e6, 1e8, 1e10)]
    assert sizes == sorted(sizes)
    nodes = [all_reduce(GIGA, Layout("ddp", 8, n), H200) for n in (1, 2, 16, 128)]
    assert nodes == sorted(nodes)
    assert ring(GIGA, 2, GIGA, 0) == pytest.approx(0.5)
    assert ring(GIGA, 1000, GIGA, 0) == pytest.approx(1, rel=0.01), "a ring moves the whole once, however long it is"
    assert tree(8, 1024, GIGA, 1e-5) < 2 * ring(8, 1024, GIGA, 1e-5), "short messages go by trees"


def test_hybrid_shards_spare_the_network() -> None:
    full, hybrid = (Layout("fsdp", 8, 16, hybrid=on) for on in (False, True))
    assert gather(GIGA, hybrid, H200) < gather(GIGA, full, H200)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_more_gpus_are_never_slower_in_all_nor_faster_each(kind: object) -> None:
    assert hasattr(kind, "half")
    total, each = [], []
    for number in (1, 2, 4, 8, 16, 64, 256):
        layout = Layout("ddp", min(8, number), max(1, number // 8)) if number > 1 else Layout()
        step = step_time(mixed(64), layout, VIT_L, kind, images=64)  # type: ignore[arg-type]
        total.append(number * 64 / step.seconds)
        each.append(64 / step.seconds)
    assert total == sorted(total)
    assert each == sorted(each, reverse=True)


def test_few_cores_make_the_gpu_wait() -> None:
    slow, fast = (step_time(mixed(128), Layout(), VIT_L, H200, images=128, compiled=True, cores=n) for n in (1, 8))
    assert fast.waiting == 0
    assert slow.seconds == pytest.approx(128 / 600)


def test_short_attention_is_faster_on_hopper_compiled_alone() -> None:
    work = subset(128, 1.406)
    ampere = replace(H200, capability=(8, 0))
    slow = compute_seconds(replace(work, short=0), H200, compiled=True)
    assert slow - compute_seconds(work, H200, compiled=True) == pytest.approx(0.4 * work.attention / H200.attention)
    assert compute_seconds(work, ampere, compiled=True) == slow
    eager = (compute_seconds(one, H200, compiled=False) for one in (work, replace(work, short=0)))
    assert len(set(eager)) == 1


@pytest.mark.parametrize(
    ("variant", "words", "short"),
    [
        ("fp32_sdpa", ("quantization.precision=bf16",), True),
        ("fp32_sdpa", ("quantization.precision=bf16", "model.image_size=136"), False),
        ("fp32_sdpa", ("quantization.precision=bf16", "model.kwargs.num_heads=2"), False),
        ("fp32_sdpa", ("quantization.precision=bf16", "attention.kernel=efficient"), False),
        ("fp32_sdpa", ("quantization.precision=bf16", "strategy=deepspeed"), False),
        ("fp32_sdpa", ("quantization.precision=fp32",), False),
        ("int8_sdpa", ("quantization.precision=bf16",), False),
        ("lora_sdpa", ("quantization.precision=bf16",), False),
    ],
    ids=["digits", "too long", "too wide", "another kernel", "zero", "fp32", "int8", "lora"],
)
def test_which_attention_counts_as_short(variant: str, words: tuple[str, ...], short: bool) -> None:
    """What `model/late_bias.py` takes: plain layers, SDPA's fastest kernel, 16 bits, 256 tokens, heads of 32 or 64."""
    _, work = Plan(load_recipe(variant, words).recipe, 10).count(2, checkpointing=False, narrow=False)
    assert work.attention > 0
    assert work.short == (work.attention if short else 0)


def test_counts() -> None:
    """Operations by hand: six a weight and token of the layers inside the blocks, and the attention."""
    recipe = load_recipe("fp32_sdpa", ["quantization.precision=bf16"]).recipe
    plan = Plan(recipe, 10)
    _, work = plan.count(8, checkpointing=False, narrow=False)
    tokens, width, depth = 17, 192, 6
    products = 3 * 2 * 8 * tokens * 12 * width**2 * depth
    assert work.half == pytest.approx(products, rel=0.03)
    assert work.attention == 3.5 * 4 * 8 * depth * tokens**2 * width
    _, again = plan.count(8, checkpointing=True, narrow=False)
    assert again.half == pytest.approx((3 + 8 / 12) / 3 * work.half, rel=0.03), "a forward pass more, but for fc2"
    _, twice = plan.count(16, checkpointing=False, narrow=False)
    assert twice.half == pytest.approx(2 * work.half, rel=0.01)


WORDS = ["protocol=cifar10", "quantization.precision=bf16", "model.kwargs.depth=2"]


def on(number: int, plan: Plan, *words: str, kind: GpuKind = H200) -> Forecast:
    """The forecast of the plan's recipe, with overrides of its strategy."""
    recipe = placed(load_recipe("fp32_sdpa", [*WORDS, *words]).recipe, shape_of(number))
    return forecast(recipe, machine_of(kind, shape_of(number)), kind, plan=plan)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(load_recipe("fp32_sdpa", WORDS).recipe, 10)


def test_forecast_of_a_run(plan: Plan) -> None:
    one, two = on(1, plan), on(2, plan)
    assert one.gpu_hours == one.hours
    assert two.hours < one.hours < two.gpu_hours
    assert one.fits
    assert one.images_per_second * one.step.seconds == pytest.approx(plan.recipe.data.batch_size)
    with pytest.raises(UserError, match="cannot share equally"):
        on(7, plan)


def test_auto_is_decided_as_a_run_decides_it(plan: Plan) -> None:
    """The same rung on the same GPUs, and a GPU is full at the same point."""
    whole = on(1, plan).memory
    for memory in (whole / 0.91, whole / 0.93):
        kind = replace(H200, memory=memory)
        machine = machine_of(kind, (1, 1))
        choice = choose_strategy(plan.recipe, machine, 10, plan=plan)
        found = on(1, plan, kind=kind)
        assert (found.micro_batch, found.checkpointing, found.layout) == (
            choice.micro_batch, choice.checkpointing, choice.layout,
        )  # fmt: skip
        assert found.fits
    assert found.micro_batch < plan.recipe.data.batch_size or found.checkpointing
    fixed = on(1, plan, "strategy=single", f"strategy.micro_batch={plan.recipe.data.batch_size}", kind=kind)
    assert not fixed.fits


def test_table_fits_a_terminal_and_says_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--estimate", "--recipe", "fp32_sdpa", "--gpu", "a100", "--gpus", "1,3,8", *WORDS])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "All predicted for A100" in printed
    assert "cannot be shared equally" in printed
    assert "predicted" in table(load_recipe("fp32_sdpa", WORDS).recipe, H200, [(1, 1)])


def test_signs_of_how_a_line_is_run() -> None:
    kind = replace(H200, memory=700e6)
    words = ("strategy.checkpointing=true", "strategy=fsdp")
    printed = table(load_recipe("fp32_sdpa", [*WORDS, *words]).recipe, H200, [(1, 8)])
    assert "  fsdp+ckpt\n" in printed
    assert "\nckpt: checkpointing\nfsdp: sharded\n" in printed
    full = table(load_recipe("fp32_sdpa", [*WORDS, "strategy.micro_batch=1024"]).recipe, kind, [(1, 1)])
    assert "  too large\n" in full
    assert max(map(len, full.splitlines())) <= 80


def test_nodes_as_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert [shape_of(n) for n in (1, 3, 8, 16, 24)] == [(1, 1), (1, 3), (1, 8), (2, 8), (3, 8)]
    with pytest.raises(UserError, match=r"--gpus 12: a node is taken to have 8.*--nodes N --gpus-per-node G"):
        main(["--recipe", "fp32_sdpa", "--gpus", "12", *WORDS])
    main(["--recipe", "fp32_sdpa", "--nodes", "2", "--gpus-per-node", "4", *WORDS])
    assert "\n  2x4 " in capsys.readouterr().out
    with pytest.raises(UserError, match="give one of them"):
        main(["--recipe", "fp32_sdpa", "--nodes", "2", "--gpus", "16"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--recipe", "int8_flash2", "--gpu", "t4"), ["FlashAttention-2 needs a GPU of sm_80"]),
        (("--recipe", "fp8_sdpa", "--gpu", "a100", "strategy=fsdp", "optim.name=adamw8bit"),
         ["sm_80) has no fp8 matrix units", "optim.name: is adamw8bit"]),
        (("--recipe", "int4_group_sdpa"), ["leaves nothing to train"]),
        (("--recipe", "fp32_sdpa", "strategy=single", "--gpus", "2"), ["Take strategy=ddp"]),
    ],
)  # fmt: skip
def test_what_fit_refuses_has_no_estimate(words: tuple[str, ...], said: list[str]) -> None:
    """docs/support.md is made of the same rules. `data.shards` is no mistake: nothing is read."""
    with pytest.raises(RecipeError) as caught:
        main(words)
    assert all(text in str(caught.value) for text in said)
    assert "data.shards" not in str(caught.value)


def test_what_is_refused_on_some_of_them_is_said() -> None:
    """Hybrid shards need two nodes."""
    recipe = load_recipe("fp32_sdpa", [*WORDS, "strategy=fsdp", "strategy.shard=hybrid"]).recipe
    printed = table(recipe, H200, [(1, 8), (2, 8)])
    assert "\n    8  refused: strategy.shard\n" in printed
    assert "strategy.nodes is 1" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_mistakes_are_named() -> None:
    for words, said in (
        (["--gpu", "v100"], r"--gpu v100: not known\. Known are h200"),
        (["protocol=folder", "quantization.precision=bf16"], r"Give --images TRAIN EVAL"),
        (["--time", "12h"], r"--time is a word of submitting; .* leave it out"),
        (["--site=a.yaml"], r"--site is a word of submitting; .* name the GPUs with --gpu"),
        (["--partition", "x"], r"there is no option --partition\n"),
        (["--gpus", "1,x"], r"'x' is no number of GPUs"),
        (["--images", "-5", "10"], r"--images: '-5' is not a number of at least 0"),
        (["--images", "5", "-10"], r"--images: '-10' is not a number of at least 0"),
        (["--images", "0", "10"], r"--images: .* TRAIN is at least 1"),
        (["--recipe", "int8_sdpa"], r"--recipe is given more than once"),
        (["--recipe=int8_sdpa"], r"--recipe is given more than once"),
        (["strategy.accelerator=cpu"], r"predicts for GPUs"),
    ):
        with pytest.raises(UserError, match=said):
            main(["--recipe", "fp32_sdpa", *words])


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4"),
     ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA L40S", None),
     ("a100", "A100"), ("a100_40gb", "A100-40"), ("nvidia_h100_80gb_hbm3", "H100"), ("rtx4090", "4090"), ("t4", "T4"),
     ("gh200", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("a100_1g.5gb", None)],
)  # fmt: skip
def test_names_of_devices(device: str, name: str | None) -> None:
    found = kind_of(device)
    assert (found.name if found else None) == name
    assert gpu_kind("H200") is H200


def test_the_plot_holds_curves_and_points(tmp_path: Path) -> None:
    plan = Plan(load_recipe("fp32_sdpa", WORDS).recipe, 10)
    figure = scaling_figure(plan, H200, {"DDP": {1: 1116.0, 2: 1050.0}}, images=8)
    assert len(figure.axes[0].lines) == 4
    draw(plan, H200, {}, tmp_path / "plot.png", images=8)
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_fsdp_alone_gathers_small_models_once() -> None:
    def seconds(layout: Layout, weights: Weights) -> float:
        return collective_seconds(layout, weights, VIT_L.kept, 24, H200)

    letting_go = replace(VIT_L, kept=0)
    assert seconds(Layout("fsdp", 8), VIT_L) < seconds(Layout("fsdp", 8), letting_go)
    for layout in (Layout("deepspeed", 8, stage=3), Layout("fsdp", 8, offload_states=True, offload_weights=True)):
        assert seconds(layout, VIT_L) == seconds(layout, letting_go)
