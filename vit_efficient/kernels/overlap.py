"""Programmatic dependent launch: a kernel starts while the one before it ends, from sm_90 on.

At batch 1 a ViT-L is some two hundred kernels of a few microseconds, and what lies between two of them counts as much.
A kernel launched so waits (`device_functions.wait_for_previous`) before it reads or writes any memory; weights too, as
training makes their codes in the kernel before. Then it lets the next one start. CUDA graphs keep these edges. What
comes before the wait is asking for weights (`device_functions.fetch`): a hint to the cache that all writes of the
kernel before go through too, so it may come too early and is never stale.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def processors(device: torch.device, elsewhere: int) -> int:
    """Multiprocessors of a GPU; `elsewhere` in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else elsewhere


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch of a kernel that has the constant OVERLAP."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
