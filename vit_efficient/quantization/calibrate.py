"""Calibration of a model with quantized layers: block after block, each on what the calibrated ones before it give.

Shapes: B images, T tokens of all of them (rows), K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE
from vit_efficient.quantization.calibratable import Calibratable, Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.importance import token_importance
from vit_efficient.quantization.int8_attention import integer_attention, observe_attention
from vit_efficient.quantization.int8_layers import Int8Linear, Int8Patches, to_patches
from vit_efficient.quantization.observers import threshold
from vit_efficient.quantization.select import block_index
from vit_efficient.quantization.views import with_views

FEWEST = 16  # images
ROWS_BYTES = 2**28  # of one layer's inputs at most; beyond it rows are left out evenly

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """What calibration did."""

    images: int
    fits: list[Fit] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person to read."""
        worst = sorted(self.fits, key=lambda fit: -fit.error)[:3]
        shown = ", ".join(f"{fit.name} {100 * fit.error:.2f} %" for fit in worst)
        return [f"calibrated on {self.images} images; largest output errors: {shown}"] if worst else []


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the forward is not needed
    pass


def calibrate(
    model: nn.Module,
    batches: Sequence[Tensor],
    config: CalibrationConfig,
    progress: Progress = lambda done, total: None,
) -> Calibrated:
    """Calibrate the trainable integer or fp8 layers, and static integer attention, of a model in place.

    Deterministic. Each module is left in the mode (training or evaluation) that it was in; parameters change: weights
    are smoothed and rounded, biases corrected.

    Args:
        model: as a backend's `apply` left it, with trained weights; images (B, 3, S, S) to logits.
        batches: normalised images, on the model's device.
        config: what may be decided.
        progress: called with (blocks done, blocks in all).

    Raises:
        UserError: too few images; images or activations with a NaN or an infinity; a layer whose inputs never differ.
    """
    images = _check(batches)
    batches = with_views(batches, config.views)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Calibratable)}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for layer in layers.values():
        layer.observing = True
    try:
        _calibrate_attention(model, batches, config)
        weights: Mapping[str, Tensor] = {}
        if config.importance and layers:
            weights = token_importance(model, layers, batches)
        fits: list[Fit] = []
        groups = _by_block(layers)
        for done, group in enumerate(groups):
            progress(done, len(groups))
            seen = _inputs(model, group, batches)
            for name, layer in group.items():
                fits.append(_fit(name, layer, *seen[name], weights.get(name), config))
                layer.observing = False
        progress(len(groups), len(groups))
    finally:
        for layer in layers.values():
            layer.observing = False
        for module, training in modes.items():  # one by one: a part may be in another mode than the whole
            module.training = training
    return Calibrated(images, fits)


def _check(batches: Sequence[Tensor]) -> int:
    """The number of images, if they can be calibrated on."""
    images = sum(len(batch) for batch in batches)
    if images < FEWEST:
        raise UserError(
            f"{images} images are too few to calibrate on; {FEWEST} are the least, 200 or more are usual. "
            "Give more training images (data.shards), or more of them (quantization.calibration.samples)."
        )
    first = batches[0][0]
    if all(bool((batch == first).all()) for batch in batches):
        raise UserError("All calibration images are the same, so they say nothing of any range. Give real images.")
    if not all(bool(batch.isfinite().all()) for batch in batches):
        raise UserError("The calibration images hold a NaN or an infinity. Check the shards: prepare --verify DIR.")
    return images


def _by_block(layers: Mapping[str, Calibratable]) -> list[dict[str, Calibratable]]:
    """Layers that are calibrated together: what comes before the blocks, each block, what comes after."""
    groups: dict[tuple[int, int], dict[str, Calibratable]] = {}
    before = True
    for name, layer in layers.items():
        block = block_index(name)
        before = before and block is None
        key = (0, 0) if before else (1, block) if block is not None else (2, 0)
        groups.setdefault(key, {})[name] = layer
    return [groups[key] for key in sorted(groups)]


