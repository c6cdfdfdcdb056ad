"""A real two-node Slurm cluster on this machine, and digits runs small enough for it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}", "data.batch_size=128",
    "optim.epochs=3", "optim.warmup_epochs=1", "optim.ema=0.9", "data.workers=1",
)  # fmt: skip
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
PATIENCE = 300.0  # seconds; the machine may be busy with other things

# Everything on the loopback interface, without munge and cgroups; a node that does not answer is down after 20 s.
SLURM_CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
MinJobAge=600
InactiveLimit=0
KillWait=20
SlurmdTimeout=20
OverTimeLimit=2
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 Gres=gpu:h200:2 "
    "State=UNKNOWN"
)
GRES_CONF = """\
NodeName=n[1-2] Name=gpu Type=h200 File=/dev/null
NodeName=n[1-2] Name=gpu Type=h200 File=/dev/zero
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to clients."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in range(17817 + os.getpid() % 1000, 32000):
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


class Cluster:
    """A controller and two nodes; all of it stops with `stop`, whatever happened in between."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname()
        controller, daemon, *ports = free_ports(4)
        nodes = "\n".join(NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True))
        (folder / "state").mkdir()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            SLURM_CONF.format(host=host, controller=controller, daemon=daemon, folder=folder, nodes=nodes)
        )
        (folder / "gres.conf").write_text(GRES_CONF)
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._pending: dict[str, float] = {}  # jobs, since when they wait

    def start(self) -> None:
        self.run("slurmctld", "-c", "-f", str(self.conf))
        for name in NODES:
            self.start_node(name)
        self.wait_for("both nodes", lambda: all(self.node_state(name) == "IDLE" for name in NODES), 60)

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """What a power cut does: the daemon and all that it started are gone at once."""
        victims = [pid for pid in [self.daemon_pid(name)] if pid is not None]
        for process in self._processes(name):
            victims += [_parent(process), process]
        for victim in victims:
            if victim in victims[:1] or "slurmstepd" in _command(victim) or victim in self._processes(name):
                _kill(victim)

    def _processes(self, name: str) -> list[int]:
        """What jobs run on a node; each was told where it is. Their parents, the step daemons, hide what they were."""
        return _marked((f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.conf}".encode()))

    @contextlib.contextmanager
    def held(self, number: str) -> Iterator[list[int]]:
        """Stop a job's processes, so that nothing depends on how fast this machine is. Slurm's signals wake them.

        A run that has ended before that has none, and no test of what happens in its middle can go on.
        """
        marks = (f"SLURM_JOB_ID={number}".encode(), b"SLURM_STEP_ID=0", f"SLURM_CONF={self.conf}".encode())
        pids = [pid for pid in _marked(marks) if _stop(pid)]
        try:
            assert pids, f"job {number} has no process left to stop"
            yield pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def wait_for_signal(self, pids: list[int], number: signal.Signals) -> None:
        """Wait until Slurm's signal lies ready for a process that is held, or has woken it."""
        self.wait_for(f"{number.name} from Slurm", lambda: any(_reached(pid, number) for pid in pids))

    def daemon_pid(self, name: str) -> int | None:
        file = self.folder / ("slurmctld.pid" if name == "slurmctld" else f"slurmd.{name}.pid")
        try:
            return int(file.read_text())
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30, check=False)
        subprocess.run(["scontrol", "shutdown"], env=self.environment, capture_output=True, timeout=30, check=False)
        deadline = time.monotonic() + 20
        names = ("slurmctld", *NODES)
        while time.monotonic() < deadline and any(_alive(self.daemon_pid(name)) for name in names):
            time.sleep(0.1)
        for pid in [self.daemon_pid(name) for name in names]:
            if pid is not None and _alive(pid):
                _kill(pid)

    def clear(self) -> None:
        """End all jobs, and bring back nodes that a test has killed."""
        self.run("scancel", "--user=root", check=False)
        for name in NODES:
            if not _alive(self.daemon_pid(name)):
                self.start_node(name)
        self.wait_for("an empty queue", lambda: not self.run("squeue", "-h").strip())
        self.wait_for("both nodes", lambda: all(self.node_state(name) == "IDLE" for name in NODES))

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def node_state(self, name: str) -> str:
        return self.run("sinfo", "-h", "-n", name, "-p", "cpu", "-o", "%T").strip().upper()

    def job(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def nudge(self, number: str) -> str:
        """Begin a requeued job after three seconds in place of two minutes. Returns its state.

        Not at once: a node refuses a job that it has killed in the same second ("Job credential revoked").
        """
        state = self.job(number)["JobState"]
        if state != "PENDING":
            self._pending.pop(number, None)
        elif time.monotonic() - self._pending.setdefault(number, time.monotonic()) > 3:
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
        return state

    def wait_for(self, what: str, happened: Callable[[], bool], seconds: float = PATIENCE, pause: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return
            time.sleep(pause)
        raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{self.run('squeue', check=False)}")


def _state(pid: int | None) -> str:
    """One letter, as the kernel says it; Z where there is nothing left of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _alive(pid: int | None) -> bool:
    return _state(pid) != "Z"


def _stop(pid: int) -> bool:
    """Stop a process; False if it has ended, as a worker that had done its work."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    while (state := _state(pid)) not in "TZ" and time.monotonic() < deadline:  # it may have to finish a system call
        time.sleep(0.01)
    return state == "T"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reached(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has been sent a signal, which it gets when it goes on; or goes on already."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    waiting = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return not fields["State"].startswith("T") or bool(waiting & 1 << (number - 1))


def _marked(marks: tuple[bytes, ...]) -> list[int]:
    """Processes with these in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            if all(mark in environment for mark in marks):
                found.append(int(process.name))
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    return ""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster; none of its daemons outlives the tests.

    Where it cannot run the tests are skipped; in CI (`.ci/run`) they fail, or nobody would notice.
    """
    give_up = pytest.fail if os.environ.get("VIT_EFFICIENT_CI") == "1" else pytest.skip
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        give_up(f"needs Slurm (Debian: apt-get install slurm-wlm); not installed: {', '.join(missing)}")
    if os.getuid() != 0:
        give_up("needs root, as which Slurm's daemons run here")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Desk:
    """A folder that runs are submitted from, with a site file for the test cluster."""

    def __init__(self, cluster: Cluster, folder: Path, cache: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = {
            **cluster.environment, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "120",
        }  # fmt: skip
        self.site()

    def site(self, **more: object) -> None:
        """Write `site.yaml`: what the test cluster wants, and more."""
        environment = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VIT_EFFICIENT_CACHE": "CACHE"}
        environment["VIT_EFFICIENT_CACHE"] = self.environment["VIT_EFFICIENT_CACHE"]
        (self.folder / "site.yaml").write_text(json.dumps({"partition": "cpu", "environment": environment, **more}))

    def submit(self, *words: str, code: int = 0) -> str:
        """Run `python -m vit_efficient.submit`; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "vit_efficient.submit", *words], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def start(self, run: str, *words: str) -> str:
        """Submit a small digits run on CPUs that leaves an audit file `RUN.txt`. Returns its job number."""
        self.submit(*_small(words), *words, f"run.dir={run}", f"data.audit={run}.txt")
        return self.number(run)

    def start_array(self, study: str, *words: str) -> None:
        """Submit several as an array."""
        self.submit(*_small(words), *words, f"run.dir={study}")

    def number(self, run: str) -> str:
        """The job of a run."""
        return str(json.loads((self.folder / run / "slurm" / "job.json").read_text())["number"])

    def log(self, run: str) -> str:
        """What a run's job has printed."""
        log = Path(json.loads((self.folder / run / "slurm" / "job.json").read_text())["log"])
        return log.read_text(errors="replace") if log.is_file() else ""

    def metrics(self, run: str) -> dict[str, Any]:
        """Of a finished run."""
        return dict(json.loads((self.folder / run / "metrics.json").read_text()))

    def audit(self, run: str) -> list[tuple[int, int, int, str]]:
        """(epoch, step, rank, key) of every sample that a run has trained on so far."""
        file = self.folder / f"{run}.txt"
        text = file.read_text() if file.is_file() else ""
        rows = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written
        return [(int(epoch), int(step), int(rank), key) for epoch, step, rank, key in rows]

    def steps(self, run: str) -> int:
        """How many optimizer steps a run has done, each counted once."""
        return len({row[:2] for row in self.audit(run)})

    def wait_for_steps(self, run: str, steps: int) -> None:
        """Wait until a run has done that many."""
        self._wait(run, f"{steps} steps of {run}", lambda: self.steps(run) >= steps)

    def wait_for_end(self, *runs: str) -> None:
        """Wait until runs and their jobs are finished; these need not wait the two minutes after a requeue."""
        for run in runs:
            self._wait(run, f"the end of {run}", lambda run=run: self._completed(run), nudge=True)
            assert (self.folder / run / "metrics.json").is_file()

    def wait_for_failure(self, run: str) -> None:
        """Wait until a run's job has failed for good."""
        number = self.number(run)
        self.cluster.wait_for(f"job {number} to fail", lambda: self.cluster.nudge(number) == "FAILED")

    def _completed(self, run: str) -> bool:
        return self.cluster.job(self.number(run))["JobState"] == "COMPLETED"

    def _wait(self, run: str, what: str, happened: Callable[[], bool], *, nudge: bool = False) -> None:
        asked = -math.inf

        def look() -> bool:
            nonlocal asked
            if not nudge:  # asking Slurm may take longer than many small steps: seldom, and what is waited for first
                if happened():
                    return True
                if time.monotonic() - asked < 5:
                    return False
                asked = time.monotonic()
            number = self.number(run)
            state = self.cluster.nudge(number) if nudge else self.cluster.job(number)["JobState"]
            if state in ("FAILED", "TIMEOUT", "CANCELLED") and not happened():
                raise AssertionError(f"job {number} is {state}\n{self.log(run)}")
            return happened()

        try:
            self.cluster.wait_for(what, look, pause=0.2 if nudge else 0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(run)}") from None


def _small(words: tuple[str, ...]) -> list[str]:
    """What makes a run small, except where `words` say otherwise."""
    given = {word.partition("=")[0] for word in words}
    chosen = [word for word in SMALL if word.partition("=")[0] not in given]
    for option, value in (("--recipe", "int8_sdpa"), ("--time", "20m"), ("--gpus-per-node", "0")):
        chosen += [] if option in given else [option, value]
    return chosen


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path, slurm_cache: Path) -> Iterator[Desk]:
    """A fresh folder to submit from; the queue is empty and both nodes are up before and after."""
    yield Desk(cluster, tmp_path, slurm_cache)
    cluster.clear()


@pytest.fixture(scope="session")
def slurm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where digits are prepared, once for all tests."""
    return Path(os.environ.get("VIT_EFFICIENT_CACHE") or tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def straight(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, slurm_cache: Path) -> Desk:
    """A small run `straight` of one process, never interrupted, that others are held against."""
    made = Desk(cluster, tmp_path_factory.mktemp("straight"), slurm_cache)
    made.start("straight")
    made.wait_for_end("straight")
    return made
