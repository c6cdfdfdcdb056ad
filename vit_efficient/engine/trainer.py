"""Recipe -> Lightning Trainer: devices, strategy, precision, and nothing of Lightning's own housekeeping."""

from __future__ import annotations

import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from vit_efficient.cluster.environment import cluster_environment
from vit_efficient.cluster.preempt import STOP_SIGNALS
from vit_efficient.engine.background import Writer
from vit_efficient.engine.board import Board
from vit_efficient.engine.checkpoint import AtomicCheckpointIO
from vit_efficient.machine import detect_launch, sees_one_gpu
from vit_efficient.model.build import compute_dtype
from vit_efficient.parallel import config as parallel
from vit_efficient.parallel.strategies import build_strategy
from vit_efficient.recipe.schema import Recipe

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def devices(recipe: Recipe) -> tuple[int, int]:
    """(devices a node, nodes) of a resolved recipe."""
    return parallel.devices(recipe.strategy)


def world_size(recipe: Recipe) -> int:
    """Processes of a resolved recipe."""
    per_node, nodes = devices(recipe)
    return per_node * nodes


def narrow(recipe: Recipe) -> torch.dtype | None:
    """The dtype in which the blocks of a sharded model are gathered, for half the traffic; None: each in its own.

    Only plain layers: autocast would round their weights to that dtype anyway. What is quantized in each forward, and
    learned ranges, must be what the deployed model is made of; the frozen base of adapters is narrow already.
    """
    return compute_dtype(recipe) if recipe.plain and recipe.quantization.precision != "fp32" else None


def accumulate(recipe: Recipe) -> int:
    """Micro-batches of one optimizer step on each device."""
    micro = recipe.strategy.micro_batch
    assert micro is not None, "resolve() makes the micro-batch concrete"
    return recipe.data.batch_size // (micro * world_size(recipe))


def quiet() -> None:
    """Leave out what Lightning says about choices that this package makes on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Says on CPUs that a kernel of the hub, which is not used, could not be had.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Says of every split in a graph that it is not folded, which would gain nothing.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    # Says that torchao, which peft imports where it is installed, registers something twice.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*The `srun` command is available on your system but is not used.*",
        ".*GPU available but not used.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Found .* module.s. in eval mode at the start of training.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The given buffer is not writable.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", text)


def build_trainer(
    recipe: Recipe, *, run_dir: Path | None, callbacks: list[Any], writer: Writer | None = None
) -> L.Trainer:
    """A Trainer for a resolved recipe.

    Args:
        recipe: its hardware section, precision, clipping and epochs are what matters here.
        run_dir: where TensorBoard's events go; None: nothing is logged.
        callbacks: all that is to happen around the steps; Lightning's own checkpoints and progress bar are off.
        writer: writes checkpoints; None: at once.
    """
    per_node, nodes = devices(recipe)
    logger = Board(run_dir) if run_dir is not None else False
    launch = detect_launch()
    bound = recipe.strategy.accelerator == "gpu" and sees_one_gpu(launch)
    environment = cluster_environment(launch, bound=bound)
    trainer = L.Trainer(
        accelerator=recipe.strategy.accelerator,
        devices=1 if bound else per_node,
        num_nodes=nodes,
        strategy=build_strategy(recipe.strategy, sharded=recipe.checkpoint.sharded, narrow=narrow(recipe)),
        precision=PRECISION[recipe.quantization.precision],  # type: ignore[arg-type]
        max_epochs=recipe.optim.epochs,
        accumulate_grad_batches=accumulate(recipe),
        gradient_clip_val=recipe.optim.clip,
        deterministic=recipe.run.deterministic,
        logger=logger,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(writer), *([environment] if environment is not None else [])],
        log_every_n_steps=recipe.run.log_every,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
    _leave_signals(trainer)
    return trainer


def _leave_signals(trainer: L.Trainer) -> None:
    """Take from Lightning what it does about SIGTERM, which `cluster.preempt` owns.

    Its handler takes part in a collective operation wherever it interrupts, and before every micro-batch of several
    processes the host waits for all that its GPU has to do, to read whether rank 0 was asked to stop
    (pytorch-lightning issue 21487). No public switch turns either off.
    """
    connector, epochs = trainer._signal_connector, trainer.fit_loop.epoch_loop

    def only_remember() -> None:  # Lightning gives back what it finds here, Ctrl-C's too, which it may have put off
        connector._original_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    # A Lightning that has one of them no more is as it should be; whether it is, tests know.
    for owner, name, instead in (
        (connector, "register_signal_handlers", only_remember),
        (epochs, "_broadcast_sigterm_tensor", lambda: None),
    ):
        if hasattr(owner, name):
            setattr(owner, name, instead)
