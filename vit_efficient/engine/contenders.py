"""Recipes and model files as contenders of the model benchmark: built, on the device, in the way that they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.engine.calibration import needs_calibration
from vit_efficient.engine.deployed import load_file
from vit_efficient.engine.entries import Entry
from vit_efficient.engine.subject import find, from_checkpoint
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import Machine
from vit_efficient.measure.cuda_graph import capturing
from vit_efficient.measure.memory import weight_bytes
from vit_efficient.measure.models import Absent, Contender, Step, collect
from vit_efficient.measure.trouble import EXPECTED, said, works
from vit_efficient.model.backbone import create_backbone
from vit_efficient.model.build import DTYPES, Built, build_model, prepare_training
from vit_efficient.model.fused import fuse_blocks
from vit_efficient.model.fused_mlp import fuse_mlps
from vit_efficient.model.module import learning_rate
from vit_efficient.model.optim import build_optimizer
from vit_efficient.quantization.calibrate import FEWEST, calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8_layers import learn_scales
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

CLASSES = 1000  # of the head, where neither the recipe nor a file says otherwise
FUSED = ("int8", "fp8")  # whose blocks have a fused form
IRRELEVANT = ("data.", "strategy.micro_batch")  # keys whose mistakes do not matter where no data is read


def load_entry(entry: Entry, words: Sequence[str], machine: Machine) -> Recipe:
    """The resolved recipe of an entry.

    Args:
        entry: what to load.
        words: overrides that all entries share; the entry's own win.
        machine: where it shall run.

    Raises:
        RecipeError: this machine cannot run it.
    """
    source = entry.source
    if entry.file:
        _, recipe_file = find(entry.source)
        if recipe_file is None:
            raise UserError(f"--checkpoint {entry.source}: no recipe lies beside it. Name its run's folder.")
        source = str(recipe_file)
    random = [] if entry.file else ["model.weights=null"]  # speed does not depend on them: nothing is downloaded
    recipe, _ = resolve(load_recipe(source, [*random, *words, *entry.words]).recipe, machine)
    problems = [p for p in check(recipe, machine) if not p.path.startswith(IRRELEVANT)]
    if problems:
        raise RecipeError(problems)
    return recipe


def build_contender(entry: Entry, recipe: Recipe, tell: Callable[[str], None]) -> Contender:
    """Build a model and put it on its device.

    Weights are random unless the command line names some; speed does not depend on them. A form that wants calibration
    gets it on random images, which `tell` is told: such a model answers nothing sensible. Blocks of int8 and fp8 models
    are fused, and MLPs of 16-bit models that are not quantized.

    Args:
        entry: how it runs, and its name.
        recipe: resolved, of `load_entry`.
        tell: what a person should know.
    """
    device = _device(recipe)
    dtype = DTYPES[recipe.quantization.precision]
    if entry.how == "training":
        return _trained(entry, recipe, device, tell)
    if entry.file:
        path, _ = find(entry.source)
        classes = len(load_file(path).class_names) if path.suffix == ".safetensors" else recipe.model.num_classes
        if classes is None:
            raise UserError(f"--checkpoint {entry.source}: how many classes it has is not said. Name its model file.")
        subject = from_checkpoint(path, recipe, classes)
        model, size = subject.model, subject.image.size
    else:
        built = _stock(recipe) if entry.stock else build_random(recipe, _classes(recipe), device, tell, entry.title)
        if not entry.stock:
            recipe.quantization.finalize(built.model)
        model, size = built.model, built.image.size
    model = model.eval().requires_grad_(False).to(device, dtype)
    if recipe.quantization.name in FUSED and isinstance(getattr(model, "blocks", None), nn.Module):
        report = fuse_blocks(model)
        for line in (report.count(), *report.reasons()):
            tell(f"{entry.title}: {line}")
    elif recipe.quantization.name == "none" and dtype != torch.float32 and not entry.stock:
        fuse_mlps(model)
    held = weight_bytes(model)
    run = _inference(model, entry)
    words = [entry.source, *entry.words]
    return Contender(entry.title, entry.how, dtype, size, held, run, words, compile_mode=entry.compile_mode)


def build_contenders(asked: Sequence[tuple[Entry, Recipe]], tell: Callable[[str], None]) -> list[Contender | Absent]:
    """Build one after the other; what cannot be built is told, and stands as `Absent` among the others.

    Raises:
        RuntimeError: an error after which the device does nothing any more.
    """
    built: list[Contender | Absent] = []
    for entry, recipe in asked:
        device = _device(recipe)
        try:
            built.append(build_contender(entry, recipe, tell))
        except EXPECTED as error:
            if not works(device):
                raise
            failed, dtype = said(error), str(DTYPES[recipe.quantization.precision]).removeprefix("torch.")
            words = (entry.source, *entry.words)
            built.append(Absent(entry.title, entry.how, dtype, failed, words, entry.compile_mode))
            tell(f"{entry.title}: could not be built: {failed}")
            collect(device)
    return built


def _device(recipe: Recipe) -> torch.device:
    return torch.device("cuda" if recipe.strategy.accelerator == "gpu" else "cpu")


def _stock(recipe: Recipe) -> Any:
    torch.manual_seed(recipe.run.seed)
    return create_backbone(recipe.model, _classes(recipe))


def _classes(recipe: Recipe) -> int:
    return recipe.model.num_classes or CLASSES


def build_random(recipe: Recipe, classes: int, device: torch.device, tell: Callable[[str], None], title: str) -> Built:
    """The model that a recipe trains, of random weights unless it names some; what wants calibration gets it on noise.

    Args:
        recipe: resolved.
        classes: of the head.
        device: to calibrate on.
        tell: what a person should know.
        title: what to call it there.
    """
    torch.manual_seed(recipe.run.seed)
    built = build_model(recipe, classes, base=getattr(recipe.quantization, "base", None))
    if needs_calibration(recipe):
        tell(f"{title}: calibrated on {FEWEST} random images, for its speed alone")
        config = getattr(recipe.quantization, "calibration", None) or CalibrationConfig()
        # What is fitted decides which operations run; how well does not.
        config = config.model_copy(update={"samples": FEWEST, "views": 1, "rounding": "nearest", "importance": False})
        size = built.image.size
        images = torch.randn(FEWEST, 3, size, size, generator=torch.Generator().manual_seed(0))
        built.model.to(device)
        with torch.autocast(device.type, enabled=False):
            calibrate(built.model, [images.to(device)], config)
        if getattr(recipe.quantization, "learn_scales", False):
            learn_scales(built.model)
    return built


def _inference(model: nn.Module, entry: Entry) -> Callable[[Tensor], Step]:
    compiled: Any = model
    if entry.how.startswith("compiled"):
        compiled = torch.compile(model, dynamic=False, mode=entry.compile_mode)

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        with _float32_products(entry.tf32):
            return compiled(images)

    def prepare(images: Tensor) -> Step:
        if entry.how.endswith("graph"):
            return _captured(forward, images)
        return forward

    return prepare


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _captured(forward: Step, images: Tensor) -> Step:
    """`forward` on these very images as a CUDA graph: one launch for all kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants everything compiled, allocated and chosen before
        for _ in range(3):
            forward(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, images.device):
        output = forward(images)

    def replay(_: Tensor) -> object:
        graph.replay()
        return output

    return replay


