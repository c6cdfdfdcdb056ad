"""Runs `fit` with a fault that cannot be had from outside: `python inject.py FAULT[:...] --recipe ...`.

    hang:RANK:STEP       the rank waits for ever at the beginning of the step
    held:RANK:STEP       so it does, in C code that keeps the interpreter's lock
    nan:RANK:STEP        its loss of that step is not a number
    weights:RANK:STEP    its weights are not finite after that step, and the loss before it is
    error:RANK:STEP      it raises a DataError
    crash:WRITE          the process kills itself with SIGKILL in the middle of that checkpoint's bytes
    term:evaluation      it gets SIGTERM in the evaluation of the finished model
    term:setup           and while the model is built
    term:dropped         and then, where Python drops what a handler raises
    term:end             and when the last step is done
    clock:SECONDS        the wall clock goes wrong by so much at every step
    stop:STEP            all processes stop themselves once that many steps are in the audit file, and wait for a signal
    kill:STEP            they get SIGKILL at any time within 0.1 s after that, before the next step is saved
    broadcasts           after every step: how many `torch.distributed.broadcast` there were goes to `broadcasts.txt`
    waits:FROM:TO        from one step to another, making the host wait for its GPU is an error; each process that
                         came so far says so in `waits.txt`
    random               the state of the generators after every step goes to `random.txt`

Several faults are joined with `+`. Steps count optimizer steps from 0, except those that are done. Lightning starts the
other ranks with the same words.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from vit_efficient.errors import DataError

HALF = 100_000  # bytes of a checkpoint of 1 MB


def in_step(rank: int, step: int, act: Callable[[Any, Any], Any]) -> None:
    """Let ``act(module, loss)`` give the loss of one step of a rank."""
    from vit_efficient.model.module import ViTModule

    whole = ViTModule.training_step

    def training_step(self: ViTModule, batch: Any, number: int) -> Any:
        loss = whole(self, batch, number)
        if self.global_rank == rank and batch["step"] == step:
            return act(self, loss)
        return loss

    ViTModule.training_step = training_step  # type: ignore[method-assign]


def lose_number(module: Any, loss: Any) -> Any:
    module.last_loss = loss.detach() * float("nan")
    return loss * float("nan")


def lose_weights(module: Any, loss: Any) -> Any:
    module.model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def fail(module: Any, loss: Any) -> Any:
    raise DataError("shard 3 cannot be read.")


def crash_in_write(count: int) -> None:
    from vit_efficient.engine import checkpoint

    class Disk:
        def __init__(self, path: Any) -> None:
            self.file, self.written = open(path, "wb"), 0  # noqa: SIM115 - it ends with the process

        def write(self, data: Any) -> int:
            self.written += self.file.write(data)
            if self.written > HALF:
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return len(data)

        def flush(self) -> None:
            self.file.flush()

    whole, calls = torch.save, [0]

    def save(value: Any, path: Any) -> None:
        calls[0] += 1
        whole(value, Disk(path) if calls[0] == count else path)

    checkpoint.torch.save = save


def terminate_at(place: str) -> None:
    from vit_efficient.engine import train
    from vit_efficient.engine.loop import RunLoop

    owner, name = {
        "evaluation": (train, "evaluate_model"),
        "setup": (train, "build_model"),
        "dropped": (train, "build_model"),
        "end": (RunLoop, "on_train_end"),
    }[place]
    whole = getattr(owner, name)

    def terminate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def act(*words: Any, **named: Any) -> Any:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            if place == "dropped":
                thing = threading.Event()
                alive = weakref.ref(thing, terminate)  # called when it goes, as import's own are at every import
                del thing
                assert alive() is None
            else:
                terminate()
        return whole(*words, **named)

    setattr(owner, name, act)


def count_broadcasts() -> None:
    import torch.distributed as dist

    whole, count = dist.broadcast, [0]

    def broadcast(*words: Any, **named: Any) -> Any:
        count[0] += 1
        return whole(*words, **named)

    def note() -> None:
        with open("broadcasts.txt", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {count[0]}\n")

    dist.broadcast = broadcast
    in_any_step(note)


def forbid_waits(first: int, last: int) -> None:
    def act() -> None:
        if current[0] == first:
            torch.cuda.set_sync_debug_mode("error")
        elif current[0] == last:
            forbidden = torch.cuda.get_sync_debug_mode() == 2
            torch.cuda.set_sync_debug_mode("default")
            with open("waits.txt", "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {forbidden}\n")

    current = [0]
    in_any_step(act, current)


def wrong_clock(seconds: float) -> None:
    true, steps = time.time, [0]
    in_any_step(lambda: steps.__setitem__(0, steps[0] + 1))
    time.time = lambda: true() + seconds * steps[0]


def note_random() -> None:
    def act() -> None:
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        with open("random.txt", "a", encoding="utf-8") as file:
            file.write(f"{current[0]} {state}\n")

    current = [0]
    in_any_step(act, current)


def in_any_step(act: Callable[[], None], current: list[int] | None = None) -> None:
    from vit_efficient.model.module import ViTModule

    whole = ViTModule.training_step

    def training_step(self: ViTModule, batch: Any, number: int) -> Any:
        loss = whole(self, batch, number)
        if current is not None:
            current[0] = batch["step"]
        act()
        return loss

    ViTModule.training_step = training_step  # type: ignore[method-assign]


def after_step(done: int, *acts: Callable[[], object]) -> None:
    """Do one thing after another in rank 0: when ``done`` steps are in the audit file, and at each step from there."""
    from vit_efficient.engine.audit import Audit

    whole, left = Audit.on_train_batch_end, list(acts)

    def on_train_batch_end(self: Audit, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        whole(self, trainer, module, outputs, batch, number)
        written = (number + 1) % self.accumulate == 0
        if written and left and trainer.global_rank == 0 and batch["step"] + 1 >= done:
            left.pop(0)()

    Audit.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def stop_all() -> None:
    os.killpg(os.getpgrp(), signal.SIGSTOP)


def kill_all_soon() -> None:
    threading.Timer(random.SystemRandom().uniform(0, 0.1), os.killpg, (os.getpgrp(), signal.SIGKILL)).start()


def hang(module: Any, loss: Any) -> Any:
    threading.Event().wait()


def hold(module: Any, loss: Any) -> Any:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL, unlike CDLL, does not give the lock away


def inject(fault: str) -> None:
    name, *where = fault.split(":")
    acts = {"hang": hang, "held": hold, "nan": lose_number, "weights": lose_weights, "error": fail}
    if name in acts:
        in_step(int(where[0]), int(where[1]), acts[name])
    elif name == "crash":
        crash_in_write(int(where[0]))
    elif name == "term":
        terminate_at(where[0])
    elif name == "clock":
        wrong_clock(float(where[0]))
    elif name == "broadcasts":
        count_broadcasts()
    elif name == "waits":
        forbid_waits(int(where[0]), int(where[1]))
    elif name == "random":
        note_random()
    elif name == "stop":
        after_step(int(where[0]), stop_all)
    elif name == "kill":
        after_step(int(where[0]), kill_all_soon, threading.Event().wait)
    else:
        raise SystemExit(f"no fault {fault}")


if __name__ == "__main__":
    for one in sys.argv[1].split("+"):
        inject(one)
    from vit_efficient import cli, fit

    cli.run_command(lambda: fit.main(sys.argv[2:]))
