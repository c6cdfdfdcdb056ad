"""Weight files of every kind that is met: ours, timm's, a stranger's, a broken one."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vit_efficient.errors import CheckpointError
from vit_efficient.model.weights import file_digest, load_state, locate, read_weights

STATE = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor([1.0, 2.0])}


def same(got: dict[str, Tensor]) -> bool:
    return got.keys() == STATE.keys() and all(torch.equal(got[name], STATE[name]) for name in STATE)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(load_state(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
def test_bare_state_dict(tmp_path: Path, suffix: str) -> None:
    torch.save(STATE, tmp_path / f"w{suffix}")
    assert same(load_state(tmp_path / f"w{suffix}"))


def test_legacy_format_of_torch(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(load_state(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"model": STATE, "epoch": 3},
        {"state_dict": STATE, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": {"head.weight": torch.zeros(2, 3)}, "state_dict_ema": STATE},
        {"model": {"head.weight": torch.zeros(2, 3)}, "model_ema": STATE},
        {"state_dict": STATE, "state_dict_ema": None},
        prefixed("module."),
        prefixed("_orig_mod.module."),
        {"model": prefixed("module._orig_mod.")},
        prefixed("model."),
    ],
)
def test_nests_and_wrappers_of_training_programs(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    torch.save(checkpoint, tmp_path / "w.pth")
    assert same(load_state(tmp_path / "w.pth"))


def test_names_inside_a_compiled_block_are_cleaned(tmp_path: Path) -> None:
    torch.save({"blocks.0._orig_mod.norm1.weight": torch.ones(2)}, tmp_path / "w.pth")
    assert list(load_state(tmp_path / "w.pth")) == ["blocks.0.norm1.weight"]


def lightning(**more: Any) -> dict[str, Any]:
    state = {**prefixed("model."), "metrics.correct": torch.zeros(2)}
    return {"pytorch-lightning_version": "2.6.6", "vit_efficient": "0.1.0", "state_dict": state, "epoch": 1, **more}


def test_own_checkpoint(tmp_path: Path) -> None:
    torch.save(lightning(), tmp_path / "step-1.ckpt")
    assert same(load_state(tmp_path / "step-1.ckpt"))


def test_own_checkpoint_gives_the_moving_average_where_there_is_one(tmp_path: Path) -> None:
    average = {"steps": 7, "average": {"head.bias": torch.tensor([5.0, 6.0])}}
    torch.save(lightning(average=average), tmp_path / "step-1.ckpt")
    state = load_state(tmp_path / "step-1.ckpt")
    assert state["head.bias"].tolist() == [5, 6]
    assert torch.equal(state["head.weight"], STATE["head.weight"])  # what is not averaged is frozen


class Trap:
    """Unpickled the ordinary way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("nest", ["top", "beside", "inside"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, nest: str, form: str) -> None:
    trap = Trap(tmp_path / "sprung")
    content = {"top": trap, "beside": {"state_dict": STATE, "extra": trap}, "inside": {**STATE, "x": trap}}[nest]
    path = tmp_path / "stranger.pth"
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")

    with pytest.raises(CheckpointError, match=r"stranger\.pth") as error:
        load_state(path)

    assert not trap.path.exists()
    if form == "zip":
        assert "was refused" in str(error.value)
        assert "open" in str(error.value)
        assert "Nothing in it was run" in str(error.value)
    pickle.loads(path.read_bytes()) if form == "bare" else torch.load(path, weights_only=False)
    assert trap.path.exists()  # it was a live trap


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"w\.\w+ is damaged"):
        load_state(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_garbage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], 3, {"state_dict": {}}, {"model": {"a": 1}}])
def test_file_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_state(tmp_path / "w.pth")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "w.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"known are \.safetensors"):
        load_state(tmp_path / "w.npz")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight file"):
        load_state(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"nowhere.*no such file or folder"):
        locate("nowhere")


def test_a_runs_folder_gives_its_model_or_best_or_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        locate(str(tmp_path))
    for name in ("step-9.ckpt", "step-10.ckpt", "best.ckpt"):
        torch.save(lightning(), checkpoints / name)
    (checkpoints / ".step-11.ckpt.123.tmp").write_bytes(b"half written")
    save_file(STATE, tmp_path / "model.safetensors")
    for expected in (
        "model.safetensors",
        "checkpoints/best.ckpt",
        "checkpoints/step-10.ckpt",
        "checkpoints/step-9.ckpt",
    ):
        assert locate(str(tmp_path)) == tmp_path / expected
        assert same(read_weights(str(tmp_path), "vit_tiny_patch16_224").state)
        (tmp_path / expected).unlink()


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weights(str(path), "any").digest == file_digest(path)
