"""`export merge`: from a run with adapters to a file without them, and what that does to its answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.engine.setup import build_data, build_transforms
from vit_efficient.engine.subject import find, from_checkpoint
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.measure.logits import LogitComparison, compare
from vit_efficient.model.build import DTYPES
from vit_efficient.model.weights import file_digest
from vit_efficient.quantization.merge import Merged, merge, without_adapters
from vit_efficient.quantization.none import NoneConfig
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

Precision = Literal["bf16", "fp32"]

PROBES = 8  # images of noise on which every merge is checked
# Largest |difference| / |logits| between adapters + base and the merged weights; garbage gives about 1.
EXACT = 1e-4  # all arithmetic in float32; measured on ViT-Ti: 2e-6
ROUNDED = 0.1  # the base computes in 16 bits; 2e-2
INTEGERS = 0.5  # the base quantizes its inputs; 4e-2, and more where activations have outliers


@dataclass(frozen=True)
class Source:
    """A model with adapters, on the CPU in evaluation mode, with everything that its merged file will need."""

    path: Path
    model: nn.Module
    image: ImageSpec
    recipe: Recipe
    class_names: list[str]


@dataclass(frozen=True)
class Result:
    """What a merge made, and how far its answers are from those of adapters and base.

    Args:
        recipe: that of the file.
        merged: counts of layers.
        error: |difference| / |logits| between adapters + base and the merged float32 weights, on noise.
        stored: the same, between adapters + base and the file as it was loaded again.
        loss: of quantizing the merged weights again, where that was asked for.
        size: of the file, in bytes.
    """

    recipe: Recipe
    merged: Merged
    error: float
    stored: float
    loss: LogitComparison | None
    size: int


def load_source(target: str, *, base: str | None = None) -> Source:
    """Load what is to be merged: a run's folder, its model.safetensors, or one of its checkpoints.

    Args:
        target: the path.
        base: the base's file, for a checkpoint (which holds the adapters alone) whose base has moved.

    Raises:
        CheckpointError: nothing there, damaged, the base is gone or is another one.
        UserError: there are no adapters in it, or it was merged already.
    """
    path, recipe_file = find(target, "merge")
    if path.suffix == ".safetensors":
        if base is not None:
            raise UserError(f"--base is for checkpoints; {path} holds its base.")
        deployed = load_file(path, attention=SdpaConfig())
        if deployed.merged is not None:
            raise UserError(
                f"{path} was merged already, from {deployed.merged['from']} (sha256 "
                f"{deployed.merged['sha256'][:12]}...); it has no adapters any more. Evaluate or export it as it is."
            )
        recipe = load_recipe(str(path)).recipe  # with the attention that it was trained with
        _require_adapters(recipe, path)
        return Source(path, deployed.model, deployed.image, recipe, deployed.class_names)
    if recipe_file is None:
        raise CheckpointError(f"{path} lies in no run's folder, so its recipe is missing. Give the run's folder.")
    recipe = Recipe.model_validate(read_checkpoint(path)["vit_efficient"]["recipe"])
    _require_adapters(recipe, path)
    if base is not None:
        recipe = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"base": base})})
    names = build_data(recipe).class_names
    plain = recipe.model_copy(update={"attention": SdpaConfig()})
    subject = from_checkpoint(path, plain, len(names))
    return Source(path, subject.model.float(), subject.image, recipe, names)


def _require_adapters(recipe: Recipe, path: Path) -> None:
    if getattr(recipe.quantization, "lora", None) is None:
        raise UserError(
            f"{path} has no adapters, so there is nothing to merge: quantization={recipe.quantization.name} without "
            "`lora` trains the weights themselves. Its model.safetensors is deployed as it is."
        )


def check_free(out: Path, suffix: str = ".safetensors") -> None:
    """See that a model file can be written there.

    Args:
        out: the file.
        suffix: what its name must end in.

    Raises:
        UserError: something is there already, or it is no name for one.
    """
    if out.suffix != suffix:
        raise UserError(f"--out {out}: this file is called NAME{suffix}.")
    if out.exists():
        raise UserError(f"--out {out} already exists, and a model is never overwritten. Choose another name.")


def merge_source(
    source: Source,
    out: Path,
    *,
    precision: Precision | None = None,
    requantize: bool = False,
    shards: str | None = None,
    images: int = 1000,
) -> Result:
    """Merge, check the result against adapters and base, and write it. The source's model is used up.

    Args:
        source: from `load_source`.
        out: the file to write; there must be none.
        precision: of the result's float layers. None: bf16 where the run was in bf16, or else fp32.
        requantize: quantize the merged weights again, by the run's scheme.
        shards: images to measure the loss of that on; None: the recipe's evaluation images.
        images: how many of them at most.

    Raises:
        UserError: there is such a file; the merged weights do not answer as adapters and base did, and nothing is
            written; the scheme of the run quantizes nothing.
    """
    check_free(out)
    recipe = source.recipe
    precision = precision or ("bf16" if recipe.quantization.precision == "bf16" else "fp32")
    scheme = without_adapters(recipe.quantization) if requantize else NoneConfig()
    quantization = scheme.model_copy(update={"precision": precision})
    result = recipe.model_copy(update={"quantization": quantization, "variant": f"{recipe.variant}, merged"})

    noise = torch.randn(PROBES, 3, *[source.image.size] * 2, generator=torch.Generator().manual_seed(0))
    before = _logits(source.model, noise)
    limit = EXACT if _computes_in_float32(source.model) else ROUNDED
    merged = merge(source.model)
    error = relative(before, _logits(source.model, noise))
    limit = limit if merged.exact else INTEGERS
    if not error <= limit:  # NaN is refused too
        raise UserError(
            f"The merged weights of {source.path} do not answer as adapters and base do: their logits differ by "
            f"{error:.2g} of their norm, and {limit:g} is what rounding explains. Nothing was written; the file is "
            "damaged, or a layer changed its weights in place."
        )
    loss = None
    if requantize:
        reference = copy.deepcopy(source.model)
        dtype = DTYPES[precision]
        result.quantization.apply(source.model, compute_dtype=dtype)
        result.quantization.finalize(source.model)
        data = recipe.data if shards is None else recipe.data.model_copy(update={"eval_shards": shards})
        loss = _loss(reference, source, result.model_copy(update={"data": data}), images)
    out.parent.mkdir(parents=True, exist_ok=True)
    origin = {"from": source.path.name, "sha256": file_digest(source.path), "adapters": str(merged.adapters)}
    size = save_deployed(out, source.model, result, source.class_names, merged=origin)
    again = load_file(out, attention=SdpaConfig())
    return Result(result, merged, error, relative(before, _logits(again.model, noise)), loss, size)


def relative(reference: Tensor, other: Tensor) -> float:
    """|difference| / |reference|, in float64."""
    return float((reference.double() - other.double()).norm() / reference.double().norm())


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits.float()


def _computes_in_float32(model: nn.Module) -> bool:
    return all(getattr(module, "compute_dtype", None) in (None, torch.float32) for module in model.modules())


def _loss(reference: nn.Module, source: Source, recipe: Recipe, most: int) -> LogitComparison:
    """Compare a quantized model, in its own precision, with the merged weights in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[recipe.quantization.precision]
    half = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    reference, quantized = reference.to(device), source.model.to(device)
    pairs = []
    for images in _images(source, recipe, most, device):
        with half:
            logits = _logits(quantized, images)
        pairs.append((_logits(reference, images).cpu(), logits.cpu()))
    source.model.cpu()
    references, others = (torch.cat(part) for part in zip(*pairs, strict=True))
    return compare(references, others)


def _images(source: Source, recipe: Recipe, most: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised evaluation images (B, 3, S, S) in the order of the shards, `most` in all."""
    data = build_data(recipe)
    data.image = source.image
    transforms = build_transforms(recipe, source.image, data.num_classes).eval()
    left = most
    try:
        for batch in data.val_dataloader():
            here: dict[str, Any] = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
            images, _ = transforms(here)
            images = images[here["weight"] > 0][:left]  # without the fillers of a last batch
            if len(images):
                yield images
            left -= len(images)
            if left <= 0:
                return
    finally:
        data.teardown("validate")
