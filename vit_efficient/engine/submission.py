"""Which runs a submission is made of: each recipe checked against the job that it asks for, and given its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vit_efficient.cluster.script import Request
from vit_efficient.cluster.site import Site
from vit_efficient.engine.base import base_recipe, given_base, has_adapters
from vit_efficient.engine.room import find_room
from vit_efficient.engine.rundir import ROOT, RunDir, new_path, stamp
from vit_efficient.errors import Problem, RecipeError, UserError
from vit_efficient.recipe.compat import check
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.merge import COMMAND_LINE
from vit_efficient.recipe.schema import Recipe

BASE = "fp32_sdpa"  # what adapters start from, where nothing else is given


@dataclass(frozen=True)
class Planned:
    """One run to be: its recipe, its folder, and the folders whose checkpoints show that it gets further.

    `note`: what is to be said of its memory.
    """

    recipe: Recipe
    run: Path
    progress: tuple[str, ...]
    after_base: bool = False  # begins when the array's base is trained
    note: str = ""

    @property
    def is_base(self) -> bool:
        """Whether this run trains what adapters start from."""
        return self.recipe.variant == BASE


def plan(names: Sequence[str], overrides: Sequence[str], request: Request, site: Site) -> tuple[list[Planned], Path]:
    """Load and check recipes, and give each its folder.

    Returns:
        The runs, and the folder that the script belongs to: the run's own, or that of the study.

    Raises:
        RecipeError: every mistake.
    """
    recipes: list[Recipe] = []
    notes: list[str] = []
    problems: list[Problem] = []
    for name in names:
        try:
            recipe = _placed(name, overrides, request)
        except RecipeError as error:
            problems += error.problems
            continue
        machine = request.machine(site)
        found = check(recipe, machine)
        if request.gpus and not [problem for problem in found if problem.path != "data.shards"]:
            room = find_room(recipe, machine, site.gpu_type)
            found += [room.problem] if room.problem else []
            notes.append(room.note)
        problems += [replace(problem, origin=problem.origin or _asker(name, names)) for problem in found]
        if recipe.variant in (other.variant for other in recipes):
            message = f"{recipe.variant} is the name of two recipes, and would be that of two folders: rename a file"
            problems.append(Problem("--recipe", message))
        recipes.append(recipe)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    root = site.runs or ROOT
    if len(recipes) == 1:
        (recipe,) = recipes
        home = (recipe.run.dir or new_path(recipe.variant, recipe.protocol, root)).absolute()
    else:
        study = f"study-{Path(recipes[0].protocol).stem}-{stamp()}"
        home = (recipes[0].run.dir or root / study).absolute()
    folders = [home] if len(recipes) == 1 else [home / recipe.variant for recipe in recipes]
    for path in (*folders, home):
        try:
            RunDir(path).check_new()
        except OSError as error:
            raise unusable(path, error) from error
    planned = [_planned(recipe, path) for recipe, path in zip(recipes, folders, strict=True)]
    planned = [replace(one, note=note) for one, note in zip(planned, notes or [""] * len(planned), strict=True)]
    return (_sharing_a_base(planned) if len(planned) > 1 else planned), home


def unusable(path: Path, error: OSError) -> UserError:
    """The file system does not let a run have its folder there."""
    return UserError(
        f"run.dir: nothing can be written to {path}: {error.strerror or error}.\n"
        "  Take another folder with run.dir=FOLDER; where runs go without it, `runs` in the site file says."
    )


def _asker(name: str, names: Sequence[str]) -> str:
    return f"--recipe {name}" if len(names) > 1 else ""


def _placed(name: str, overrides: Sequence[str], request: Request) -> Recipe:
    """A recipe whose hardware section is what the job asks for, except where the command line says otherwise."""
    loaded = load_recipe(name, overrides)
    strategy = loaded.recipe.strategy
    wanted = {
        "accelerator": "gpu" if request.gpus else "cpu",
        "devices": request.tasks,
        "nodes": request.nodes,
    }
    update = {
        key: value
        for key, value in wanted.items()
        if hasattr(strategy, key)
        and (loaded.origins.get(f"strategy.{key}") != COMMAND_LINE or getattr(strategy, key) == "auto")
    }
    recipe = loaded.recipe.model_copy(update={"strategy": strategy.model_copy(update=update)})
    if recipe.strategy.accelerator != wanted["accelerator"]:
        asked = f"is {recipe.strategy.accelerator}, and the job has {request.gpus or 'no'} GPUs a node"
        raise RecipeError([Problem("strategy.accelerator", f"{asked}: see --gpus-per-node", COMMAND_LINE)])
    return recipe


def _planned(recipe: Recipe, run: Path) -> Planned:
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": run})})
    progress = [str(run)]
    if has_adapters(recipe) and given_base(recipe) is None:
        base = base_recipe(recipe).run.dir
        assert base is not None
        progress.append(str(base.absolute()))
    return Planned(recipe, run, tuple(progress))


def _sharing_a_base(planned: list[Planned]) -> list[Planned]:
    """Of an array: runs that would each train the same base take that of the array instead, and begin after it."""
    waiting = [one for one in planned if len(one.progress) > 1]
    base = next((one for one in planned if one.is_base), None)
    if not waiting or (base is None and len(waiting) == 1):
        return planned
    if base is None:
        names = " and ".join(one.recipe.variant for one in waiting)
        message = f"{names} would each train the same fp32 base at the same time. Add `--recipe {BASE}`, or name a base"
        raise RecipeError([Problem("quantization.base", message, suggestion="quantization.base=FILE")])
    weights = str(base.run / "model.safetensors")
    shared = []
    for one in planned:
        if one in waiting:
            quantization = one.recipe.quantization.model_copy(update={"base": weights})
            recipe = one.recipe.model_copy(update={"quantization": quantization})
            one = replace(one, recipe=recipe, progress=(str(one.run),), after_base=True)
        shared.append(one)
    return shared
