"""What DeepSpeed's ZeRO has cut up, put together again: optimizer states and parameters, whole and by parameter.

ZeRO steps flat float32 partitions. Which piece of which parameter lies where in them depends on the stage, the number
of processes and the order of the parameters, so nothing of that is written to a file. A state is gathered into the form
that `torch.optim.Optimizer.state_dict` has in a single process, and cut up again from there. What is gathered is moved
as integers and equals what was cut up bit for bit.

Nothing here imports deepspeed: it reads what an engine's optimizer and parameters carry. All processes must call these
functions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Groups = Sequence[Sequence[nn.Parameter]]
# What an optimizer's group says of where it runs, and not of what it does.
_OF_THE_PLACE = ("params", "fused", "foreach", "capturable")


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this process steps: ``flat[offset:][:count]`` is ``parameter[start:][:count]``.

    Args:
        flat: the float32 partition, which the torch optimizer takes for its parameter.
        offset: where the piece begins in it.
        start: where it begins in the flattened parameter.
        count: its elements; 0 where other processes have all of the parameter.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def of_flat(self, tensor: Tensor) -> Tensor:
        """The piece's part of something as long as the partition."""
        return tensor.narrow(0, self.offset, self.count)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The piece's part of something as large as the parameter."""
        return tensor.reshape(-1).narrow(0, self.start, self.count)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO 3 keeps only a part of it here."""
    return getattr(parameter, "ds_tensor", None) is not None


def whole_shape(parameter: Tensor) -> torch.Size:
    """Its shape when whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _piece(zero: Any, group: int, parameter: nn.Parameter) -> Piece:
    if is_partitioned(parameter):
        number, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = min(size * dist.get_rank(), whole_shape(parameter).numel())
        count = min(size, whole_shape(parameter).numel() - start)  # what is beyond it is padding
        return Piece(zero.fp32_partitioned_groups_flat[number], offset, start, count)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    flat = zero.single_partition_of_fp32_groups[group]
    if mapping is None:
        return Piece(flat, 0, 0, 0)
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(flat, here.start, there.start, here.numel)


def _pieces(zero: Any, groups: Groups) -> list[tuple[int, nn.Parameter, Piece]]:
    """(number of the group, parameter, piece of it), numbered as `torch.optim.Optimizer.state_dict` numbers them."""
    return [(number, p, _piece(zero, number, p)) for number, group in enumerate(groups) for p in group]


def gather_optimizer(zero: Any, groups: Groups) -> dict[str, Any]:
    """The state of a ZeRO optimizer as a single process's torch optimizer gives it.

    Args:
        zero: DeepSpeed's optimizer, of any stage.
        groups: the parameters of every group, as they were before DeepSpeed took them.

    Returns:
        ``state`` and ``param_groups``, tensors on the CPU. Only the first process gets the ``state``.
    """
    state: dict[int, dict[str, Any]] = {}
    for index, (_, parameter, piece) in enumerate(_pieces(zero, groups)):
        entry = {
            key: _gather(value, piece, whole_shape(parameter)) if _is_cut(value, piece.flat) else _on_cpu(value)
            for key, value in zero.optimizer.state.get(piece.flat, {}).items()
        }
        if entry and dist.get_rank() == 0:
            state[index] = entry
    described, index = [], 0
    for group, settings in zip(groups, zero.optimizer.param_groups, strict=True):
        described.append({**settings, "params": list(range(index, index + len(group)))})
        index += len(group)
    return {"state": state, "param_groups": described}


def _is_cut(value: Any, flat: Tensor) -> bool:
    """Whether an entry of a state has a number for each weight, rather than one for all."""
    return isinstance(value, Tensor) and value.shape == flat.shape


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _gather(values: Tensor, piece: Piece, shape: torch.Size) -> Tensor:
    buffer = torch.zeros(shape.numel(), dtype=torch.float32, device=_device())
    piece.of_whole(buffer).copy_(piece.of_flat(values.detach()))
    dist.all_reduce(buffer.view(torch.int32))  # pieces do not overlap, and adding the integer 0 changes no bit
    return buffer.reshape(shape).cpu()


