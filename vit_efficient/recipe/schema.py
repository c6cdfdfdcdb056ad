"""The Recipe: everything that decides what a run does, in one typed, immutable object.

`variant` (attention, quantization) is what a study compares, `protocol` (model, data, augment, optim) what it holds
equal, `hardware` (strategy) what depends on the machine; `checkpoint` and `run` are housekeeping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from vit_efficient.attention.config import AttentionConfig
from vit_efficient.config import Config
from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.parallel.config import AutoConfig, StrategyConfig
from vit_efficient.quantization.config import QuantizationConfig

VARIANT_SECTIONS = ("attention", "quantization")
PROTOCOL_SECTIONS = ("model", "data", "augment", "optim")
HARDWARE_SECTIONS = ("strategy",)
HOUSE_SECTIONS = ("checkpoint", "run")


class ModelConfig(Config):
    name: str = Field(description="A timm model of the ViT family, for example `vit_large_patch16_224`.")
    weights: str | None = Field(
        None,
        description="A local `.safetensors` or `.pth` file, `timm` or `timm:TAG` for pretrained weights of the hub, "
        "or nothing: random initial weights.",
    )
    image_size: PositiveInt | None = Field(None, description="Pixels a side. Unset: the model's own.")
    num_classes: PositiveInt | None = Field(None, description="Unset: as many as the data has.")
    storage: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What linear weights are held in on the CPU until they are quantized. `bfloat16` makes models that "
        "do not fit the host's memory otherwise; for a frozen base, as it rounds.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to `timm.create_model`.")
    stochastic_depth: Literal["subset", "mask"] = Field(
        "subset",
        description="What becomes of the samples that leave out a branch in training, where `model.kwargs` has a "
        "`drop_path_rate`: the branch is not computed for them (`subset`, as DINOv2 does), which saves time and memory "
        "by about the mean rate; or it is computed and multiplied by 0 (`mask`, as timm does). Rates are the same.",
    )
    pad_tokens: Literal[0, 8, 16, 32] = Field(
        0,
        description="Fill sequences up to a multiple of so many tokens inside the blocks (197 become 200, 208, 224); "
        "attention does not see the padding, and outputs stay the same. 0: not. Models that are trained with register "
        "tokens have them by `model.kwargs` (`reg_tokens`).",
    )


class OptimConfig(Config):
    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="`adamw8bit` keeps its states in 8 bits (bitsandbytes)."
    )
    lr: PositiveFloat = Field(description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate that the cosine ends at.")
    weight_decay: float = Field(0.05, ge=0, description="Not applied to norms, biases and position embeddings.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging factors.")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Learning-rate factor from each block to the one before it."
    )
    epochs: PositiveInt = Field(description="Passes over the training set.")
    warmup_epochs: float = Field(0.0, ge=0, description="Linear warm-up; counted in steps, from the manifest.")
    clip: float | None = Field(None, gt=0, description="Largest gradient norm; unset: no clipping.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of the weights' moving average, which is then what is evaluated."
    )

    @field_validator("min_lr")
    @classmethod
    def _below_peak(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr > info.data.get("lr", min_lr):
            raise ValueError(f"is {min_lr:g}, above the peak optim.lr={info.data['lr']:g}")
        return min_lr

    @field_validator("warmup_epochs")
    @classmethod
    def _within_run(cls, warmup: float, info: ValidationInfo) -> float:
        if warmup > info.data.get("epochs", warmup):
            raise ValueError(
                f"is {warmup:g}, longer than the whole run: optim.epochs={info.data['epochs']}. Make it shorter too: "
                "optim.warmup_epochs=0"
            )
        return warmup

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"must be two numbers of at least 0 and below 1, got {list(betas)}")
        return betas


class CheckpointConfig(Config):
    every_steps: PositiveInt | None = Field(
        None, description="Save every so many optimizer steps, besides every epoch's end."
    )
    every_minutes: PositiveFloat | None = Field(
        15.0, description="Save when the last checkpoint is so many minutes old, at the end of a step."
    )
    keep: PositiveInt = Field(
        2,
        description="How many of the newest checkpoints to keep; the best one is kept besides. With 1 there is none to "
        "go back to if the newest is damaged.",
    )
    sharded: bool = Field(
        False,
        description="Write a folder, each process its own part, in place of one file that process 0 gathers; "
        "`strategy=fsdp` only.",
    )
    asynchronous: bool = Field(
        False, description="Copy the state to the CPU's memory, and write it while training goes on."
    )


class RunConfig(Config):
    dir: Path | None = Field(None, description="The run's own folder. Unset: `runs/<recipe>-<protocol>-<time>`.")
    seed: NonNegativeInt = Field(0, description="Decides initial weights, sample order and augmentation.")
    log_every: PositiveInt = Field(10, description="Optimizer steps between two points in TensorBoard.")
    deterministic: bool = Field(False, description="Deterministic GPU algorithms; slower, bit-for-bit repeatable.")
    lost_after: PositiveFloat = Field(
        20.0, description="Seconds of silence after which another process of the run is taken to be dead."
    )
    stalled_after: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="Seconds without a finished micro-batch, evaluated batch or checkpoint after which the run is "
        "taken to hang: it writes down where it stands and ends. `auto`: 1800, or, where processes wait for each "
        "other, four fifths of `strategy.timeout`.",
    )


class Recipe(Config):
    variant: str = Field("", description="Name of the variant file, without folder and suffix; set by the loader.")
    protocol: str = Field("", description="Name of the protocol file, likewise.")
    attention: AttentionConfig
    quantization: QuantizationConfig
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optim: OptimConfig
    strategy: StrategyConfig = Field(default_factory=AutoConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @property
    def plain(self) -> bool:
        """Whether the blocks' linear layers are PyTorch's own: nothing is quantized, and there are no adapters."""
        return self.quantization.name == "none" and self.quantization.lora is None
