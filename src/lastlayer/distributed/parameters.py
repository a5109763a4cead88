"""Parameters as DTensors: rows divided among the ranks, or the whole on each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lastlayer.distributed.ranks import Ranks


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
