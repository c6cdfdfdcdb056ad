"""One readable sbatch script out of a request, a site and the template `slurm/job.sh`."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from vit_efficient.cluster.record import folder
from vit_efficient.cluster.site import CPU_CORES, GPU_CORES, Site
from vit_efficient.errors import Problem
from vit_efficient.machine import PACKAGES, Launch, Machine, installed

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?")
_PLACE = re.compile(r"@([A-Z]+)@")


@dataclass(frozen=True)
class Request:
    """What a job asks of the cluster.

    Args:
        nodes: machines.
        gpus: on each node; 0 trains on CPUs.
        tasks: processes on each node, one for each device.
        cores: of each process.
        seconds: time limit.
    """

    nodes: int
    gpus: int
    tasks: int
    cores: int
    seconds: int

    @classmethod
    def of(cls, site: Site, *, nodes: int, gpus: int, tasks: int | None, seconds: int) -> Request:
        """Fill in what follows from the rest: a process for each GPU, and the site's cores for each process."""
        cores = site.cpus_per_task or (GPU_CORES if gpus else CPU_CORES)
        return cls(nodes, gpus, tasks or gpus or 1, cores, seconds)

    def machine(self, site: Site) -> Machine:
        """What one process of the job will find, as far as it can be known before."""
        launch = Launch("srun", self.nodes * self.tasks, self.nodes, self.gpus or None, self.cores)
        elsewhere = site.container is not None or site.python is not None  # what is installed there is not known here
        packages = dict.fromkeys(PACKAGES, "") if elsewhere else installed()
        return Machine((site.gpu(),) * self.gpus, "", self.cores, packages, launch)

    def __str__(self) -> str:
        devices = f"{self.gpus} GPU{'s' * (self.gpus != 1)}"
        if not self.gpus:
            devices = f"{self.tasks} CPU process{'es' * (self.tasks != 1)}"
        return f"{self.nodes} node{'s' * (self.nodes != 1)} x {devices}, at most {slurm_time(self.seconds)}"


def read_time(text: str) -> int:
    """Seconds of a time limit, written as Slurm does (90 minutes, 1:30:00, 2-12, 2-12:00) or as 90m, 12h, 2d12h.

    Raises:
        ValueError: not a time, or none at all.
    """
    if (match := _UNITS.fullmatch(text)) and any(match.groups()):
        seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60), strict=True))
    elif match := _CLOCK.fullmatch(text):
        days, *parts = match.groups()
        first, second, third = (int(part or 0) for part in parts)
        if days is not None:  # days-hours[:minutes[:seconds]]
            seconds = 86400 * int(days) + 3600 * first + 60 * second + third
        elif parts[2] is not None:
            seconds = 3600 * first + 60 * second + third
        else:  # minutes[:seconds]
            seconds = 60 * first + second
    else:
        raise ValueError(f"{text!r} is no time: write 12h, 90m, 2d12h, 12:00:00 or 2-12:00:00")
    if seconds == 0:
        raise ValueError("is no time at all")
    return seconds


