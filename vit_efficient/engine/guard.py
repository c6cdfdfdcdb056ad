"""Ends a run in which a process has died, failed or hangs, and says who; without it the others would wait for ever.

A thread in every process asks once a second: has a process that this one started ended, is the one that started it
gone, is any rank silent or has it said that it leaves (`cluster/liveness.py`), is there no progress
(`cluster/watchdog.py`)? If so it prints what happened, writes the stacks of all threads into the run's folder, and ends
the process, whose main thread may well sit in a collective operation that nothing can interrupt. What the run loses is
the work since its last checkpoint.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.environments import LightningEnvironment

from vit_efficient.cli import PEER_LOST, STALLED, USER_ERROR
from vit_efficient.cluster.launched import Children, Parent
from vit_efficient.cluster.liveness import Liveness, Verdict, run_store
from vit_efficient.cluster.watchdog import Watchdog
from vit_efficient.engine.loop import StopRun
from vit_efficient.errors import UserError
from vit_efficient.recipe.schema import Recipe

TICK = 1.0  # seconds between two looks
LINGER = 15.0  # seconds that a process at most waits, so that the others learn why and write their stacks
TOLD_WITHIN = 10.0  # seconds beyond a beat in which an announcement is in the store, if it gets there
LEAVE_WITHIN = 60.0  # seconds that a process which failed has to get out by itself
WAIT_FRACTION = 0.8  # of the collective time-out: so the watchdog speaks before torch gives up
LAUNCHER = "VIT_EFFICIENT_LAUNCHER"  # environment: pid of the rank that started the others of its node
ALONE = 1800.0  # seconds without progress where no collective time-out says how long is too long


def stalled_after(recipe: Recipe) -> float:
    """Seconds without progress after which a resolved recipe's run is taken to hang."""
    if recipe.run.stalled_after != "auto":
        return recipe.run.stalled_after
    timeout = getattr(recipe.strategy, "timeout", None)  # of the strategies that have several processes
    return WAIT_FRACTION * timeout if timeout is not None else ALONE


