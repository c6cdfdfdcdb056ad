"""What differs between clusters, in one file: `site.yaml`."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationError, field_validator

from vit_efficient.config import Config
from vit_efficient.errors import Problem
from vit_efficient.machine import Gpu
from vit_efficient.recipe.yaml12 import YamlError, parse

DEFAULT = Path("site.yaml")  # read from the working directory where `--site` is not given
GPU_CORES, CPU_CORES = 8, 1  # cores of a process where nobody says: a loader needs some for each GPU

# Compute capability of the GPU types that clusters offer, by how their names begin.
CAPABILITIES = {
    "p100": (6, 0), "v100": (7, 0), "t4": (7, 5), "rtx6000": (7, 5), "rtx8000": (7, 5), "a100": (8, 0), "a30": (8, 0),
    "a40": (8, 6), "a10": (8, 6), "a6000": (8, 6), "rtx3090": (8, 6), "l4": (8, 9), "l40": (8, 9), "rtx4090": (8, 9),
    "rtx6000ada": (8, 9), "h100": (9, 0), "h200": (9, 0), "gh200": (9, 0), "b200": (10, 0),
}  # fmt: skip
NEWEST = (9, 0)


class Site(Config):
    """One cluster. Every key may be left out; what is then rendered works on a cluster with sensible defaults."""

    partition: str | None = Field(None, description="`--partition`.")
    account: str | None = Field(None, description="`--account`.")
    qos: str | None = Field(None, description="`--qos`.")
    constraint: str | None = Field(None, description="`--constraint`, a feature of nodes.")
    gpu_type: str | None = Field(None, description="As the cluster names it, for example `a100`: `sinfo -o '%P %G'`.")
    gres: bool = Field(False, description="Ask with `--gres=gpu:N`, where `--gpus-per-node` is not understood.")
    cpus_per_task: PositiveInt | None = Field(None, description="Cores of a process. Unset: 8 with a GPU, 1 without.")
    memory: str | None = Field(None, description="`--mem`, for each node; `0` is all of it.")
    sbatch: tuple[str, ...] = Field((), description="More options for `sbatch`, such as `--exclusive`.")
    srun: tuple[str, ...] = Field((), description="More options for `srun`, such as `--mpi=none`.")
    modules: tuple[str, ...] = Field((), description="Loaded with `module load`.")
    setup: tuple[str, ...] = Field((), description="Lines of bash that run before anything else.")
    environment: dict[str, str] = Field(default_factory=dict, description="Exported as they are, without expansion.")
    container: str | None = Field(None, description="Command that the interpreter is put behind: `apptainer exec ...`.")
    python: str | None = Field(
        None, description="The interpreter. Unset: the one that submits; in a container `python`."
    )
    runs: Path | None = Field(None, description="Shared folder that runs' folders go into. Unset: `./runs`.")
    scratch: str | None = Field(
        None, description="Fast folder of each node for temporary files; may hold `$VARIABLES`."
    )
    warn_seconds: PositiveInt = Field(180, description="Seconds before the time limit at which a run saves and leaves.")
    restarts: PositiveInt = Field(3, description="Restarts without progress in a row, after which a run stops.")

    @field_validator("python", "runs", "scratch")
    @classmethod
    def _home(cls, path: str | Path | None) -> str | Path | None:
        if path is None:
            return None
        # Here, not in the job: what the script quotes no shell expands.
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            raise ValueError(f"is {str(path)!r}, and nobody knows that home folder: write the whole path")
        return type(path)(expanded)

    @field_validator("sbatch", "srun")
    @classmethod
    def _options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"holds {option!r}, which is no option: write it as `--name=value`")
        return options

    @field_validator("setup", "modules")
    @classmethod
    def _lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if "\n" in line:
                raise ValueError(f"holds a line break in {line!r}: one line an entry")
        return lines

    @field_validator("environment")
    @classmethod
    def _names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not name.isidentifier() or not name.isascii():
                raise ValueError(f"holds {name!r}, which is no name of an environment variable")
        return environment

    def gpu(self) -> Gpu:
        """A GPU as the recipe is checked against before anything runs; an unknown type can do what the newest can."""
        kind = (self.gpu_type or "").lower().replace("-", "").replace("_", "")
        matching = [name for name in CAPABILITIES if kind.removeprefix("nvidia").startswith(name)]
        capability = CAPABILITIES[max(matching, key=len)] if matching else NEWEST
        return Gpu(self.gpu_type or "GPU", capability, 0)


def read_site(path: Path | None) -> tuple[Site, Path | None, list[Problem]]:
    """Read a site file.

    Args:
        path: as `--site` gave it; None: `site.yaml` in the working directory, if it is there.

    Returns:
        The site (with defaults only, where the file has mistakes or is absent), the file that was read, and its
        mistakes.
    """
    if path is None:
        if not DEFAULT.is_file():
            return Site(), None, []
        path = DEFAULT
    try:
        content, lines = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Site(), None, [Problem("--site", f"there is no file {str(path)!r}; examples: slurm/site.example*.yaml")]
    except (OSError, UnicodeDecodeError) as error:
        return Site(), None, [Problem("--site", f"{path} cannot be read: {error}")]
    except YamlError as error:
        return Site(), path, [Problem("--site", f"is not valid YAML: {error}", f"{path}:{error.line}")]
    if content is None:
        return Site(), path, []
    if not isinstance(content, dict):
        return Site(), path, [Problem("--site", "must be a mapping such as `partition: gpu`", str(path))]
    try:
        return Site.model_validate_json(json.dumps(content), strict=True), path, []
    except ValidationError as error:
        return Site(), path, [_problem(dict(mistake), lines, path) for mistake in error.errors()]


def _problem(mistake: dict[str, object], lines: dict[tuple[str, ...], int], path: Path) -> Problem:
    place = mistake["loc"]
    assert isinstance(place, tuple)
    key = tuple(str(part) for part in place)
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    origin = f"{path}:{line}" if line else str(path)
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key[0], Site.model_fields, 1)
        known = ", ".join(Site.model_fields)
        return Problem(f"site.{key[0]}", "there is no such key", origin, known, near[0] if near else "")
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] != "value_error":
        got = json.dumps(mistake["input"])
        message = f"{message[0].lower()}{message[1:]}, got {got}"
        if mistake["type"] in ("string_type", "path_type") and isinstance(mistake["input"], bool | int | float):
            message += f', which YAML does not read as text: write it as "{got}"'
    return Problem("site." + ".".join(key), message, origin)
