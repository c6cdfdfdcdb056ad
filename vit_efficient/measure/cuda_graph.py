"""A model as a CUDA graph: every launch of one forward recorded, then replayed by one call.

At batch 1 a ViT spends its time on launches: hundreds of small kernels, a few microseconds of Python and driver each. A
graph replays them without either. Its shapes, addresses and choices are those of the capture, so it serves one batch
size, and what the model holds must stay where it is.

Shapes: B batch, S pixels a side, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.errors import CapabilityError, UserError

WARM_UP = 3  # forwards before the capture: kernels are compiled and chosen, and libraries take their workspaces


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """`torch.cuda.graph`, after which the device is as before also where the capture fails.

    PyTorch then leaves its own stream current, and the device's random generator believing that a capture goes on, so
    that the next random number is an error ("Offset increment outside graph capture").
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    state = generator.get_state()
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
            yield
    except BaseException:
        fresh = torch.Generator(torch.device("cuda", index))
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


class GraphedModel:
    """One forward of a deployed model, captured.

    ``graphed = GraphedModel(model, images)``, then ``graphed(images)`` as with the model, for images of that shape.

    Args:
        model: in evaluation mode, on a CUDA device. Compiled or not.
        images: (B, 3, S, S) on that device, of the shape and dtype that it shall serve; they are the warm-up's input.
        precision: run under autocast in this dtype; None: as the model is.

    Raises:
        CapabilityError: not on a CUDA device, or the model does something that cannot be captured (it waits for the
            device, or chooses by values).
        UserError: the model is in training mode.
    """

    def __init__(self, model: nn.Module, images: Tensor, precision: torch.dtype | None = None) -> None:
        if images.device.type != "cuda":
            raise CapabilityError(
                f"A CUDA graph needs a CUDA device, and the images are on {images.device.type}. Move model and images "
                "to a GPU, or run the model itself."
            )
        if model.training:
            raise UserError("A CUDA graph is captured for inference, and the model is in training mode: model.eval().")
        self.model, self.precision = model, precision
        self.images = images.detach().clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.device(images.device), torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._forward()
            torch.cuda.current_stream(images.device).wait_stream(stream)
            try:
                with capturing(self.graph, images.device):
                    self.outputs = self._forward()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CapabilityError(
                    f"{type(model).__name__} cannot be captured as a CUDA graph: {str(error).splitlines()[0]}. "
                    "Something in it waits for the device or chooses by values; run the model itself."
                ) from error

    def _forward(self) -> Tensor:
        # autocast's cache would keep casts of the warm-up, which the capture must record
        context: Any = (
            nullcontext() if self.precision is None else torch.autocast("cuda", self.precision, cache_enabled=False)
        )
        with context:
            return self.model(self.images)

    def replay(self) -> Tensor:
        """Run on what `images` holds now; (B, C), overwritten by the next run. What a latency is measured of."""
        self.graph.replay()
        return self.outputs

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, C), a tensor of the caller's own.

        Raises:
            UserError: images of another shape than the graph was captured with.
        """
        if images.shape != self.images.shape:
            raise UserError(
                f"This CUDA graph was captured for images {tuple(self.images.shape)}, and these are "
                f"{tuple(images.shape)}. Capture another one for them."
            )
        self.images.copy_(images)
        return self.replay().clone()
