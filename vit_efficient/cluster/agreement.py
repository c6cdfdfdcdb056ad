"""What all ranks do after the same step, agreed on between the hosts: no device is waited for.

The flags are numbers in the CPU's memory, and so is the collective operation: a flag on the GPU would have to be read
back, which waits until the GPU has done all that is queued, in every step. The all-reduce of a step goes on in a thread
of gloo's while the next step is prepared, and is read at that one's end. So every rank acts one step later than it
could, all after the same one, and an all-reduce over many nodes (gloo's ring: 2 (n - 1) messages) costs no time as
long as a step takes longer.
"""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

Flags = tuple[int, int]  # the weight of a signal (0: none), and whether rank 0 wants a checkpoint


class Agreement:
    """The largest flags of all ranks, a step later; of a process that is alone, its own at once."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._device = torch.device("cpu")
        self._begun: tuple[torch.Tensor, dist.Work] | None = None
        self._several = False

    def open(self, device: torch.device, timeout: timedelta | None = None) -> None:
        """To be called by all ranks when they have met; a second call changes nothing.

        Args:
            device: of this rank, for the case that gloo cannot connect the hosts: the run goes on, and says so.
            timeout: how long a rank waits for the others; None: gloo's default.
        """
        if self._several or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        self._several = True
        self._group = _between_hosts(device, timeout)
        self._device = torch.device("cpu") if self._group is not None else device

    def begin(self, flags: Flags) -> None:
        """Tell the others, without waiting for them. To be called by all ranks, after `outcome`."""
        if not self._several:
            return
        assert self._begun is None, "outcome() comes first"
        largest = torch.tensor(flags, device=self._device)
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        self._begun = largest, work

    def outcome(self, flags: Flags) -> Flags:
        """The largest flags that the ranks began with last; none before the first time.

        Args:
            flags: this rank's own, as they are now: the answer where it is alone.
        """
        if not self._several:
            return flags
        if self._begun is None:
            return 0, 0
        (largest, work), self._begun = self._begun, None
        work.wait()
        weight, due = largest.tolist()
        return int(weight), int(due)

    def at_once(self, flags: Flags) -> Flags:
        """The largest flags of all ranks by now, whatever they began with before; waits for the others."""
        self.outcome(flags)
        self.begin(flags)
        return self.outcome(flags)


def _between_hosts(device: torch.device, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """A gloo group of all ranks that nothing else uses; None, with a warning, if any rank cannot make it."""
    problem, group = "", None
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch without gloo, or a host that does not know its own address
        problem = str(error).strip().splitlines()[0]
    sound = torch.tensor([int(not problem)], device=device)
    dist.all_reduce(sound, op=dist.ReduceOp.MIN)
    if sound.item():
        assert isinstance(group, dist.ProcessGroup), "every process is in it"
        return group
    warnings.warn(
        f"gloo cannot connect the hosts ({problem or 'another rank says why'}), so the ranks agree through their "
        "devices, and every step waits for them. Set GLOO_SOCKET_IFNAME to the network interface between the nodes.",
        stacklevel=3,
    )
    return None
