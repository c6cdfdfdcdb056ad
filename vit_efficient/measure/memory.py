"""What a training step needs of a device's memory, estimated before there is a device.

What is kept for the backward pass and what is taken on the way is counted on a pretended step of the real modules
(`step_bytes`); weights, gradients and states follow from sizes and from how they are spread (`layout`).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.errors import CapabilityError
from vit_efficient.measure import layout as spread
from vit_efficient.measure.layout import Layout, Weights
from vit_efficient.measure.live import LiveBytes, storage_bytes
from vit_efficient.measure.step_bytes import StepBytes, step_bytes
from vit_efficient.measure.work import Work, WorkCounter
from vit_efficient.model.build import Built, compute_dtype, may_be_late
from vit_efficient.model.pretend import outline, pretend, pretending
from vit_efficient.parallel.order import gathered, prepare_blocks, stays_gathered, units
from vit_efficient.recipe.schema import Recipe

# CUDA context and libraries' code: outside PyTorch's allocator, so in no figure of it. Seen: 0.4 to 0.6 GiB.
CONTEXT = 512 * 2**20
# cuBLAS: one workspace for each thread that calls it, the forward's and the backward's; 32 MiB from Hopper on, 8 MiB
# before (PyTorch's notes on CUBLAS_WORKSPACE_CONFIG).
WORKSPACES = 2 * 32 * 2**20
COUNTED = ("none", "int8", "int4", "fp8")  # quantizations whose layers run on tensors without values
STATE_BYTES = {"adamw": 8, "adamw8bit": 2}  # for each trained number: two moments in float32, or in 8 bits


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the moment of a training step that needs most."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    buffers: int = 0
    teacher: int = 0

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator would report as its peak."""
        own = self.weights + self.gradients + self.optimizer + self.average + self.activations
        return own + self.buffers + self.teacher + WORKSPACES

    @property
    def total(self) -> int:
        """The device's memory in use."""
        return self.allocated + CONTEXT

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) for a person to read."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer states", self.optimizer),
            ("moving average", self.average),
            ("activations and temporaries", self.activations),
            ("communication buffers", self.buffers),
            ("teacher", self.teacher),
            ("CUDA context and workspaces", CONTEXT + WORKSPACES),
        ]
        return [(what, size) for what, size in rows if size]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def restart_peak(device: torch.device) -> None:
    """Count a GPU's peak from here on, so that what the process did before is left out; a CPU's cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():  # bitsandbytes keeps scales and code books outside the parameters
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            for part in (state, state.state2):
                yield from (x for x in vars(part or state).values() if isinstance(x, Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers as they lie in memory, 4-bit scales included."""
    return storage_bytes(_held(model))


