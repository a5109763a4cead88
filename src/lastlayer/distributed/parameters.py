"""Parameters as DTensors: rows divided among the ranks, or the whole on each."""

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


def _on_mesh(own: Tensor, ranks: Ranks, placement: Any, shape: torch.Size) -> DTensor:
    """With two dimensions the first holds copies."""
    device = own.device if own.is_meta else torch.device(ranks.mesh.device_type)
    placements = [Replicate()] * (ranks.mesh.ndim - 1) + [placement]
    own = own.to(device, copy=True).contiguous()
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, ranks.mesh, placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Any, copies: Ranks | None) -> Tensor:
    """This rank's part of a DTensor, differentiable; its gradient is the mean over the ranks with copies."""
    own = tensor.to_local()
    return own if copies is None else copied(own, copies, mean=True)
