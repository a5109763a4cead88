"""Parameters as DTensors: rows divided among the ranks, or the whole on each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lastlayer.distributed.collectives import copied
from lastlayer.distributed.ranks import Ranks


def divided(tensor: Tensor, ranks: Ranks) -> DTensor:
    """The rows of `tensor (total, ...)` that this rank holds, a copy, as a `Shard(0)` DTensor."""
    own = tensor.detach()[ranks.span(len(tensor))]
    return _on_mesh(own, ranks, Shard(0), tensor.shape)


def replicated(tensor: Tensor, ranks: Ranks) -> DTensor:
    """The whole of `tensor`, a copy, as a `Replicate()` DTensor."""
    return _on_mesh(tensor.detach(), ranks, Replicate(), tensor.shape)


def of_own_rows(own: Tensor, total: int, ranks: Ranks) -> DTensor:
    """The `Shard(0)` DTensor of `total` rows whose part on this rank is `own`, not copied."""
    return _of_own(own, ranks, Shard(0), (total, *own.shape[1:]))


def own_rows(tensor: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of a whole tensor, or of a DTensor on the mesh of the ranks; a view where it has them."""
    if isinstance(tensor, DTensor):
        return tensor.redistribute(ranks.mesh, _placements(ranks, Shard(0))).to_local()
    return tensor[ranks.span(len(tensor))]


def _on_mesh(own: Tensor, ranks: Ranks, placement: Any, shape: torch.Size) -> DTensor:
    device = own.device if own.is_meta else torch.device(ranks.mesh.device_type)
    return _of_own(own.to(device, copy=True).contiguous(), ranks, placement, shape)


def _of_own(own: Tensor, ranks: Ranks, placement: Any, shape: Sequence[int]) -> DTensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    placements = _placements(ranks, placement)
    return DTensor.from_local(own, ranks.mesh, placements, run_check=False, shape=size, stride=stride)


def _placements(ranks: Ranks, placement: Any) -> list[Any]:
    """With two dimensions the first holds copies."""
    return [Replicate()] * (ranks.mesh.ndim - 1) + [placement]


def local(tensor: Any, copies: Ranks | None) -> Tensor:
    """This rank's part of a DTensor, differentiable; its gradient is the mean over the ranks with copies."""
    own = tensor.to_local()
    return own if copies is None else copied(own, copies, mean=True)