def weights_of(model: nn.Module, blocks: Sequence[nn.Module], gather: torch.dtype | None = None) -> Weights:
    """Sizes of a model's weights.

    Args:
        blocks: its blocks.
        gather: dtype in which sharded blocks are gathered; None: their own.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    total, inside = weight_bytes(model), [weight_bytes(block) for block in blocks]
    return Weights(
        size=total,
        frozen=total - storage_bytes(iter(trained)),
        trained=sum(p.numel() for p in trained),
        block=max((gathered(block, gather) for block in blocks), default=0),
        block_trained=max(map(_trained, blocks), default=0),
        rest=total - sum(inside),
        unit=max((sum(gathered(block, gather) for block in unit) for unit in units(blocks)), default=0),
        kept=sum(gathered(block, gather) for block in blocks) if stays_gathered(blocks, gather) else 0,
        unit_trained=max((sum(map(_trained, unit)) for unit in units(blocks)), default=0),
    )


def _trained(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters() if p.requires_grad)


class Plan:
    """A recipe's model, without bytes, and what it needs under any layout, micro-batch and checkpointing.

    Args:
        recipe: resolved but for its strategy, of which only what `estimate` is asked matters.
        num_classes: outputs of the head.

    Raises:
        UserError: as `build_model` does.
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.recipe, self.num_classes = recipe, num_classes
        self._steps: dict[tuple[bool, bool, int], tuple[StepBytes, Work]] = {}

    @cached_property
    def built(self) -> Built:
        """The model on the `meta` device."""
        return outline(self.recipe, self.num_classes)

    @property
    def narrow(self) -> torch.dtype | None:
        """The dtype in which blocks are gathered where they are sharded: that of the arithmetic, if they are plain."""
        dtype = compute_dtype(self.recipe)
        return dtype if self.recipe.plain and dtype != torch.float32 else None

    def weights(self, layout: Layout) -> Weights:
        """Sizes; blocks as FSDP gathers them in `narrow`. DeepSpeed gathers them as they are."""
        gather = self.narrow if layout.kind == "fsdp" else None
        return weights_of(self.built.model, list(self.built.blocks), gather)

    def step(self, micro_batch: int, *, checkpointing: bool, narrow: bool) -> StepBytes:
        """What a step of `micro_batch` images keeps and takes; `count` says of what."""
        return self.count(micro_batch, checkpointing=checkpointing, narrow=narrow)[0]

    def count(self, micro_batch: int, *, checkpointing: bool, narrow: bool) -> tuple[StepBytes, Work]:
        """Bytes and work of a step of `micro_batch` images; each setting is counted once.

        Args:
            checkpointing: whether blocks are recomputed.
            narrow: whether blocks are gathered in `self.narrow`, so that autocast makes no copies of their weights.
        """
        key = (checkpointing, narrow and self.narrow is not None, micro_batch)
        if key not in self._steps:
            self._require_counted()
            built = outline(self.recipe, self.num_classes)
            if key[1]:
                for block in built.blocks:
                    block.to(self.narrow)
            prepare_blocks(built.blocks, checkpointing=checkpointing, compile=False)
            with pretending(live := LiveBytes()):
                pretend(built.model)
                with WorkCounter(own=self._own_attention()) as counter:
                    taken = step_bytes(
                        built.model, live, images=micro_batch, size=built.image.size,
                        autocast=compute_dtype(self.recipe),
                    )  # fmt: skip
                self._steps[key] = taken, counter.work
        return self._steps[key]

    def _own_attention(self) -> bool:
        """Whether blocks are such as have this package's backward pass of attention once compiled (`late_biases`)."""
        attention = self.recipe.attention
        return may_be_late(self.recipe) and isinstance(attention, SdpaConfig) and attention.kernel == "auto"

    def _require_counted(self) -> None:
        name = self.recipe.quantization.name
        if name not in COUNTED:
            raise CapabilityError(
                f"The memory of quantization={name} cannot be estimated: its layers look at values, and an estimate "
                f"has none. It can be for {', '.join(COUNTED)}; else see what a run reports in its metrics.json."
            )
        if not any(p.requires_grad for p in self.built.model.parameters()):
            raise CapabilityError(
                "The memory of a training step cannot be estimated: nothing is trained by this recipe. "
                "Set quantization.lora, or take `python -m vit_efficient.quantize`."
            )

    def estimate(self, layout: Layout, micro_batch: int, *, checkpointing: bool, accumulate: int = 1) -> Estimate:
        """One device's memory.

        Lightning drops the gradients of a step only when the next one's forward pass is over, so both passes begin
        with them; with accumulation, and in DDP's buckets, they stay throughout.
        """
        step = self.step(micro_batch, checkpointing=checkpointing, narrow=layout.kind == "fsdp")
        weights, recipe = self.weights(layout), self.recipe
        gradients = spread.gradients(layout, weights)
        stay = accumulate > 1 or layout.shards > 1 or layout.keeps_gradients
        backward = gradients + step.backward if stay else step.with_gradients
        activations = max(gradients + step.forward, backward, gradients + self._update(weights, layout)) - gradients
        return Estimate(
            weights=spread.held(layout, weights),
            gradients=gradients,
            optimizer=spread.states(layout, STATE_BYTES[recipe.optim.name] * weights.trained),
            average=layout.part(4 * weights.trained, layout.kind == "fsdp") if recipe.optim.ema is not None else 0,
            activations=activations,
            buffers=spread.buffers(layout, weights),
            teacher=self._teacher(),
        )

    def _update(self, weights: Weights, layout: Layout) -> int:
        """Temporaries of the optimizer's step: AdamW's fused kernel takes none. fp16's loop takes the square roots."""
        plain = self.recipe.optim.name == "adamw" and self.recipe.quantization.precision == "fp16"
        return spread.states(layout, 4 * weights.trained) if plain else 0

    def _teacher(self) -> int:
        """Taken to be as large as the model, in the dtype of the arithmetic: a larger one is known when it is read."""
        distilled = getattr(self.recipe.quantization, "distill", None) is not None
        return self.built.parameters * compute_dtype(self.recipe).itemsize if distilled else 0


def estimate_recipe(recipe: Recipe, num_classes: int, layout: Layout | None = None) -> Estimate:
    """The memory of each device that a resolved recipe needs.

    Args:
        recipe: resolved.
        num_classes: outputs of the head.
        layout: None: that of the recipe's strategy.

    Raises:
        UserError: as `build_model` does.
    """
    layout = Layout.of(recipe.strategy) if layout is None else layout
    micro = recipe.strategy.micro_batch
    assert micro is not None, "resolve() makes the micro-batch concrete"
    accumulate = max(1, recipe.data.batch_size // (micro * layout.world))
    plan = Plan(recipe, num_classes)
    return plan.estimate(layout, micro, checkpointing=recipe.strategy.checkpointing, accumulate=accumulate)