class Guard(L.Callback):
    """Watches over the processes of a run, from before the first step until they part.

    A context manager around the run, and a callback of every trainer within. It does nothing before `watch`.

    Args:
        recipe: resolved.
        run: the run's folder; stacks go into `stacks` in it.
        rank: of this process.
    """

    def __init__(self, recipe: Recipe, run: Path, rank: int) -> None:
        self._recipe, self._run, self._rank = recipe, run, rank
        self._watchdog = Watchdog(run / "stacks", rank, stalled_after(recipe))
        self._children: Children | None = None
        self._parent: Parent | None = None
        self._liveness: Liveness | None = None
        self._failed: tuple[float, str, int] | None = None
        self._quiet = False
        self._ending = False  # the thread has found a reason, and is about to end the process
        self._met = False  # all processes; how long they may look for each other is torch's time-out
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._leaves_with(error)
        if self._liveness is not None:
            self._liveness.leave()
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._watchdog.close()

    def watch(self, trainer: L.Trainer) -> None:
        """Begin. To be called just before `trainer.fit`, which may start further processes."""
        first = trainer.node_rank * trainer.num_devices  # the rank that starts the others of its node
        self._children = Children(trainer.strategy.launcher, first + 1, PEER_LOST)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0:
            self._parent = Parent(first, int(os.environ[LAUNCHER]), PEER_LOST)
        else:
            os.environ[LAUNCHER] = str(os.getpid())  # for the processes that `fit` is about to start
        self._watchdog.mark("the start")
        self._watchdog.hold_off()
        self._thread.start()

    # -- signs of progress ------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._watchdog.mark(f"set-up ({stage})")
        self._met = True
        if trainer.world_size == 1 or self._liveness is not None:
            return
        limit = self._recipe.run.lost_after
        liveness = Liveness(
            run_store(limit), trainer.global_rank, trainer.world_size, lost_after=limit, lost_code=PEER_LOST
        )
        liveness.register()
        trainer.strategy.barrier("liveness")
        liveness.start()
        self._liveness = liveness

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watchdog.mark("the start of training")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._watchdog.mark(
            f"the end of micro-batch {trainer.fit_loop.total_batch_idx + 1}, step {trainer.global_step}"
        )

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._watchdog.mark(f"batch {batch_idx + 1} of the evaluation after step {trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watchdog.mark(f"the evaluation after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._watchdog.mark(f"the beginning of the checkpoint of step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watchdog.mark("the end of training")

    # -- leaving ----------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leaves_with(exception)  # here: what Lightning tears down next may wait for the others for ever

    def _leaves_with(self, error: BaseException) -> None:
        if self._failed is not None or self._quiet:
            return
        if isinstance(error, StopRun) or not isinstance(error, Exception):
            self._quiet = True  # all ranks agreed on it, or somebody interrupts the process
            return
        if self._liveness is not None and _broken_connection(error):
            self._liveness.raise_alarm()  # a peer's death: the guard's thread is about to know whose
            time.sleep(self._recipe.run.lost_after + LINGER)
        if self._ending:  # with the reason; this error, raised while it waits for the others, is a consequence
            time.sleep(LEAVE_WITHIN)
        text = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        code = USER_ERROR if isinstance(error, UserError) else 1
        self._failed = (time.monotonic(), text, code)
        if self._liveness is not None:
            self._liveness.announce(Verdict(f"{self._liveness.own_name} failed. {text}", code))
            self._told()
            time.sleep(2 * self._liveness.beat)  # read by the others before this process's sockets close

    def _told(self) -> bool:
        """Wait for what this process has announced to be in the store, where the others find it; False if it is not."""
        assert self._liveness is not None
        return self._liveness.told(self._liveness.beat + TOLD_WITHIN)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        ready = time.monotonic() + self._watchdog.limit / 10
        while not self._end.wait(TICK):
            if time.monotonic() >= ready:
                self._watchdog.hold_off()
                ready = time.monotonic() + self._watchdog.limit / 10
            if self._quiet:
                continue
            if self._failed is not None:
                since, text, code = self._failed
                if time.monotonic() - since > LEAVE_WITHIN:
                    self._exit(text, code)
                continue
            if (verdict := self._verdict()) is not None:
                self._finish(verdict)

    def _verdict(self) -> Verdict | None:
        """What the store says is best: the reason. Otherwise how a child or parent ended, or that nothing happens."""
        found = self._liveness.verdict() if self._liveness is not None else None
        relative = self._children.verdict() if self._children is not None else None
        if relative is None and self._parent is not None:
            relative = self._parent.verdict()
        if found is None and relative is not None and self._liveness is not None:
            time.sleep(2 * self._liveness.beat)  # it may have left a message there before it ended
            found = self._liveness.verdict()
        if found is not None or relative is not None:
            return found or relative
        seconds = self._watchdog.stalled()
        if seconds is not None and self._met:
            who = self._liveness.own_name if self._liveness is not None else f"The process (pid {os.getpid()})"
            text = f"{who} made no progress for {seconds:.0f} s; the last was {self._watchdog.last}."
            return Verdict(text, STALLED)
        return None

    def _finish(self, verdict: Verdict) -> None:
        text, self._ending = verdict.text, True
        if self._liveness is not None:
            self._liveness.announce(verdict)
        if verdict.code in (PEER_LOST, STALLED):
            try:
                self._watchdog.dump(text)
                text += f"\n  Where the threads of every rank stood: {self._watchdog.path.parent}"
            except OSError as error:
                text += f"\n  (Where its threads stood cannot be written: {error})"
        text += (
            "\n  The run was ended. What is lost is the work since its last checkpoint; go on with:\n"
            f"    {shlex.join(['python', '-m', 'vit_efficient.fit', '--resume', str(self._run)])}"
        )
        _say(f"error: {text}\n" if self._rank == 0 else f"[rank {self._rank}] error: {text}\n")
        # Rank 0 usually holds the store, and a launcher may kill the others as soon as one process has ended.
        if self._liveness is not None and self._told():
            time.sleep(min(LINGER, 2 * self._liveness.beat + TICK))
        self._exit("", verdict.code)

    def _exit(self, text: str, code: int) -> None:
        if text:
            _say(f"error: {text}\n")
        for stream in (sys.stdout, sys.stderr):  # its lock may be held by a thread that hangs: do not wait long
            flush = threading.Thread(target=stream.flush, daemon=True)
            flush.start()
            flush.join(1.0)
        os._exit(code)


def _say(text: str) -> None:
    os.write(2, f"\n{text}".encode())


def _broken_connection(error: BaseException) -> bool:
    """Whether an error of a collective operation may come from another process's death."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
