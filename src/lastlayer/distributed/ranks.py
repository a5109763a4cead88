"""The processes that divide the classes of a layer among them, and parameters as DTensors over these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Ranks:
    """One dimension of a mesh of processes.

    Rows are divided as `Shard(0)` of a DTensor divides them, and so `torch.chunk`: `ceil(total / size)` to each
    rank, in order, until none are left; the last ranks may have fewer, or none.
    """

    mesh: DeviceMesh
    dimension: int

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(self.dimension)

    @property
    def size(self) -> int:
        return self.mesh.size(self.dimension)

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank(self.dimension)

    def __deepcopy__(self, memo: object) -> "Ranks":
        return self  # processes are not copied

    def span(self, total: int, rank: int | None = None) -> slice:
        """The rows of `total` that a rank holds (None: this one)."""
        step = -(-total // self.size)
        start = min(total, step * (self.rank if rank is None else rank))
        return slice(start, min(total, start + step))

    def spans(self, total: int) -> list[slice]:
        """The rows of every rank."""
        return [self.span(total, rank) for rank in range(self.size)]


def places_in(own: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where ids are among neighbouring ones (0 if they are none of these), and which of them are."""
    here = (ids >= own.start) & (ids < own.stop)
    return (ids - own.start).masked_fill(~here, 0), here


def check_ranks(
    mesh_or_group: DeviceMesh | dist.ProcessGroup | None, device_type: str
) -> tuple[Ranks, Ranks | None]:
    """The ranks that divide the classes, and those that hold copies (the first dimension of two).

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError, ValueError: neither a mesh nor a group; a mesh of more than two dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "lastlayer.distributed needs process groups: start the processes with torchrun and call "
            'torch.distributed.init_process_group("gloo") (or "nccl") in each first'
        )
    mesh = dist.group.WORLD if mesh_or_group is None else mesh_or_group
    if isinstance(mesh, dist.ProcessGroup):
        if device_type == "meta":  # where the group's tensors will be
            device_type = "cuda" if "nccl" in dist.get_backend(mesh) else "cpu"
        mesh = DeviceMesh.from_group(mesh, device_type)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh_or_group must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh_or_group must hold this process, rank {dist.get_rank()}; got {mesh}")
    if mesh.ndim > 2:
        raise ValueError(f"mesh_or_group must have one dimension, or two (copies, classes); got {mesh.ndim}")
    return Ranks(mesh, mesh.ndim - 1), Ranks(mesh, 0) if mesh.ndim == 2 else None


def divided(tensor: Tensor, ranks: Ranks) -> DTensor:
    """The rows of `tensor (total, ...)` that this rank holds, a copy, as a `Shard(0)` DTensor."""
    return of_own_rows(copied_here(own_rows(tensor, ranks), ranks), len(tensor), ranks)


def replicated(tensor: Tensor, ranks: Ranks) -> DTensor:
    """The whole of `tensor`, a copy, as a `Replicate()` DTensor."""
    return _of_own(copied_here(tensor, ranks), ranks, Replicate(), tensor.shape)


def copied_here(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A copy on the device of the ranks; on "meta" there."""
    device = tensor.device if tensor.is_meta else torch.device(ranks.mesh.device_type)
    return tensor.detach().to(device, copy=True).contiguous()


def of_own_rows(own: Tensor, total: int, ranks: Ranks) -> DTensor:
    """The `Shard(0)` DTensor of `total` rows whose part on this rank is `own`, not copied."""
    return _of_own(own, ranks, Shard(0), (total, *own.shape[1:]))


def own_rows(tensor: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of a whole tensor, or of a DTensor on the mesh of the ranks; a view where it has them."""
    if isinstance(tensor, DTensor):
        return tensor.redistribute(ranks.mesh, _placements(ranks, Shard(0))).to_local()
    return tensor[ranks.span(len(tensor))]


def _of_own(own: Tensor, ranks: Ranks, placement: Any, shape: Sequence[int]) -> DTensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    placements = _placements(ranks, placement)
    return DTensor.from_local(own, ranks.mesh, placements, run_check=False, shape=size, stride=stride)


def _placements(ranks: Ranks, placement: Any) -> list[Any]:
    """With two dimensions the first holds copies."""
    return [Replicate()] * (ranks.mesh.ndim - 1) + [placement]


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, differentiable; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
