"""What this machine is: GPUs, driver, optional packages. Looks only when asked; importing it starts nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; `memory` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Launch:
    """Processes that somebody else started, one for each device: `srun` or `torchrun`.

    Args:
        by: who.
        processes: of the run, on all nodes.
        nodes: that they are on.
        gpus: of the job on this node. One process may see fewer, where Slurm binds one to each; None: all that it sees.
        cores: of one process; None: nobody said.
    """

    by: Literal["srun", "torchrun"]
    processes: int
    nodes: int = 1
    gpus: int | None = None
    cores: int | None = None

    @property
    def per_node(self) -> int:
        """Processes on a node, on the fullest where they differ."""
        return -(-self.processes // self.nodes)


@dataclass(frozen=True)
class Machine:
    """What a recipe may count on. Tests and `submit` build one by hand to ask about machines that are not here."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cores: int = 1
    packages: dict[str, str] = field(default_factory=dict)
    launch: Launch | None = None

    @property
    def gpus_on_node(self) -> int:
        """GPUs that the run's processes on this node have together."""
        if self.launch is not None and self.launch.gpus is not None and self.gpus:
            return max(self.launch.gpus, len(self.gpus))
        return len(self.gpus)

    def version(self, package: str) -> str | None:
        """Installed version of a distribution such as ``flash-attn``, or None."""
        return self.packages.get(package)


PACKAGES = (
    "torch", "torchvision", "lightning", "timm", "torchmetrics", "webdataset", "tensorboard", "bitsandbytes", "peft",
    "simplejpeg", "flash-attn", "deepspeed", "torchao", "triton", "pyarrow", "s3fs", "onnx", "onnxruntime",
)  # fmt: skip


def installed(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the distributions that are installed, without importing any of them."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """What this user's runs keep: `$VIT_EFFICIENT_CACHE`, or `~/.cache/vit_efficient`."""
    chosen = os.environ.get("VIT_EFFICIENT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vit_efficient"


def rank() -> int:
    """This process's number among all of a run, as its launcher (Lightning, torchrun, Slurm) says; 0 if alone."""
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0)


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Who started this process together with others, as the environment says; None: it is alone so far.

    A Slurm step of a single task counts as alone: it is also what `srun --pty bash` gives a person.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", world, max(1, world // local))
    processes = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" not in environment or processes == 1:
        return None
    gpus, cores = (environment.get(f"SLURM_{name}") for name in ("GPUS_ON_NODE", "CPUS_PER_TASK"))
    return Launch(
        "srun",
        processes,
        int(environment.get("SLURM_STEP_NUM_NODES", "1")),
        int(gpus) if gpus else None,
        int(cores) if cores else None,
    )


def sees_one_gpu(launch: Launch | None) -> bool:
    """Whether each of several processes of a node was given a GPU of its own and sees no other."""
    import torch

    return launch is not None and launch.per_node > 1 and torch.cuda.device_count() == 1


def process_started(pid: int) -> float | None:
    """When a process of this machine began, in seconds since the epoch; None where that cannot be read."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def driver_version() -> str:
    """The NVIDIA kernel driver's version, or an empty string."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def detect() -> Machine:
    """Ask the machine. Counts the GPUs through NVML where it can, so that no CUDA context is made."""
    import torch

    gpus: list[Gpu] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory))
    return Machine(tuple(gpus), driver_version(), cores(), installed(), detect_launch())


def summary(machine: Machine) -> list[tuple[str, str]]:
    """Rows (what, value) for a person to read."""
    rows = [("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")]
    rows.append(("cores", str(machine.cores)))
    if machine.gpus:
        rows.append(("driver", machine.driver or "unknown"))
        for index, gpu in enumerate(machine.gpus):
            major, minor = gpu.capability
            rows.append((f"GPU {index}", f"{gpu.name}, sm_{major}{minor}, {gpu.memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none that torch can use" + (f" (driver {machine.driver})" if machine.driver else "")))
    return rows
