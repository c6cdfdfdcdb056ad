"""Slurm's commands, and their refusals in words that help."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vit_efficient.errors import UserError

ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "GONE",
}  # fmt: skip
PATIENCE = 60  # seconds for the controller to answer
NOTHING = " Nothing was started."  # how advice ends that follows the refusal of a job
_FORMAT = "%i|%T|%M|%L|%N|%r"


@dataclass(frozen=True)
class Queued:
    """A job as `squeue` shows it: state, time used and left, nodes, why it waits. `GONE`: not in the queue."""

    state: str = "GONE"
    used: str = ""
    left: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class SlurmError(UserError):
    """Slurm is not here, or said no."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"There is no `{command[0]}` on this machine, so it does not belong to a Slurm cluster.\n"
            "  Go to the cluster's login node; `--dry-run` shows the script anywhere.\n"
            "  A machine with several GPUs and no Slurm: torchrun, see docs/slurm.md."
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{' '.join(command)}` has not answered for {PATIENCE} s; is the controller up?") from None


def require() -> None:
    """See that there is a Slurm to submit to.

    Raises:
        SlurmError: there is none.
    """
    _run("sbatch", "--version")


def submit(script: Path, *options: str) -> str:
    """Hand a script to `sbatch`.

    Returns:
        The job's number.

    Raises:
        SlurmError: refused; with Slurm's own words, and what to do.
    """
    done = _run("sbatch", "--parsable", *options, str(script))
    if done.returncode == 0:
        return done.stdout.strip().partition(";")[0]  # `;cluster` follows where there are several
    said = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines())
    raise SlurmError(f"Slurm refused the job. sbatch says:\n{said}\n{_advice(done.stderr)}")


def _advice(said: str) -> str:
    lower = said.lower()
    if "configuration source" in lower:
        return (
            "  Slurm's commands are here, but neither a slurm.conf nor a controller that hands one out.\n"
            f"  Submit from a login node of the cluster, or ask its administrators.{NOTHING}"
        )
    if "unable to contact" in lower:
        return (
            "  Its controller does not answer: it is down, or cannot be reached from here. `scontrol ping` asks it.\n"
            f"  Submit again later, or from a login node of the cluster.{NOTHING}"
        )
    if "partition" in lower:
        return _known("The partitions here", "%P %l", "Set `partition:` in the site file to one of them")
    if "node configuration is not available" in lower or "gres" in lower:
        wanted = "Ask for what a node has: --gpus-per-node, --cpus-per-task, --nodes, and `gpu_type:` in the site file"
        return _known("The nodes here (partition, GPUs, cores, nodes)", "%P %G %c %D", wanted)
    if "account" in lower or "qos" in lower:
        return "  `sacctmgr show associations user=$USER` lists your accounts and their QOS; set them in the site file."
    if "time limit" in lower:
        return _known("The longest times (partition, limit)", "%P %l", "Ask for less with --time")
    return f"  Set what this cluster wants in the site file; `sbatch: ` in it adds any option.{NOTHING}"


def _known(what: str, columns: str, advice: str) -> str:
    done = _run("sinfo", "--noheader", "-o", columns)
    rows = sorted(set(done.stdout.strip().splitlines()))
    shown = "".join(f"\n    {' '.join(row.split())}" for row in rows)
    return f"  {what}:{shown}\n  {advice}."


def queue(numbers: list[str]) -> dict[str, Queued]:
    """What the queue says of jobs. Those that it no longer lists are asked about one by one.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    if not numbers:
        return {}
    done = _run("squeue", "--noheader", "--me", "--array", "--states=all", f"--format={_FORMAT}")
    if done.returncode:
        raise SlurmError(f"The queue cannot be read. squeue says: {done.stderr.strip()}")
    rows = (line.strip().split("|") for line in done.stdout.splitlines())
    listed = {row[0]: Queued(*row[1:6]) for row in rows if len(row) >= 6}
    return {number: listed.get(number) or _accounted(number) for number in numbers}


def _accounted(number: str) -> Queued:
    """A job that has left the queue, as the accounting remembers it, where there is one."""
    if shutil.which("sacct") is None:
        return Queued()
    done = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,Elapsed,NodeList", f"-j{number}")
    first = done.stdout.strip().splitlines()
    if done.returncode or not first:
        return Queued()
    state, used, nodes = first[-1].split("|")[:3]
    return Queued(state.split()[0], used, "", nodes)


def cancel(number: str) -> None:
    """`scancel`: the run saves and ends.

    Raises:
        SlurmError: with Slurm's own words.
    """
    done = _run("scancel", number)
    if done.returncode:
        raise SlurmError(f"Job {number} cannot be cancelled. scancel says: {done.stderr.strip()}")