def _trained(entry: Entry, recipe: Recipe, device: torch.device, tell: Callable[[str], None]) -> Contender:
    """A contender whose step is forward, backward, clipping and the optimizer's step, on random labels."""
    built: Any = _stock(recipe) if entry.stock else build_random(recipe, _classes(recipe), device, tell, entry.title)
    if not entry.stock and not built.trainable:
        raise UserError(f"{entry.title} leaves nothing to train: quantization={recipe.quantization.name}.")
    model = built.model.to(device).train()
    call: Any = model
    if entry.stock:
        call = torch.compile(model, dynamic=False) if recipe.strategy.compile else model
    else:
        prepare_training(built, recipe)
    dtype = DTYPES[recipe.quantization.precision]
    held, optim = weight_bytes(model), recipe.optim
    lr = learning_rate(optim, recipe.quantization)

    def prepare(images: Tensor) -> Step:
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        optimizer = build_optimizer(model, optim, lr, scaled=dtype == torch.float16)
        labels = torch.randint(model.num_classes, (len(images),), generator=torch.Generator().manual_seed(0)).to(device)
        trainable = [p for p in model.parameters() if p.requires_grad]

        def step(images: Tensor) -> object:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), _float32_products(entry.tf32):
                logits = call(images)
            loss = F.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            if optim.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trainable, optim.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    words = [entry.source, *entry.words]
    contender = Contender(entry.title, "training", torch.float32, built.image.size, held, prepare, words)
    return replace(contender, computes=dtype)
