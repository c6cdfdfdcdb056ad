"""What every attention backend has: a config that builds it and says where it can run, and the one method `attend`.

Shapes: B batch, H heads, N tokens, E head width. Query and key may differ in N; value may differ in E.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from vit_efficient.config import Config
from vit_efficient.machine import Gpu, Machine

Device = Literal["cuda", "cpu"]


class AttentionBackend(ABC):
    """Computes ``softmax(scale q kᵀ + bias) v`` for every head."""

    name: ClassVar[str]
    takes_bias: ClassVar[bool]

    @abstractmethod
    def attend(
        self,
        q_BHNE: Tensor,
        k_BHNE: Tensor,
        v_BHNE: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attend.

        Args:
            q_BHNE: queries; strided views are welcome.
            k_BHNE: keys.
            v_BHNE: values, of the same dtype as q and k.
            bias: added to the scaled logits; broadcasts to (B, H, N, N).
            mask: True where a query may look at a key; broadcasts likewise.
            scale: factor on the logits.
            dropout: probability of dropping an attention weight. The caller passes 0 in evaluation.

        Returns:
            (B, H, N, E), usually a view of (B, N, H, E) memory.

        Raises:
            CapabilityError: this backend cannot do what was asked; it never does something else instead.
        """


class AttentionBackendConfig(Config, ABC):
    """The `attention` section of a recipe."""

    @abstractmethod
    def build(self) -> AttentionBackend:
        """Make the backend. Never fails for want of a GPU or a package, so that a recipe can be looked at anywhere."""

    @abstractmethod
    def refusal(
        self, machine: Machine, precision: str, head_width: int | None = None, device: Device = "cuda"
    ) -> str | None:
        """Why this backend cannot run there (what was asked, why not, what to use), or None if it can.

        Args:
            machine: the machine that shall run it.
            precision: ``fp32``, ``bf16`` or ``fp16``.
            head_width: E, if known.
            device: where the model will be.
        """


def oldest(machine: Machine) -> Gpu | None:
    """The GPU with the lowest compute capability: the one that decides what all of them can run."""
    return min(machine.gpus, key=lambda gpu: gpu.capability, default=None)


def describe(gpu: Gpu) -> str:
    """For example ``Tesla T4 (sm_75)``."""
    return f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})"
