"""A real two-node Slurm cluster on this machine, and digits runs small enough for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SMALL = (
    "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}", "data.batch_size=128",
    "optim.epochs=3", "optim.warmup_epochs=1", "optim.ema=0.9", "data.workers=1",
)  # fmt: skip
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
PATIENCE = 240.0  # seconds; the machine may be busy with other things

# Everything on the loopback interface, without munge and cgroups; a node that does not answer is down after 10 s.
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
SlurmdTimeout=10
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory={memory} Gres=gpu:h200:2 State=UNKNOWN"
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
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port, memory=1000) for name, port in zip(NODES, ports, strict=True)
        )
        (folder / "state").mkdir()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            SLURM_CONF.format(host=host, controller=controller, daemon=daemon, folder=folder, nodes=nodes)
        )
        (folder / "gres.conf").write_text(GRES_CONF)
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        self.run("slurmctld", "-c", "-f", str(self.conf))
        for name in NODES:
            self.start_node(name)
        self.wait_for("both nodes", lambda: all(self.node_state(name) == "IDLE" for name in NODES), 60)

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """What a power cut does: the daemon and everything that it started are gone at once."""
        pid = self.daemon_pid(name)
        assert pid is not None
        victims = [pid, *self._steps(name)]
        for parent in victims:
            victims += [child for child in _children(parent) if child not in victims]
        for victim in victims:
            _kill(victim)

    def _steps(self, name: str) -> list[int]:
        """The step daemons of a node: they are no children of its slurmd, but name its spool or are its sessions."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                text = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (process / "environ").read_bytes()
                if text.startswith("slurmstepd") and f"SLURM_CONF={self.conf}".encode() in environment:
                    found.append(int(process.name))
        return found

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

    def wait_for(self, what: str, happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return
            time.sleep(0.2)
        raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{self.run('squeue', check=False)}")


def _alive(pid: int | None) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
