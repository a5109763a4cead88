"""Checks that all ranks say the same: one that differs is an error on all of them, not a hang."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lastlayer.distributed.ranks import Ranks


def check_agreement(what: str, facts: Mapping[str, Any], ranks: Ranks) -> None:
    """ValueError on every rank, unless all ranks have the same facts.

    Args:
        what: what the facts are of, for the message.
        facts: names and values; tensors are compared by shape, dtype, whether they require a gradient, and a
            checksum of their values.
    """
    if ranks.size == 1:
        return
    own = {name: _described(value) for name, value in facts.items()}
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, own, group=ranks.group)
    for rank, other in enumerate(found):
        for name in {**found[0], **other}:
            first, this = (facts.get(name, "nothing") for facts in (found[0], other))
            if first != this:
                raise ValueError(
                    f"all ranks must have the same {what}, but {name} differs: rank 0 has {first}, "
                    f"rank {rank} has {this}"
                )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if isinstance(value, DTensor):
        value = value.to_local()
    kind = f"{value.dtype} {tuple(value.shape)}{' with a gradient' if value.requires_grad else ''}"
    return kind if value.is_meta else f"{kind}, checksum {_checksum(value):08x}"


def _checksum(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        entries = tensor.detach().to_sparse_coo().coalesce()
        return _checksum(entries.indices()) ^ _checksum(entries.values())
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    if flat.numel() == 1:  # contiguous whatever its stride, in which a view of bytes would be refused
        flat = flat.new_empty(1).copy_(flat)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else 0
