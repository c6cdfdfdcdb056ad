"""The memory estimate against peaks that were measured: ViT-L/16 at 224 on H200s, torch 2.11.

Each row is `torch.cuda.max_memory_allocated`, as in docs/scaling.md. Those of `ROWS` are of loops without Lightning
(AdamW fused, gradients set to None after each step, no moving average); the model here is made as the loop made it, and
then only pretended. Those of `LOOP` are of this package's own loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import peft
import pytest
import timm
import torch
from torch import nn

from vit_efficient.measure.layout import Layout, buffers, held, states
from vit_efficient.measure.live import LiveBytes
from vit_efficient.measure.memory import WORKSPACES, Plan, weights_of
from vit_efficient.measure.step_bytes import step_bytes
from vit_efficient.model.pretend import pretend, pretending, prime
from vit_efficient.recipe.load import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long]
GIB = 2**30
ALONE = Layout()


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    images: int
    measured: float
    checkpointing: bool = False
    layout: Layout = ALONE


ROWS = [
    Row("fp32, eager", "fp32", 64, 22.5),
    Row("bf16-mixed, eager", "mixed", 128, 25.5),
    Row("bf16-mixed, compiled", "mixed", 256, 46.4),
    Row("nf4 and LoRA of rank 16, eager", "nf4", 128, 27.9),
    Row("the same with 32 images", "nf4", 32, 7.2),
    Row("the same with checkpointing", "nf4", 128, 4.5, checkpointing=True),
    Row("FSDP2 on two, blocks compiled", "sharded", 128, 20.8, layout=Layout("fsdp", 2)),
]


def quantized(model: nn.Module) -> nn.Module:
    """bitsandbytes' own layers, which hand on float32 under autocast, and peft's adapters on all that ends in its
    names."""
    import bitsandbytes as bnb

    from vit_efficient.quantization.int4_layers import FrozenLinear4bit

    class Native(FrozenLinear4bit):
        forward = bnb.nn.Linear4bit.forward

    for block in model.blocks:
        for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            layer = getattr(parent, name)
            setattr(parent, name, Native.of(layer, type="nf4", double_quant=True, compute_dtype=torch.bfloat16))
    model.requires_grad_(False)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["qkv", "proj", "fc1", "fc2"]))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_measured_peak(row: Row) -> None:
    prime()
    narrow = torch.bfloat16 if row.kind in ("nf4", "sharded") else None
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
        blocks = list(model.blocks)
        if row.kind == "nf4":
            model = quantized(model.to(narrow).train())
        model.set_grad_checkpointing(row.checkpointing)
    weights = weights_of(model, blocks, narrow if row.kind == "sharded" else None)
    if row.kind == "sharded":  # that loop gathered each block for itself, and let it go
        weights = replace(weights, unit=weights.block, unit_trained=weights.block_trained, kept=0)
    if row.kind == "sharded":
        model.to(narrow)  # as its parameters are gathered
        plain = model.forward
        model.forward = lambda images: plain(images.to(narrow))
    with pretending(live := LiveBytes()):
        pretend(model)
        autocast = torch.bfloat16 if row.kind in ("mixed", "nf4") else None
        step = step_bytes(model, live, images=row.images, size=224, autocast=autocast)
    activations = max(step.forward, step.backward if row.layout.shards > 1 else step.with_gradients)
    own = held(row.layout, weights) + states(row.layout, 8 * weights.trained)
    predicted = (own + activations + buffers(row.layout, weights) + WORKSPACES) / GIB
    print(f"{row.name}: {predicted:.1f} GiB predicted, {row.measured} measured, {predicted / row.measured - 1:+.1%}")
    assert predicted == pytest.approx(row.measured, rel=0.05)


# docs/results/h200-training-loop.json: name, recipe, protocol, layout, images, checkpointing, GiB, and how much more
# than that is estimated at most. Less than measured is not: then something would not fit that was said to.
LOOP = [
    ("one", "fp32_sdpa", "imagenet_vit_l16", ALONE, 128, False, 25.273, 0.05),
    ("DDP on two", "fp32_sdpa", "imagenet_vit_l16", Layout("ddp", 2), 128, False, 26.424, 0.05),
    ("QLoRA, checkpointing", "int4_sdpa", "imagenet_vit_l16", ALONE, 128, True, 3.914, 0.15),
    ("7 billion, QLoRA", "int4_sdpa", "dinov3_7b", ALONE, 4, False, 9.524, 0.05),
]
# docs/results/h200-several.json: those of 22 November, whose branches leave out what they drop.
SUBSETS = [
    ("one", "fp32_sdpa", "imagenet_vit_l16", ALONE, 128, False, 23.658, 0.05),
    ("DDP on two", "fp32_sdpa", "imagenet_vit_l16", Layout("ddp", 2), 128, False, 23.687, 0.05),
    ("FSDP2 on two", "fp32_sdpa", "imagenet_vit_l16", Layout("fsdp", 2), 128, False, 21.505, 0.05),
    ("FSDP2 on four", "fp32_sdpa", "imagenet_vit_l16", Layout("fsdp", 4), 128, False, 20.390, 0.05),
]
TWO = [("DDP", Layout("ddp", 2)), ("FSDP2", Layout("fsdp", 2))]
TWO += [(f"ZeRO {stage}", Layout("deepspeed", 2, stage=stage)) for stage in (1, 2, 3)]
# docs/results/h200-memory.json: layout, checkpointing, `math`, GiB, and what is estimated at least and at most of that.
TABLE = [
    ("fused", ALONE, False, False, 14.911, 0.99, 1.0),
    ("math", ALONE, False, True, 19.714, 0.99, 1.0),
    ("fused", ALONE, True, False, 6.091, 1.0, 1.09),
    *(
        (name, layout, checkpointing, False, measured, least, most)
        for checkpointing, figures in (
            (False, [(14.910, 0.99, 1.0), (12.744, 1.0, 1.05), (13.407, 1.0, 1.08), (13.407, 1.0, 1.04),
                     (15.050, 0.89, 0.9)]),
            (True, [(6.359, 1.0, 1.05), (4.489, 1.0, 1.12), (5.524, 1.0, 1.13), (5.524, 1.0, 1.04)]),
        )
        for (name, layout), (measured, least, most) in zip(TWO, figures, strict=False)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "protocol", "layout", "images", "checkpointing", "measured", "most", "depth"),
    [(*row[1:], "mask") for row in LOOP] + [(*row[1:], "subset") for row in SUBSETS],
    ids=[row[0] for row in LOOP] + [f"{row[0]}, subset" for row in SUBSETS],
)
def test_measured_peak_of_the_loop(
    recipe: str,
    protocol: str,
    layout: Layout,
    images: int,
    checkpointing: bool,
    measured: float,
    most: float,
    depth: str,
) -> None:
    words = [f"protocol={protocol}", "quantization.precision=bf16", "optim.ema=null", f"model.stochastic_depth={depth}"]
    plan = Plan(load_recipe(recipe, words).recipe, 1000)
    estimated = plan.estimate(layout, images, checkpointing=checkpointing).allocated / GIB
    print(f"{estimated:.2f} GiB estimated, {measured} measured, {estimated / measured - 1:+.1%}")
    assert 0.99 * measured <= estimated <= (1 + most) * measured


@pytest.mark.parametrize(
    ("layout", "checkpointing", "math", "measured", "least", "most"),
    [row[1:] for row in TABLE],
    ids=[f"{row[0]}{', checkpointing' * row[2]}" for row in TABLE],
)
def test_measured_table(
    layout: Layout, checkpointing: bool, math: bool, measured: float, least: float, most: float
) -> None:
    words = ["protocol=imagenet_vit_l16", "quantization.precision=bf16", "optim.ema=null"]
    words += ["attention.kernel=math"] * math
    plan = Plan(load_recipe("fp32_sdpa", words).recipe, 1000)
    estimated = plan.estimate(layout, 64, checkpointing=checkpointing).allocated / GIB
    print(f"{estimated:.2f} GiB estimated, {measured} measured, {estimated / measured - 1:+.1%}")
    assert least * measured <= estimated <= most * measured
