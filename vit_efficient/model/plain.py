"""One call for users of plain PyTorch: a timm model in, the same model with quantized layers and fused blocks out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from vit_efficient.attention.base import AttentionBackendConfig
from vit_efficient.attention.config import AttentionConfig
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import head_widths, known_attention, swap_attention
from vit_efficient.config import Config
from vit_efficient.errors import CapabilityError, Problem, RecipeError, UserError
from vit_efficient.machine import detect
from vit_efficient.model.fused import FusedBlock, fuse_blocks
from vit_efficient.model.patches import patches_as_product
from vit_efficient.model.weights import not_finite
from vit_efficient.quantization.calibrate import FEWEST, calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.config import QuantizationConfig
from vit_efficient.quantization.stored import QuantizedLayer
from vit_efficient.recipe.explain import rewrite, unknown_keys
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.merge import Layer, flatten
from vit_efficient.recipe.schema import Recipe
from vit_efficient.recipe.shape import section_at

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What a mapping may hold where it has sections; without them it is the quantization section itself.
SECTIONS = ("attention", "quantization")
Images = Tensor | Iterable[Any]

logger = logging.getLogger("vit_efficient")


def quantize_model(
    model: nn.Module,
    recipe: str | Recipe | Config | Mapping[str, Any],
    *,
    calibration: Images | None = None,
    inplace: bool = False,
    fuse: bool = True,
) -> nn.Module:
    """Quantize a Vision Transformer of timm with the weights that it has, for inference.

    The result is the same kind of timm model (`forward_features`, `forward_head` and names of parameters as before), on
    the same device and in the same dtype, in evaluation mode; it can be compiled, exported and captured. What was done
    to how many layers and blocks, and why not to others, is logged to ``vit_efficient``.

    Args:
        model: with trained weights, of one floating dtype; (B, 3, S, S) to (B, classes).
        recipe: a shipped recipe by name (``int8_sdpa``, ``fp8_sdpa``, ``int4_group_sdpa``), the path of a recipe file,
            a `Recipe`, the configuration of a quantization, or a mapping of that (``{"name": "int8", "activations":
            "static"}``; or, without a ``name``, with sections ``quantization`` and ``attention``). Only these two
            sections are read, and the model's own dtype takes the place of ``precision``. Adapters are for training:
            they are left out.
        calibration: images as the model takes them, for schemes that need them: one tensor (B, 3, S, S), or batches
            such as a data loader gives (tensors, or tuples that begin with one). As many are taken as the recipe's
            ``calibration.samples`` says; at least 16.
        inplace: change `model` itself. Otherwise a copy is made, and `model` stays as it is.
        fuse: replace blocks by fused ones where they can be (int8 and fp8).

    Returns:
        The quantized model; `model` itself if `inplace`.

    Raises:
        UserError: no Vision Transformer with known attention, one that is quantized or compiled already or whose blocks
            are not in `blocks` (unless `fuse` is False), a recipe that quantizes nothing, weights with a NaN; for a
            scheme that needs calibration images: none, too few, or images that the model does not take.
        RecipeError: no such recipe, or mistakes in it.
        CapabilityError: the device cannot run it.
    """
    quantization, attention = _sections(recipe)
    fuse = fuse and quantization.name in ("int8", "fp8")
    _check(model, quantization, calibration, fuse)
    dtype, device = _one_dtype(model), next(model.parameters()).device
    _check_device(device, dtype, quantization, attention, model)
    config = getattr(quantization, "calibration", None) or CalibrationConfig()
    batches = None if calibration is None else _batches(calibration, config.samples, model)
    # Up to here nothing has changed.
    if not inplace:
        model = copy.deepcopy(model)
    model.eval().requires_grad_(False).float()  # codes are chosen in float32
    patches_as_product(model)
    swap_attention(model, SdpaConfig().build())  # which runs in float32 too
    report = quantization.apply(model, compute_dtype=dtype)
    lines = report.lines()
    if batches is not None:
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            lines += calibrate(model, batches, config).lines()
    quantization.finalize(model)
    if getattr(quantization, "attention", "none") == "none":
        swap_attention(model, attention.build())
    model.to(dtype).eval().requires_grad_(False)
    for line in lines:
        logger.info(line)
    if fuse:
        fused = fuse_blocks(model)
        logger.info(fused.count())
        for line in fused.reasons():
            logger.warning(line)
        for line in fused.apart():
            logger.info(line)
    return model


def _sections(recipe: Any) -> tuple[Any, AttentionBackendConfig]:
    """The quantization and the attention that were asked for."""
    if isinstance(recipe, str):
        recipe = _loaded(recipe)
    if isinstance(recipe, Recipe):
        quantization, attention = recipe.quantization, recipe.attention
    elif isinstance(recipe, Mapping):
        # A quantization has a key `attention` of its own, and a name beside it, which sections have not.
        has_sections = "name" not in recipe and bool(set(recipe) & set(SECTIONS))
        content = recipe if has_sections else {"quantization": recipe}
        if strangers := [key for key in content if key not in SECTIONS]:
            raise RecipeError([Problem(key, "is not read here", allowed=", ".join(SECTIONS)) for key in strangers])
        quantization = _validated(QuantizationConfig, "quantization", content.get("quantization", {"name": "none"}))
        attention = _validated(AttentionConfig, "attention", content.get("attention", {"name": "sdpa"}))
    elif hasattr(recipe, "apply") and hasattr(recipe, "finalize"):
        quantization, attention = recipe, SdpaConfig()
    else:
        raise UserError(
            f"quantize_model: a recipe is a name, a path, a Recipe, a quantization's configuration or a mapping, and "
            f"not a {type(recipe).__name__}."
        )
    if quantization.name == "none":
        raise UserError(
            "quantize_model: this recipe's quantization is none, so there is nothing to do. Shipped recipes that "
            "quantize: int8_sdpa, fp8_sdpa, int4_group_sdpa, ..."
        )
    if getattr(quantization, "lora", None) is not None:
        quantization = quantization.model_copy(update={"lora": None, "train": "lora", "base": None})
    return quantization, attention


def _loaded(recipe: str) -> Recipe:
    """A recipe by name or path; mistakes in that are of this call's argument, and not of a command line."""
    try:
        return load_recipe(recipe).recipe
    except RecipeError as error:
        problems = [
            replace(problem, path="recipe", message=problem.message.partition(": write `--recipe")[0])
            if problem.path == "--recipe"
            else problem
            for problem in error.problems
        ]
        raise RecipeError(problems) from None


