"""The trained float model that adapters start from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.engine.lock import RunLock
from vit_efficient.engine.rundir import ROOT, RunDir
from vit_efficient.engine.train import train
from vit_efficient.machine import Machine, rank
from vit_efficient.model.build import refuse_rounded
from vit_efficient.model.weights import from_hub, locate
from vit_efficient.quantization.none import NoneConfig
from vit_efficient.recipe.schema import CheckpointConfig, Recipe


@dataclass(frozen=True)
class Base:
    """Weights to start adapters from, and the seconds that training them took (0 where they were given)."""

    weights: str
    seconds: float


def has_adapters(recipe: Recipe) -> bool:
    """Whether the recipe trains adapters on a frozen base."""
    return getattr(recipe.quantization, "lora", None) is not None


def _named(recipe: Recipe) -> str | None:
    return getattr(recipe.quantization, "base", None) or recipe.model.weights


def base_recipe(recipe: Recipe, root: Path = ROOT) -> Recipe:
    """The protocol of ``recipe`` in plain fp32; its folder's name says what it was trained on."""
    plain = recipe.model_copy(
        update={
            "variant": "fp32_sdpa",
            "attention": SdpaConfig(),
            "quantization": NoneConfig(precision="fp32"),
            "checkpoint": CheckpointConfig(),
            "data": recipe.data.model_copy(update={"audit": None}),
        }
    )
    owned = plain.model_dump(mode="json", include={"model", "data", "augment", "optim"})
    for machine_matter in ("workers", "audit", "eval_batch_size"):
        owned["data"].pop(machine_matter)
    text = json.dumps([owned, recipe.run.seed], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = root / f"base-{Path(recipe.protocol).stem or 'protocol'}-{digest}"
    return plain.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})


def given_base(recipe: Recipe) -> Base | None:
    """The base that the recipe names, or the one that was trained before; None if there is neither."""
    if (named := _named(recipe)) is not None:
        return Base(named, 0.0)
    folder = base_recipe(recipe).run.dir
    assert folder is not None
    run = RunDir(folder)
    if not (run.finished and run.model.is_file()):
        return None
    seconds = json.loads(run.metrics.read_text(encoding="utf-8"))["seconds"]
    return Base(str(run.model), float(seconds))


def check_given(recipe: Recipe) -> None:
    """See that the weights that the recipe names are there and are what it may start from; reads no tensor.

    Raises:
        UserError: they are quantized already.
        CheckpointError: there is no such file.
    """
    for key, spec in (
        ("quantization.base", getattr(recipe.quantization, "base", None)),
        ("model.weights", recipe.model.weights),
    ):
        if spec is not None and not from_hub(spec):
            locate(spec, key=key)
    refuse_rounded(recipe, _named(recipe))


def ensure_base(recipe: Recipe, machine: Machine, console: Console) -> Base:
    """Find the base that ``recipe`` needs, or train it once; its time is counted apart.

    Raises:
        UserError: as `train` does.
    """
    found = given_base(recipe)
    if found is not None:
        if _named(recipe) is None:
            console.print(f"[bold]{'base':>13}[/]  {found.weights}, trained before in {found.seconds:.0f} s")
        return found
    plain = base_recipe(recipe)
    assert plain.run.dir is not None
    run = RunDir(plain.run.dir)
    with RunLock(run.path, held=rank() == 0):
        checkpoint = run.whole_checkpoint(console.print)
        console.rule("the protocol's fp32 base")
        how = f"goes on from {checkpoint}" if checkpoint else "is trained first, once; later runs find it"
        console.print(f"{recipe.variant} starts from a trained model; none was given, so the fp32 base {how}.")
        train(plain, machine, run, console, resume=checkpoint)
    console.rule(recipe.variant)
    result = given_base(recipe)
    assert result is not None, "train() has just written it"
    return result
