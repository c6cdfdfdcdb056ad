"""Where a run was, and how Lightning is put back exactly there.

A checkpoint says where it is in a machine-independent way: ``epoch``, ``step`` (optimizer steps done in that epoch) and
``validated``. Lightning's own loop counters count micro-batches of one rank, so they are written anew from that when a
run resumes, perhaps with another micro-batch or another number of ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vit_efficient.errors import CheckpointError
from vit_efficient.recipe.older import as_it_ran, without_effect

# What may differ between a checkpoint and the run that continues it: where and how fast, not what is trained.
FREE = (
    "strategy", "checkpoint", "variant", "protocol", "run.dir", "run.log_every", "run.deterministic", "run.lost_after",
    "run.stalled_after",
    "data.shards", "data.eval_shards", "data.workers", "data.audit", "data.eval_batch_size", "data.on_error",
    "data.max_skipped", "data.remote",
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """Between two optimizer steps of a run.

    Args:
        epoch: epochs completed before the current one.
        step: optimizer steps done in the current epoch, up to and including all of them.
        validated: at the end of an epoch, whether its evaluation is done too.
    """

    epoch: int
    step: int
    validated: bool = False

    def state(self) -> dict[str, Any]:
        return asdict(self)


def _tracker(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def write_loops(loops: dict[str, Any], position: Position, steps_per_epoch: int, accumulate: int, micro: int) -> None:
    """Set the counters in ``checkpoint["loops"]`` so that `Trainer.fit` goes on at ``position``.

    Args:
        loops: as Lightning saved them; changed in place.
        position: where to go on.
        steps_per_epoch: optimizer steps in an epoch.
        accumulate: micro-batches in an optimizer step, now.
        micro: micro-batches of one rank in an epoch, now.
    """
    fit = loops["fit_loop"]
    epoch, step = position.epoch, position.step
    at_end = step >= steps_per_epoch
    done = epoch * steps_per_epoch + step
    if at_end and position.validated:
        # Between two epochs: nothing of the next one has begun.
        fit["epoch_progress"] = {k: _tracker(*[epoch + 1] * 4) for k in ("total", "current")}
        batches = {"total": _tracker(*[(epoch + 1) * micro] * 4), "current": _tracker(0, 0, 0, 0)}
        last, evaluation = False, _tracker(0, 0, 0, 0)
    else:
        # Inside an epoch: it was started and is not processed.
        fit["epoch_progress"] = {k: _tracker(epoch + 1, epoch + 1, epoch, epoch) for k in ("total", "current")}
        count = micro if at_end else step * accumulate
        # Lightning saves before it counts the batch as completed, and adds the missing one when it restarts.
        missing = 0 if at_end or not count else 1
        total = epoch * micro + count
        batches = {
            "total": _tracker(total, total, total, total - missing),
            "current": _tracker(count, count, count, count - missing),
        }
        # One batch begun and not processed is how Lightning knows that an evaluation is to be run again.
        last, evaluation = at_end, _tracker(1, 1, 0, 0) if at_end else _tracker(0, 0, 0, 0)
    fit["epoch_loop.batch_progress"] = {**batches, "is_last_batch": last}
    fit["epoch_loop.val_loop.batch_progress"] = {
        "total": evaluation,
        "current": evaluation,
        "is_last_batch": False,
    }
    in_epoch = 0 if at_end and position.validated else step
    both = {"total": {"ready": done, "completed": done}, "current": {"ready": in_epoch, "completed": in_epoch}}
    fit["epoch_loop.scheduler_progress"] = both
    zero = {k: {**v, "started": v["completed"]} for k, v in both.items()}
    fit["epoch_loop.automatic_optimization.optim_progress"] = {"optimizer": {"step": both, "zero_grad": zero}}
    # Lightning counts a step after it has saved, and adds the missing one when it restarts, but not between epochs.
    counted = done if at_end and position.validated else max(0, done - 1)
    fit["epoch_loop.state_dict"] = {"_batches_that_stepped": counted}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return rows


def differing_keys(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for every key in which two nested mappings differ."""
    before, after = _flatten(saved), _flatten(now)
    return [
        f"{key}: {before.get(key)!r} in the checkpoint, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The lines of `differing_keys` for which two recipes (as plain mappings) would train differently."""
    saved = as_it_ran(saved)
    idle = set(without_effect(saved)) & set(without_effect(now))
    free = tuple(f + end for f in (*FREE, *idle) for end in (":", "."))
    return [row for row in differing_keys(saved, now) if not row.startswith(free)]


def check_same_recipe(saved: dict[str, Any], now: dict[str, Any], path: str) -> None:
    """Refuse to continue a checkpoint under a recipe that would train something else.

    Args:
        saved, now: recipes as plain mappings.
        path: the checkpoint, for the message.

    Raises:
        CheckpointError: naming every key that differs.
    """
    rows = differences(saved, now)
    if rows:
        raise CheckpointError(
            f"The checkpoint {path} belongs to another recipe:\n" + "\n".join(f"    {row}" for row in rows) + "\n"
            "  Resume with the recipe in that run's folder, start afresh without `--resume`, "
            "or take only its weights with `model.weights=`."
        )
