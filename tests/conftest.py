"""What all tests share: markers that skip what this machine cannot run, and files that may lie beside the checkout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# How long an example takes says nothing on a machine with other work.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Gives the path of a file in the folder `shared` beside the checkout; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name} in the folder `shared` beside the checkout")
        return path

    return find


Curve = dict[str, dict[int, float]]


def curve(run: Path) -> Curve:
    """Training loss and gradient norm of every logged step of a run, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(f"train/{name}")}
        for name in ("loss", "gradient_norm")
    }


@pytest.fixture(scope="session")
def steps_shown() -> Callable[[Path], list[int]]:
    """Steps of a run whose training loss TensorBoard shows, in order."""
    return lambda run: sorted(curve(run)["loss"])


@pytest.fixture(scope="session")
def assert_same_curve() -> Callable[..., None]:
    """``assert_same_curve(run, other, rel=..., steps=36)``: with ``run.log_every=1``, the same at every step."""

    def check(run: Path, other: Path, *, rel: float, steps: int) -> None:
        ours, theirs = curve(run), curve(other)
        for name, points in theirs.items():
            assert list(points) == list(range(1, steps + 1)) == list(ours[name]), name
            apart = {step: (ours[name][step], value) for step, value in points.items()}
            assert ours[name] == pytest.approx(points, rel=rel), f"{name} by step, of both: {apart}"

    return check
