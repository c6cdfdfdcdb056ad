"""Which of PyTorch's attention kernels is fastest here: measured once for each kind of call, and kept on disk.

PyTorch orders its kernels by rules and takes the first that can; on an H200 that was never the fastest one
(FlashAttention-2, where cuDNN took 0.62 to 0.73 times as long at every size measured). So on a CUDA device each kernel
that can do a call is timed on noise of that call's shape, forward or forward and backward, and the fastest is taken
from then on, by every process that shares the cache: one measures, the others wait for its file and read. So the ranks
of a run on one machine, and runs after it, choose alike.

The key holds the GPU, the versions of torch and cuDNN, and what a kernel can depend on; self-attention is measured on
views of one projection. Batches are rounded up to a power of two, so that a last, short batch is not another kind of
call.

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.errors import CapabilityError
from vit_efficient.machine import cache_dir

KERNELS: dict[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FUSED = ("flash", "cudnn", "efficient")
FOLDER = "attention-v3"
LARGEST_BATCH = 64  # beyond it every kernel fills the GPU
WARM_UP, RUNS = 3, 10
AHEAD = 2_000_000  # clock ticks, about a millisecond

logger = logging.getLogger("vit_efficient")


@dataclass(frozen=True)
class Call:
    """What the choice of a kernel depends on.

    Args:
        batch: B.
        heads: H.
        queries: N.
        keys: M.
        width: E.
        value_width: F.
        dtype: of q, k and v, ``bfloat16`` for example.
        mask: dtype of the bias or mask, or an empty string.
        dropout: whether attention weights are dropped.
        training: whether gradients are wanted.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    dtype: str
    mask: str = ""
    dropout: bool = False
    training: bool = False

    @property
    def kind(self) -> Call:
        """The call that stands for all of its kind: its batch a power of two, and no more than fills a GPU."""
        return replace(self, batch=min(LARGEST_BATCH, 1 << max(0, self.batch - 1).bit_length()))

    def __str__(self) -> str:
        extras = [name for name in ("dropout", "training") if getattr(self, name)]
        extras += [f"{self.mask} mask"] if self.mask else []
        shape = f"B={self.batch} H={self.heads} N={self.queries} M={self.keys} E={self.width} F={self.value_width}"
        return " ".join([shape, self.dtype, *extras])


Times = dict[str, float]
Measure = Callable[[Call, torch.device], Times]

_known: dict[tuple[str, Call], str] = {}


def choices() -> dict[str, str]:
    """What this process has chosen so far: the kernel by call, for records."""
    return {f"{gpu}: {call}": kernel for (gpu, call), kernel in _known.items()}


def choose(call: Call, device: torch.device) -> str:
    """The kernel for a call on a CUDA device: ``flash``, ``cudnn``, ``efficient``, or ``math`` where none of them can.

    Measures at most once for each kind of call, machine and set of versions.

    Raises:
        CapabilityError: it has to be measured, and a CUDA graph is being captured.
    """
    if (_gpu(device), call.kind) not in _known and torch.cuda.is_current_stream_capturing():
        raise CapabilityError(
            f"`attention.kernel=auto` cannot be measured while a CUDA graph is captured ({call}). Run the model once "
            "before, as measure.cuda_graph does, or take attention.kernel=cudnn."
        )
    return chosen(call, device, _gpu(device), measure)


def chosen(call: Call, device: torch.device, gpu: str, measure: Measure, folder: Path | None = None) -> str:
    """`choose`, its parts given.

    Args:
        call: any; what is looked up is its kind.
        device: where to measure.
        gpu: name and versions, the first part of the key.
        measure: milliseconds of each kernel that can.
        folder: of the cache files.
    """
    kind = call.kind
    if (gpu, kind) in _known:
        return _known[gpu, kind]
    file = (cache_dir() / FOLDER if folder is None else folder) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu)}.json"
    with _only_one(file):  # others wait here, and then read
        recorded = _read(file)
        times = recorded.get(str(kind))
        if times is None:
            times = {name: round(value, 4) for name, value in measure(kind, device).items()}
            _write(file, recorded | {str(kind): times})
            shown = ", ".join(f"{name} {value:.3f} ms" for name, value in sorted(times.items(), key=lambda x: x[1]))
            logger.info("attention %s: measured on %s: %s", kind, gpu, shown or "no fused kernel can; math")
    kernel = min(times, key=times.__getitem__, default="math")
    _known[gpu, kind] = kernel
    logger.info("attention %s: %s", kind, kernel)
    return kernel


@functools.cache
def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} torch {torch.__version__} cudnn {torch.backends.cudnn.version()}"


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    """One process at a time; the lock falls with its process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> dict[str, Times]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not calls and their times")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("attention: %s cannot be read (%s) and is measured anew", file, error)
        return {}
    known = {key: times for key, times in content.items() if isinstance(times, dict) and times.keys() <= set(FUSED)}
    return {key: {name: float(value) for name, value in times.items()} for key, times in known.items()}


def _write(file: Path, content: dict[str, Times]) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".attention-")
    with os.fdopen(handle, "w", encoding="utf-8") as temporary:
        json.dump(content, temporary, indent=1, sort_keys=True)
    os.replace(name, file)


def measure(call: Call, device: torch.device) -> Times:
    """Median milliseconds of each fused kernel that can do a call, on noise, by CUDA events."""
    tensors = operands(call, device)
    found: Times = {}
    for name in FUSED:
        times: list[float] = []
        try:
            with warnings.catch_warnings(), sdpa_kernel(KERNELS[name]):
                warnings.simplefilter("ignore")  # of why the other kernels were not taken
                for run in range(WARM_UP + RUNS):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    torch.cuda._sleep(AHEAD)  # while the host prepares the launches, whose time shall not count
                    start.record(torch.cuda.current_stream(device))
                    _attend(call, *tensors)
                    end.record(torch.cuda.current_stream(device))
                    end.synchronize()
                    if run >= WARM_UP:
                        times.append(start.elapsed_time(end))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # how PyTorch says that a kernel cannot do this call
            continue
        found[name] = statistics.median(times)
    return found


def operands(call: Call, device: torch.device) -> tuple[Tensor, ...]:
    """q, k and v, noise, and the mask if there is one.

    Self-attention gets them as models have them: views (B, H, N, E) of one projection (B, N, 3, H, E), since kernels
    differ in how well they read with strides. Other calls get one projection (B, N, H, E) for each.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, call.dtype)

    def noise(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device).to(dtype)
        return made.requires_grad_(call.training)

    with torch.inference_mode(False), torch.enable_grad():
        if (call.queries, call.width) == (call.keys, call.value_width):
            packed = noise(call.batch, call.queries, 3, call.heads, call.width)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shapes = ((call.queries, call.width), (call.keys, call.width), (call.keys, call.value_width))
            q, k, v = (noise(call.batch, n, call.heads, e).transpose(1, 2) for n, e in shapes)
        if not call.mask:
            return q, k, v
        mask = torch.ones((call.queries, call.keys), dtype=getattr(torch, call.mask), device=device)
        return q, k, v, mask


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(call.training),
        torch.autocast(q.device.type, enabled=False),
    ):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1 if call.dropout else 0.0)
        if call.training:
            torch.autograd.grad(y, (q, k, v), y)


@torch.compiler.assume_constant_result
def choose_constant(index: int, *fields: int | str | bool) -> str:
    """`choose` while a compiler traces: it runs then, and its result is a constant of the program."""
    return choose(Call(*fields), torch.device("cuda", index))  # type: ignore[arg-type]