def _validated(kind: Any, section: str, content: Any) -> Any:
    if isinstance(content, Config):
        return content
    given = {"name": content} if isinstance(content, str) else dict(content)
    layer = Layer()
    for path, value in flatten(given, (section,), section_at((section,))):
        layer.set(path, value, "")
    if unknown := unknown_keys(layer):
        raise RecipeError([problem for _, problem in unknown])
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise RecipeError(rewrite(error, {section: given}, lambda path: "", under=(section,))) from None


def _check(model: nn.Module, quantization: Any, calibration: Images | None, fuse: bool) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"quantize_model: `model` is a {type(model).__name__}; give a Vision Transformer of timm.")
    if next(model.parameters(), None) is None:
        raise UserError(f"quantize_model: `model`, a {type(model).__name__}, has no parameters to quantize.")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise UserError("quantize_model: the model is compiled. Quantize it first, then compile the result.")
    for name, module in model.named_modules():
        if isinstance(module, FusedBlock) or (name and isinstance(module, QuantizedLayer)):
            raise UserError(f"quantize_model: `{name}` is quantized already. Give the float model.")
    if next(model.parameters()).device.type != "meta" and (broken := not_finite(model.state_dict())) is not None:
        raise UserError(
            f"quantize_model: `{broken}` holds a NaN or an infinity, so the model answers nothing. Check the weights "
            "that were loaded into it."
        )
    known_attention(model)
    if fuse and not isinstance(getattr(model, "blocks", None), nn.Module):
        raise UserError(
            f"quantize_model: {type(model).__name__} has no `blocks`, so there is nothing to fuse. Give the timm model "
            "itself, or `fuse=False`, which quantizes the layers and leaves the blocks as they are."
        )
    needed = bool(getattr(quantization, "needs_calibration", False))
    if needed and calibration is None:
        raise UserError(
            f"quantize_model: this form of quantization={quantization.name} is calibrated on images, and none were "
            f"given. Pass calibration=..., {FEWEST} or more images as the model takes them (256 are plenty), or take a "
            "recipe with dynamic scales, such as int8_sdpa."
        )
    if calibration is not None and not needed:
        raise UserError(
            f"quantize_model: calibration images were given, and this form of quantization={quantization.name} reads "
            'none. Leave them out, or ask for what they find: {"name": "int8", "calibration": {}}.'
        )
    if calibration is not None and not isinstance(calibration, Iterable):
        raise UserError(
            f"quantize_model: `calibration` is a {type(calibration).__name__}; give images as one tensor (B, 3, S, S), "
            "or batches of them."
        )