def _fit(
    name: str, layer: Calibratable, x_TK: Tensor, step: int, weight_T: Tensor | None, config: CalibrationConfig
) -> Fit:
    try:
        found = layer.fit(name, x_TK, None if weight_T is None else weight_T[::step], config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if found.constant and layer.static:
        raise UserError(
            f"{name} saw the same input for every token of every calibration image, so its range is unknown. Calibrate "
            f"on other images, name it in quantization.keep, or use quantization.activations=dynamic."
        )
    return found


@torch.no_grad()
def _inputs(
    model: nn.Module, group: Mapping[str, Calibratable], batches: Sequence[Tensor]
) -> dict[str, tuple[Tensor, int]]:
    """What each layer of a group is given: rows (T, K) float32, every `step`-th of them, and that step.

    The forward ends where the last of the group has been called.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in group}
    waiting: set[str] = set()
    total = sum(len(batch) for batch in batches)
    steps: dict[str, int] = {}
    counted = dict.fromkeys(group, 0)

    def see(name: str, module: Calibratable, x: Tensor, images: int) -> None:
        tokens = to_patches(x, module.shape[2:])[0] if module.deployed == "patches" else x
        rows = tokens.reshape(-1, tokens.shape[-1])
        if name not in steps:
            whole = rows.numel() * 4 * total / images
            steps[name] = max(1, -(-int(whole) // ROWS_BYTES))
        first = -counted[name] % steps[name]
        counted[name] += len(rows)
        found[name].append(rows[first :: steps[name]].float())
        waiting.discard(name)

    with _hooks(group, see) as (start, check):
        for batch in batches:
            waiting.update(group)
            start(len(batch))
            check(waiting)
            with suppress(_Enough):
                model(batch)
            if waiting:
                raise UserError(f"{sorted(waiting)[0]} is never called, so it cannot be calibrated: put it into keep.")
    return {name: (torch.cat(parts), steps[name]) for name, parts in found.items()}


@contextmanager
def _hooks(group: Mapping[str, Calibratable], see):  # type: ignore[no-untyped-def]
    """Call `see` before each layer of a group, and end the forward after the last of them."""
    state: dict[str, object] = {"images": 0, "waiting": set()}

    def before(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(name, module, arguments[0], state["images"])
            if not state["waiting"]:
                raise _Enough

        return hook

    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in group.items()]
    try:
        yield lambda images: state.update(images=images), lambda waiting: state.update(waiting=waiting)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _calibrate_attention(model: nn.Module, batches: Sequence[Tensor], config: CalibrationConfig) -> None:
    """Scales of queries, keys and values, where they are static."""
    static = {name: attend for name, attend in integer_attention(model).items() if attend.mode == "static"}
    if not static:
        return
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {operand: [] for operand in attend.operands} for name, attend in static.items()
    }
    step = max(1, sum(len(batch) for batch in batches) // 64)

    def see(name: str, operand: str, x_BHNE: Tensor) -> None:
        if operand in found.get(name, ()):
            found[name][operand].append(x_BHNE[::step].float().reshape(-1, x_BHNE.shape[-1]))

    for attend in static.values():
        attend.observing = True
    try:
        with observe_attention(model, see):
            for batch in batches:
                model(batch)
    finally:
        for attend in static.values():
            attend.observing = False
    for name, operands in found.items():
        try:
            scales = {operand: threshold(torch.cat(rows), LARGEST_CODE, config) for operand, rows in operands.items()}
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if not all(scales.values()):
            raise UserError(f"{name}: queries, keys or values are zero on every calibration image.")
        static[name].set_scales(**{operand: limit / LARGEST_CODE for operand, limit in scales.items()})


def uncalibrated(model: nn.Module) -> Iterator[str]:
    """Names of the layers that still need `calibrate`: static, and without a scale."""
    for name, module in model.named_modules():
        if isinstance(module, (Int8Linear, Int8Patches)) and module.scheme.activations == "static":
            scale = module.current_input_scale()
            if scale is None or not bool(scale.isfinite()):
                yield name
