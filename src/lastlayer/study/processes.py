"""A command that several processes run together, as torchrun starts them: each has its own classes, one reports.

All processes do the same things in the same order; where they would decide by their own clocks, the first one's
counts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer
from lastlayer.study.errors import UsageError


def count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A group of all processes meanwhile; nothing where there is one."""
    if count() == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_first(number: float) -> float:
    """The first process's number, on all."""
    if count() == 1:
        return number
    import torch.distributed as dist

    found = [number]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def sharded(name: str, layer: OutputLayer) -> OutputLayer:
    """The layer with its classes divided among the processes; as it is where there is one.

    Row-sparse gradients are dense then. Raises UsageError for a layer that cannot be sharded.
    """
    if count() == 1:
        return layer
    from lastlayer.distributed import shard

    if getattr(layer, "sparse", False):
        vars(layer)["sparse"] = False
    try:
        return shard(layer)
    except TypeError as problem:
        raise UsageError(
            f"{name} cannot be divided among processes: {problem}; choose other --layers"
        ) from problem


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part; another as it is. All processes must ask for it."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def parts_of_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, whole, as this process's parts where its parameters are divided."""
    if count() == 1:
        return state
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    own = {
        index: {name: part(parameters[int(index)], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": own}