def _device() -> torch.device:
    """Where collective operations take their tensors from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@torch.no_grad()
def scatter_optimizer(zero: Any, groups: Groups, saved: dict[str, Any]) -> None:
    """Put a state as `gather_optimizer` (or a single process's optimizer) gave it into a fresh ZeRO optimizer.

    Args:
        zero: DeepSpeed's optimizer, of any stage and any number of processes.
        groups: as in `gather_optimizer`.
        saved: the whole state, on every process.

    Raises:
        ValueError: it is of other groups of parameters.
    """
    optimizer = zero.optimizer
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group) for group in groups]:
        raise ValueError(f"the saved optimizer has groups of {sizes} parameters, not {[len(g) for g in groups]}")
    for settings, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        settings.update({key: value for key, value in before.items() if key not in _OF_THE_PLACE})
    for index, (group, parameter, piece) in enumerate(_pieces(zero, groups)):
        shape = whole_shape(parameter)
        own = optimizer.state[piece.flat]
        for key, value in saved["state"].get(index, {}).items():
            if not isinstance(value, Tensor):
                own[key] = value
            elif value.shape == shape and key != "step":
                into = own.setdefault(key, torch.zeros_like(piece.flat))
                piece.of_flat(into).copy_(piece.of_whole(value))
            else:  # one number for all weights; torch keeps it beside the weights only where it must
                settings = optimizer.param_groups[group]
                beside = settings.get("fused") or settings.get("capturable")
                own[key] = value.clone().to(piece.flat.device if beside else "cpu")


def part(parameter: Tensor) -> Tensor:
    """What ZeRO 3 keeps here of a parameter: one dimension, padded at the end of the last process's."""
    return parameter.ds_tensor.detach()  # type: ignore[attr-defined]


def part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part that ZeRO 3 would keep here of a tensor as large as the parameter."""
    own = torch.zeros_like(part(parameter))
    start = min(own.numel() * dist.get_rank(), whole.numel())
    here = whole.reshape(-1)[start : start + own.numel()]
    own[: here.numel()].copy_(here)
    return own


def gather_part(values: Tensor, parameter: Tensor) -> Tensor:
    """Of what every process has in the form of `part`, the whole in the parameter's shape."""
    whole = torch.empty(values.numel() * dist.get_world_size(), dtype=values.dtype, device=_device())
    dist.all_gather_into_tensor(whole, values.to(_device()))
    shape = whole_shape(parameter)
    return whole[: shape.numel()].reshape(shape)


def write(parameter: Tensor, values: Tensor) -> None:
    """Change a parameter's part; what ZeRO 3 holds whole besides, because it is small, follows."""
    part(parameter).copy_(values)
    kept: Any = parameter
    if kept.ds_status.name == "AVAILABLE":
        kept.partition()
        kept.all_gather()


def gather_state_dict(module: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    """``module.state_dict()`` with every partitioned parameter whole, on the CPU; they are gathered one by one.

    Args:
        frozen: whether to gather parameters that are not trained too; else they are left out.

    Returns:
        On the first process the state, on the others an empty mapping.
    """
    first = dist.get_rank() == 0
    state = dict(module.state_dict()) if first else {}
    for name, parameter in module.named_parameters():
        if not is_partitioned(parameter):
            continue
        if not frozen and not parameter.requires_grad:
            state.pop(name, None)
            continue
        whole = gather_part(part(parameter), parameter)
        if first:
            state[name] = whole.cpu()
    return state


def join(model: nn.Module) -> None:
    """Make every partitioned parameter whole for good, in the first process's memory, and take ZeRO 3's hooks away.

    In the other processes these parameters become empty.
    """
    cut: list[Any] = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    for optimizer in {p._z3_optimizer for p in cut if p.requires_grad}:
        optimizer.destroy()
    for parameter in cut:
        whole = gather_part(part(parameter), parameter)
        parameter.data = whole.cpu() if dist.get_rank() == 0 else whole[:0]
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
        parameter.ds_tensor = None
