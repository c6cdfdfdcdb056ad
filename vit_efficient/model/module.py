"""The LightningModule: one training step, one evaluation step, and what a checkpoint holds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.data.counter import Domain, hash_int
from vit_efficient.model.distill import Teacher
from vit_efficient.model.ema import WeightAverage
from vit_efficient.model.metrics import ClassificationMetrics
from vit_efficient.model.optim import build_optimizer, build_schedule, learned_ranges
from vit_efficient.model.origin import Origin, check_same_base
from vit_efficient.parallel.clip import clip_gradients
from vit_efficient.parallel.fsdp import FsdpStrategy
from vit_efficient.recipe.schema import OptimConfig

Batch = dict[str, Any]


def learning_rate(optim: OptimConfig, quantization: Any) -> float:
    """Peak rate: ``optim.lr``, times ``quantization.lora.lr_scale`` where there are adapters."""
    lora = getattr(quantization, "lora", None)
    return optim.lr * (lora.lr_scale if lora is not None else 1.0)


class ViTModule(L.LightningModule):
    """Trains any image classifier that maps (B, 3, S, S) to (B, C).

    Args:
        model: the network, already quantized and swapped.
        transforms: a module that makes (normalised images, soft targets) of a batch, on the device.
        optim: optimizer, schedule and loss.
        lr: peak learning rate.
        num_classes: C.
        steps_per_epoch: optimizer steps of one epoch, from the manifest.
        seed: with the step, decides dropout and drop path, so that a resumed step repeats them.
        adapters_only: checkpoint the trainable weights alone; the frozen base is rebuilt from its own file.
        base: that file, with `adapters_only`; its hash goes into every checkpoint.
        teacher: what the model is to answer like besides the labels.
        freeze_ranges: share of all steps, at the end, in which learned quantization ranges stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        transforms: nn.Module,
        optim: OptimConfig,
        *,
        lr: float,
        num_classes: int,
        steps_per_epoch: int,
        seed: int = 0,
        adapters_only: bool = False,
        base: Origin | None = None,
        teacher: Teacher | None = None,
        freeze_ranges: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.transforms = transforms
        self.optim = optim
        self.lr = lr
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.adapters_only = adapters_only
        self.base = base
        steps = optim.epochs * steps_per_epoch
        self.ranges_move_until = steps - round(freeze_ranges * steps)
        self._step = 0
        self._trained = {name for name, p in self.named_parameters() if p.requires_grad}
        self.strict_loading = not adapters_only
        self.metrics = ClassificationMetrics(num_classes)
        self.average: WeightAverage | None = None
        self.averaged_weights = ExitStack()
        self.teacher = teacher
        self.last_loss: Tensor | None = None
        self.last_parts: dict[str, Tensor] = {}

    # -- sharding ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Spread the model over the devices, where the strategy does that. Lightning calls it once processes meet."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FsdpStrategy):
            strategy.shard(self.model, list(self.model.blocks))  # type: ignore[arg-type]

    # -- training ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        if self.optim.ema is not None:
            self.average = WeightAverage(self.model, self.optim.ema)
        scaled = str(self.trainer.precision).startswith("16")
        optimizer = build_optimizer(self.model, self.optim, self.lr, scaled=scaled)
        schedule = build_schedule(optimizer, self.optim, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients, unscaled by now.

        Lightning's own refuses a fused optimizer under any mixed precision; only fp16 needs that care (`scaled`).
        """
        if gradient_clip_val:
            clip_gradients((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, S, S)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the optimizer sees the mean over the whole global batch.

        Lightning divides by the number of accumulated micro-batches and data parallelism by the number of ranks;
        pieces of a global batch may differ in size by one image (and an epoch's last batch is short), so the sum over
        this piece is divided by the true size of the global batch instead.
        """
        _seed(hash_int(Domain.DROPOUT, self.seed, batch["step"], batch["micro"]))
        self._step = batch["step"]
        images, targets = self.transforms(batch)
        logits = self.model(images)

        def mean(losses_B: Tensor) -> Tensor:
            share = (losses_B * batch["weight"]).sum() / batch["count"]
            return share * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

        losses_B = F.cross_entropy(logits.float(), targets, reduction="none")
        if self.teacher is not None:
            soft_B = self.teacher.losses(logits, images)
            self.last_parts = {"hard": mean(losses_B.detach()), "soft": mean(soft_B.detach())}
            losses_B = self.teacher.blend(losses_B, soft_B)
        loss = mean(losses_B)
        self.last_loss = loss.detach()
        return loss

    def on_after_backward(self) -> None:
        """Drop the gradients of frozen ranges: the optimizer leaves a parameter without gradient as it is.

        They stay parameters, so that optimizer, average and checkpoints keep their form, and which step it is decides
        alone: a resumed run does the same.
        """
        if self._step >= self.ranges_move_until:
            for parameter in learned_ranges(self.model).values():
                parameter.grad = None

    def update_average(self) -> None:
        """To be called after every optimizer step."""
        if self.average is not None:
            self.average.update()

    def keep_average(self) -> None:
        """Put the averaged weights, if there are any, in the place of the trained ones, for good."""
        if self.average is not None and self.average.steps:
            self.average.copy_to_model()

    # -- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        if self.average is not None and self.average.steps:
            self.averaged_weights.enter_context(self.average.applied())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, _ = self.transforms(batch)
        self.metrics.update(self.model(images), batch["label"], batch["weight"])

    def on_validation_epoch_end(self) -> None:
        self.averaged_weights.close()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def is_saved(self, name: str) -> bool:
        """Whether a checkpoint holds this parameter or buffer. Asked before anything sharded is gathered."""
        return not self.adapters_only or name in self._trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adapters_only:
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if self.is_saved(k)}
            checkpoint["base"] = self.base.state() if self.base is not None else None
        if self.average is not None:
            average, strategy = self.average.state_dict(), self.trainer.strategy
            checkpoint["average"] = strategy.assembled(average) if isinstance(strategy, FsdpStrategy) else average
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._average_state = checkpoint.get("average")
        if self.average is not None:  # sharded models are restored after the optimizer is made
            self._load_average()
        if self.adapters_only:
            check_same_base(checkpoint.get("base"), self.base, "The checkpoint")
        if self.teacher is not None:
            self.teacher.check_same(checkpoint.get("teacher"))

    def on_fit_start(self) -> None:
        if self.average is not None and not self.average.steps:
            self.average.restart()
        self._load_average()  # here the optimizer, and with it the average, exists

    def _load_average(self) -> None:
        state = getattr(self, "_average_state", None)
        if self.average is not None and state is not None:
            self.average.load_state_dict(state)
        self._average_state = None


def _seed(seed: int) -> None:
    """As `torch.manual_seed`, which also queues a seeding, with the stack, for each kind of device that is absent."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
