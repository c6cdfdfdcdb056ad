"""TensorBoard's files of a run. A disk that is full ends the drawing, and not the training."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

FOLDER = "tensorboard"  # in the run's


class Board(TensorBoardLogger):
    """Lightning's logger, whose first failure to write is said and is its last.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(str(run), name="", version=FOLDER)
        self.broken = False
        _leave_it_to_us()

    def draw(self, what: Callable[[], Any]) -> None:
        """Call `what`, which writes; nothing is called any more after an OSError."""
        if self.broken:
            return
        try:
            what()
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning makes a ValueError of all
            if not isinstance(cause, OSError):
                raise
            self.broken = True
            text = f"TensorBoard's files cannot be written any more ({cause}); the run goes on without them."
            print(f"note: {text}", file=sys.stderr, flush=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        write = super().log_metrics
        self.draw(lambda: write(metrics, step))

    def save(self) -> None:
        self.draw(super().save)

    def finalize(self, status: str) -> None:
        write = super().finalize
        self.draw(lambda: write(status))


def _leave_it_to_us() -> None:
    """The thread that writes prints what it dies of, and tells the next caller, who is `Board.draw`: once is enough."""
    before = threading.excepthook
    if getattr(before, "is_ours", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        writes = type(args.thread).__module__.startswith("tensorboard.")
        if not (writes and isinstance(args.exc_value, OSError)):
            before(args)

    hook.is_ours = True  # type: ignore[attr-defined]
    threading.excepthook = hook