def slurm_time(seconds: int) -> str:
    """``days-hours:minutes:seconds``, or without the days; Slurm itself rounds up to minutes."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def check_request(request: Request, site: Site) -> list[Problem]:
    """What is wrong with a request before a recipe is looked at."""
    problems = []
    if request.gpus and request.tasks != request.gpus:
        message = f"is {request.tasks}, and each of {request.gpus} GPUs of a node needs one process"
        problems.append(Problem("--tasks-per-node", f"{message}. Leave it out; it is for jobs without GPUs"))
    if request.seconds < 2 * site.warn_seconds:
        message = (
            f"is {request.seconds} s, and the run saves and leaves {site.warn_seconds} s before the end "
            "(site.warn_seconds), up to a minute earlier. Take a longer time, or a later warning"
        )
        problems.append(Problem("--time", message, allowed=f"{2 * site.warn_seconds} s or more"))
    return problems


def template() -> str:
    """`slurm/job.sh`: inside the package (wheel), or beside it (checkout)."""
    package = Path(__file__).parents[1]
    inside = package / "slurm"
    return ((inside if inside.is_dir() else package.parent / "slurm") / "job.sh").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Script:
    """What a script is rendered from.

    Args:
        name: of the job in the queue.
        title: a line for people.
        request: what it asks for.
        site: the cluster.
        site_file: where that was read, if anywhere.
        runs: absolute run folders; several make a job array.
        home: the folder whose `slurm/` the script lies in: the run's, or that of a study.
        workdir: where the processes run.
    """

    name: str
    title: str
    request: Request
    site: Site
    site_file: Path | None
    runs: tuple[Path, ...]
    home: Path
    workdir: Path

    @property
    def array(self) -> bool:
        return len(self.runs) > 1

    @property
    def path(self) -> Path:
        """Where it is written."""
        return folder(self.home) / "job.sh"

    def log(self, index: int = 0) -> Path:
        """What run number `index` prints goes here."""
        return folder(self.home) / (f"output-{index}.log" if self.array else "output.log")

    def again(self, index: int = 0) -> str:
        """The command that goes on with run number `index` by hand."""
        return shlex.join(["sbatch", *([f"--array={index}"] if self.array else []), str(self.path)])

    def render(self) -> str:
        """The text of the script. A line of the template whose only place stays empty is left out."""
        parts = {
            "HEADER": f"# {self.title}: {self.request}",
            "SBATCH": "\n".join(f"#SBATCH {option}" for option in self._sbatch()),
            "RUN": self._run(),
            "SITE": str(self.site_file.absolute()) if self.site_file else "no site file, Slurm's defaults",
            "SETUP": "\n".join(self._setup()),
            "PYTHON": self._python(),
            "ADDRESS": self._address(),
            "SRUN": " ".join(["srun", *self._srun()]),
            "AGAIN": '--array="$SLURM_ARRAY_TASK_ID" ' if self.array else "",
        }
        lines = []
        for line in template().splitlines():
            if (only := _PLACE.fullmatch(line)) and not parts[only[1]]:
                continue
            lines.append(_PLACE.sub(lambda match: parts[match[1]], line))
        return "\n".join(lines) + "\n"

    def _sbatch(self) -> list[str]:
        site, request = self.site, self.request
        options: dict[str, object] = {"job-name": self.name, "chdir": self.workdir}
        for key in ("partition", "account", "qos", "constraint"):
            options[key] = getattr(site, key)
        if self.array:
            options["array"] = f"0-{len(self.runs) - 1}"
        options |= {"nodes": request.nodes, "ntasks-per-node": request.tasks, "cpus-per-task": request.cores}
        if request.gpus:
            count = f"{site.gpu_type}:{request.gpus}" if site.gpu_type else str(request.gpus)
            options |= {"gres": f"gpu:{count}"} if site.gres else {"gpus-per-node": count}
        options |= {"mem": site.memory, "time": slurm_time(request.seconds)}
        log = folder(self.home) / ("output-%a.log" if self.array else "output.log")
        options |= {"signal": f"USR1@{site.warn_seconds}", "output": log, "open-mode": "append"}
        given = [f"--{key}={_bare(str(value))}" for key, value in options.items() if value is not None]
        return [*given, "--requeue", *site.sbatch]

    def _run(self) -> str:
        lines = [f"script={shlex.quote(str(self.path))}"]
        if not self.array:
            return "\n".join([*lines, f"run={shlex.quote(str(self.runs[0]))}"])
        named = [f"    {shlex.quote(str(run))}" for run in self.runs]
        return "\n".join([*lines, "runs=(", *named, ")", "run=${runs[SLURM_ARRAY_TASK_ID]}"])

    def _setup(self) -> list[str]:
        site, lines = self.site, []
        lines += [f"module load {shlex.quote(name)} || exit 2" for name in site.modules]
        lines += site.setup
        if site.scratch is not None:
            each = f"srun --nodes={self.request.nodes} --ntasks-per-node=1 " if self.request.nodes > 1 else ""
            lines += [
                f'scratch="{site.scratch}/vit_efficient"',
                'export TMPDIR="$scratch/tmp" VIT_EFFICIENT_CACHE="$scratch/cache"',
                'export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"',
                f'{each}mkdir -p "$TMPDIR"',
            ]
        if not self.request.gpus and "OMP_NUM_THREADS" not in site.environment:
            lines.append(f"export OMP_NUM_THREADS={self.request.cores}")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
        return lines

    def _python(self) -> str:
        if self.site.container is not None:
            return f"{self.site.container} {shlex.quote(self.site.python or 'python')}"
        # Without a `site.python` the same environment as here. Slurm's shell knows no aliases, so the full path.
        return shlex.quote(self.site.python or sys.executable)

    def _address(self) -> str:
        if "MASTER_ADDR" in self.site.environment:
            return "# MASTER_ADDR is the site's (environment, above)."
        first = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        return f"{first}\nexport MASTER_ADDR=${{MASTER_ADDR:-$(hostname)}}"

    def _srun(self) -> list[str]:
        return ["--kill-on-bad-exit=1", f"--cpus-per-task={self.request.cores}", *self.site.srun]


def _bare(value: str) -> str:
    """As `#SBATCH` reads it: quoted only where it must be."""
    return f'"{value}"' if re.search(r"\s", value) else value
