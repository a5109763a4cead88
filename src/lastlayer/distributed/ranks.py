"""The processes that divide the classes of a layer among them."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


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
            "shard needs torch.distributed: start the processes with torchrun and call "
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
