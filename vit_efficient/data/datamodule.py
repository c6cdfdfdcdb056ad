"""The LightningDataModule: thin, with a small state that says exactly where training stands."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning

from vit_efficient.data.cache import ensure_digits
from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.counter import Domain, hash_int
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.loader import Cursor, EvalLoader, TrainLoader, Workers
from vit_efficient.data.manifest import Manifest
from vit_efficient.data.plan import Plan, accumulation
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.resolve import resolve_shards
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.stream import Layout, SampleStream
from vit_efficient.data.transforms import EvalTransform, TrainTransform
from vit_efficient.errors import CheckpointError, DataError, RecipeError

_OPEN_FILES = 256  # each takes two descriptors; 1,024 is the usual limit of a process


class ViTDataModule(lightning.LightningDataModule):
    """Shards to batches, for training and evaluation.

    Manifests are read at once, so that class names and steps are known before there is a model; `set_image` may follow
    later, before the first loader is made. Each batch is described at `SampleStream.micro_batch`.

    Args:
        config: where the shards are, and the global batch.
        augment: training transforms.
        image: what the model expects.
        seed: of order and augmentation.
        micro_batch: images that a rank trains on at once; None: its whole share of the batch.
        eval_batch: images that a rank evaluates at once; None: as many as it trains on at once.
        workers: loader processes; None: `config.workers`, or none.
        evaluate_only: nothing will be trained, so training shards may be absent where `config.eval_shards` is set.
        strict: compare the sizes of all shards with the manifest now, not only when each is opened.

    Raises:
        DataError: shards that are absent, damaged or without manifest.
    """

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        image: ImageSpec | None = None,
        *,
        seed: int = 0,
        micro_batch: int | None = None,
        eval_batch: int | None = None,
        workers: int | None = None,
        evaluate_only: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.augment, self.image, self.seed = config, augment, image, seed
        self.micro_batch, self.eval_batch = micro_batch, eval_batch or config.eval_batch_size
        self.workers = workers if workers is not None else config.workers or 0
        shards = config.shards
        if shards is None and config.eval_shards is None and config.source.name == "digits":
            shards = str(ensure_digits())
        resolved = resolve_shards(shards, config.eval_shards, evaluate_only=evaluate_only, remote=config.remote)
        self._train, self._eval = resolved.train, resolved.eval
        if strict:
            tolerant = config.on_error == "skip"
            self._eval.check(tolerant=tolerant)
            if self._train is not None and not evaluate_only:
                self._train.check(tolerant=tolerant)
        self.cursor = Cursor()
        self._train_loader: TrainLoader | None = None
        self._eval_loader: EvalLoader | None = None
        self._skipped = 0  # by loaders that others have replaced

    @property
    def train_manifest(self) -> Manifest | None:
        """What there is to train on; None where only evaluation was asked for."""
        return self._train.manifest if self._train is not None else None

    @property
    def eval_manifest(self) -> Manifest:
        """What there is to evaluate on."""
        return self._eval.manifest

    @property
    def class_names(self) -> list[str]:
        """By label."""
        return list((self.train_manifest or self.eval_manifest).class_names)

    @property
    def num_classes(self) -> int:
        """Classes of the training shards, or of the evaluation shards where there are no others."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class (evaluation images where there are no others)."""
        return list((self.train_manifest or self.eval_manifest).class_counts)

    @property
    def train_images(self) -> int:
        """Images of one epoch."""
        return self._training_shards().manifest.samples

    @property
    def eval_images(self) -> int:
        """Images of one evaluation, over all ranks."""
        return self.eval_manifest.samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps, the short last one included."""
        return math.ceil(self.train_images / self.config.batch_size)

    @property
    def skipped(self) -> int:
        """How often this rank left a sample out, because it could not be read (`data.on_error: skip`)."""
        loaders = (self._train_loader, self._eval_loader)
        return self._skipped + sum(loader.skipped for loader in loaders if loader is not None)

    @property
    def wait_seconds(self) -> float:
        """Seconds that training has waited for batches."""
        return self._train_loader.wait_seconds if self._train_loader is not None else 0.0

    def set_image(self, image: ImageSpec) -> None:
        """Tell what the model expects of its images."""
        self.image = image

    def micro_batches_per_epoch(self, world: int | None = None) -> int:
        """Batches that `train_dataloader` gives each rank in a full epoch."""
        return self.steps_per_epoch * self.accumulate(world)

    def accumulate(self, world: int | None = None) -> int:
        """Micro-batches of one optimizer step on each of `world` ranks (None: as many as the trainer has).

        Raises:
            RecipeError: batch size, ranks and micro-batch do not divide.
        """
        world = self._ranks()[1] if world is None else world
        try:
            return accumulation(self.config.batch_size, world, self.micro_batch)
        except ValueError as error:
            raise RecipeError(f"data.batch_size: {error}. Change data.batch_size or strategy.micro_batch.") from error

    def train_dataloader(self) -> TrainLoader:
        """Micro-batches of this rank, from the cursor on."""
        shards = self._training_shards()
        rank, world = self._ranks()
        accumulate = self.accumulate(world)
        plan = Plan(_counts(shards), seed=self.seed, streams=self.config.streams)
        reader = ShardReader(shards, self.num_classes, min(self.config.streams + 8, _OPEN_FILES))
        transform = TrainTransform(self._image(), self.augment, self.config.decoder)
        layout = Layout(self.config.batch_size, rank, world, accumulate)
        open_stream = partial(
            SampleStream, reader, plan, transform, layout, seed=self.seed, skip_bad=self.config.on_error == "skip"
        )
        workers = Workers(self.workers, self._pins())
        most = self._most_skipped(self.train_images, world)
        self._skipped += self._train_loader.skipped if self._train_loader is not None else 0
        self._train_loader = TrainLoader(open_stream, self.cursor, self.steps_per_epoch, accumulate, workers, most)
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """Every evaluation sample once over all ranks; equally many batches on each, by fillers of weight 0."""
        rank, world = self._ranks()
        plan = Plan(_counts(self._eval), shuffle=False)
        layout = Layout(self._eval_batch(world) * world, rank, world)
        steps = plan.steps(layout.batch_size)
        transform = EvalTransform(self._image(), self.config.eval_resize, self.config.decoder)
        reader = ShardReader(self._eval, self.num_classes, open_files=4)  # it reads from front to back
        stream = SampleStream(reader, plan, transform, layout, stop=steps, skip_bad=self.config.on_error == "skip")
        most = self._most_skipped(self.eval_images, world)
        self._skipped += self._eval_loader.skipped if self._eval_loader is not None else 0
        self._eval_loader = EvalLoader(stream, steps, Workers(self.workers, self._pins()), most)
        return self._eval_loader

    def calibration_stream(self, image: ImageSpec, samples: int, batch_size: int) -> SampleStream:
        """Training images drawn over all shards, seen as in evaluation; the same ones on every rank and machine.

        Args:
            image: what the model expects.
            samples: how many are wanted: shards are read side by side, so that few images are from many of them.
            batch_size: images of one batch.

        Returns:
            batches of all training images in an order that depends on (manifest, seed, samples) only.

        Raises:
            DataError: there are no training shards.
        """
        counts = _counts(self._training_shards())
        seed = hash_int(Domain.CALIBRATION, self.seed)
        plan = Plan(counts, seed=seed, streams=max(1, min(samples, len(counts))))
        transform = EvalTransform(image, self.config.eval_resize, self.config.decoder)
        reader = ShardReader(self._training_shards(), self.num_classes, min(batch_size + 8, _OPEN_FILES))
        return SampleStream(reader, plan, transform, Layout(batch_size), skip_bad=self.config.on_error == "skip")

    def _most_skipped(self, images: int, world: int) -> int:
        """This rank's share of what may be left out; one at least, unless nothing may."""
        share = self.config.max_skipped
        return max(1, int(share * images / world)) if share else 0

    def mark_step(self, epoch: int, step: int) -> None:
        """Tell that `step` optimizer steps of `epoch` are done; call it after each, before a checkpoint is saved."""
        if step >= self.steps_per_epoch:
            epoch, step = epoch + 1, 0
        self.cursor.epoch, self.cursor.step = epoch, step

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        for loader in (self._train_loader, self._eval_loader):
            if loader is not None:
                loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, and what makes that place mean anything."""
        if self._train is None:
            return {}
        return {"epoch": self.cursor.epoch, "step": self.cursor.step, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go where a checkpoint was.

        Raises:
            CheckpointError: the order of samples would be another one.
        """
        ours = self._identity()
        differing = [
            f"{name}: {state_dict.get(key)} in the checkpoint, {ours[key]} now"
            for key, name in _IDENTITY.items()
            if state_dict.get(key) != ours[key]
        ]
        if differing:
            listed = "\n    ".join(differing)
            raise CheckpointError(
                f"The checkpoint was made with other data:\n    {listed}\n"
                "Set these back to resume exactly, or start a new run from its weights."
            )
        self.cursor.epoch, self.cursor.step = state_dict["epoch"], state_dict["step"]

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._training_shards().manifest.fingerprint,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "streams": self.config.streams,
        }

    def _training_shards(self) -> ShardSet:
        if self._train is None:
            raise DataError("data.shards is not set: there is nothing to train on, only data.eval_shards.")
        return self._train

    def _image(self) -> ImageSpec:
        if self.image is None:
            raise ValueError("set `image` (the backbone's ImageSpec) before loaders are made")
        return self.image

    def _eval_batch(self, world: int) -> int:
        return self.eval_batch or self.micro_batch or max(1, self.config.batch_size // world)

    def _ranks(self) -> tuple[int, int]:
        """Data-parallel rank and world size; (0, 1) without a trainer."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _pins(self) -> bool:
        """Pinned memory serves a GPU only; asking for it elsewhere would initialise CUDA."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


_IDENTITY = {
    "fingerprint": "training shards (data.shards)",
    "seed": "run.seed",
    "batch_size": "data.batch_size",
    "streams": "data.streams",
}


def _counts(shards: ShardSet) -> list[int]:
    return [entry.samples for entry in shards.manifest.shards]