def _one_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= PRECISIONS.keys():
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no parameters"
        raise UserError(
            f"quantize_model: the model's parameters are {found}; they must be of one dtype, float32, bfloat16 or "
            "float16. Convert it first: model.float()."
        )
    return dtypes.pop()


def _check_device(
    device: torch.device, dtype: torch.dtype, quantization: Any, attention: AttentionBackendConfig, model: nn.Module
) -> None:
    """Refuse what the device that the model is on cannot run."""
    if device.type == "meta":
        raise UserError("quantize_model: the model is on the meta device, so it has no weights to quantize.")
    machine, kind = detect(), "cuda" if device.type == "cuda" else "cpu"
    if kind == "cuda":  # the GPU that it is on, whatever others there are
        machine = replace(machine, gpus=(machine.gpus[device.index or 0],))
    precision = PRECISIONS[dtype]
    # That a CPU refuses fp16 is about training in it.
    asked = "fp32" if kind == "cpu" and precision == "fp16" else precision
    reasons = [quantization.refusal(machine, asked, kind)]
    reasons += [attention.refusal(machine, precision, width, kind) for width in _head_widths(model)]  # type: ignore[arg-type]
    for reason in filter(None, reasons):
        raise CapabilityError(f"quantize_model: {reason}")


def _head_widths(model: nn.Module) -> set[int]:
    """The head widths of a timm model, swapped or not."""
    plain = (getattr(module, "head_dim", None) for module in model.modules())
    return {width for width in plain if isinstance(width, int)} | head_widths(model)


def _batches(images: Images, samples: int, model: nn.Module) -> list[Tensor]:
    """At most `samples` images, in batches, float32 on the model's device.

    Raises:
        UserError: they are not what the model takes, or too few.
    """
    device = next(model.parameters()).device
    batches: list[Tensor] = []
    left = samples
    if isinstance(images, Tensor):
        images = images.split(64) if images.ndim == 4 else [images]
    for batch in images:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, Tensor) or first.ndim != 4:
            what = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise UserError(
                f"quantize_model: calibration gives batches of images (B, 3, S, S), or tuples that begin with one; "
                f"got {what}."
            )
        _check_images(first, model)
        batches.append(first[:left].to(device, torch.float32))
        left -= len(batches[-1])
        if left <= 0:
            break
    if (found := sum(map(len, batches))) < FEWEST:
        asked = f" (the recipe's calibration.samples is {samples})" if samples < FEWEST else ""
        raise UserError(
            f"quantize_model: {found} images are too few to calibrate on{asked}; {FEWEST} are the least, 200 or more "
            "are usual. Pass more as calibration=..."
        )
    return batches


def _check_images(images: Tensor, model: nn.Module) -> None:
    """Refuse images (B, C, H, W) that the model would not take, or would misread.

    Raises:
        UserError: pixels as integers, a NaN, other channels, another size.
    """
    if not images.is_floating_point():
        raise UserError(
            f"quantize_model: the calibration images are {str(images.dtype).removeprefix('torch.')}. Give them as the "
            "model takes them: floating point, normalised with its mean and standard deviation "
            "(timm.data.resolve_model_data_config tells them)."
        )
    if not bool(images.isfinite().all()):
        raise UserError("quantize_model: the calibration images hold a NaN or an infinity. Check how they are made.")
    embed: Any = getattr(model, "patch_embed", None)
    conv = getattr(embed, "proj", None)  # of a hybrid it takes features
    if isinstance(conv, nn.Conv2d) and not hasattr(embed, "backbone") and images.shape[1] != conv.in_channels:
        raise UserError(
            f"quantize_model: the calibration images have {images.shape[1]} channel(s), and the model takes "
            f"{conv.in_channels}. Convert them as in evaluation."
        )
    wanted = getattr(embed, "img_size", None)
    if wanted is None or not getattr(embed, "strict_img_size", True):
        return
    height, width = images.shape[-2:]
    if (height, width) != tuple(wanted):
        raise UserError(
            f"quantize_model: the calibration images are {height} x {width} pixels, and the model takes "
            f"{wanted[0]} x {wanted[1]}. Resize them as in evaluation."
        )
