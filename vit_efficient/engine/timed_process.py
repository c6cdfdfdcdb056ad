"""`python -m vit_efficient.engine.timed_process QUESTION.json`: the processes of `benchmark training`.

Lightning starts the further processes of a run by the command of the first one, so a run that is timed is a command of
its own. The question says what to train; each rank writes its answer beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vit_efficient.cli import run_command
from vit_efficient.machine import detect, rank


@dataclass(frozen=True)
class Question:
    """What a run shall do.

    Args:
        source: name or path of a recipe.
        words: overrides.
        steps: optimizer steps that are measured.
        warm_up: optimizer steps before.
        memory: bytes that each process may have of its GPU; None: all.
    """

    source: str
    words: tuple[str, ...]
    steps: int
    warm_up: int
    memory: float | None = None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Question:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**plain, "words": tuple(plain["words"])})


def answer_file(question: Path, rank: int) -> Path:
    """Where a rank writes: what it timed, or why it could not."""
    return question.with_name(f"answer-{rank}.json")


def main() -> None:
    """Answer a question."""
    file = Path(sys.argv[1])
    question = Question.read(file)
    from vit_efficient.measure.trouble import EXPECTED, said

    try:
        answer: dict[str, Any] = _answer(question, file)
    except EXPECTED as error:
        _write(file, {"failed": said(error)})
        raise
    _write(file, answer)


def _answer(question: Question, file: Path) -> dict[str, Any]:
    from vit_efficient.engine.contenders import load_entry
    from vit_efficient.engine.entries import Entry
    from vit_efficient.engine.rundir import RunDir
    from vit_efficient.engine.timed import time_training

    recipe = load_entry(Entry(question.source, question.words), (), detect())
    timed = time_training(
        recipe,
        RunDir(file.with_name("run")),
        steps=question.steps,
        warm_up=question.warm_up,
        memory=question.memory,
        tell=lambda text: print(text, flush=True) if rank() == 0 else None,
    )
    return asdict(timed)


def _write(file: Path, answer: dict[str, Any]) -> None:
    answer_file(file, rank()).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
