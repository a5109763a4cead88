"""One step of several processes: the gradients of all their rows gathered as one; all make it, or none."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lastlayer.functional.sent_bytes import count_sent
from lastlayer.layers.factored.state import FactoredState
from lastlayer.layers.factored.step import Gradient

# The parts of a gradient that have as many columns whatever the targets, and so are sent as one matrix.
FIXED = ("hidden", "products", "by_hidden", "sparse", "by_norm", "by_total")


def of_all_processes(gradient: Gradient | None, state: FactoredState, group: Any) -> Gradient | None:
    """The mean of the gradients of all processes, which all hold the same state; None where none has one.

    A process without a gradient (None) has no rows. With N rows in the largest part and K targets each, every
    process sends `N (5 d + 4 + 2 K)` numbers to each other.
    """
    size = dist.get_world_size(group)
    shape = (0, 0, 0) if gradient is None else (*gradient.ids.shape, gradient.by_total is not None)
    shapes = [part.tolist() for part in _gathered(torch.tensor(shape, device=state.factor.device), group)]
    rows, targets, totals = (max(column) for column in zip(*shapes, strict=True))
    if not targets:  # no process has a gradient
        return None
    widths = _widths(state, bool(totals))
    numbers = state.factor.new_zeros(rows, sum(widths.values()) + targets)
    ids = torch.zeros(rows, targets, dtype=torch.int64, device=numbers.device)
    if gradient is not None and len(gradient.ids):
        own = [getattr(gradient, name).reshape(len(gradient.ids), -1).to(numbers) for name in widths]
        numbers[: len(gradient.ids), : sum(widths.values())] = torch.cat(own, 1)
        numbers[: len(gradient.ids), sum(widths.values()) :][:, : gradient.ids.shape[1]] = gradient.by_score
        ids[: len(gradient.ids), : gradient.ids.shape[1]] = gradient.ids
    parts = zip(_gathered(numbers, group), _gathered(ids, group), shapes, strict=True)
    return Gradient.joined([_part(widths, n[: s[0]], i[: s[0]]) for n, i, s in parts]).scaled(1 / size)


def agreed(growth: float, error: Exception | None, groups: Iterable[Any], device: torch.device) -> float:
    """The largest `growth` of all processes of the groups; where one of them has an error, an error in each.

    So all make a step, and repair after it, or none does. Sends two numbers.
    """
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    if not groups and error is None:
        return growth
    facts = torch.tensor([growth, float(error is not None)], dtype=torch.float64, device=device)
    for group in groups:
        size = dist.get_world_size(group)
        count_sent("all_reduce", 2 * (size - 1) / size * facts.nbytes)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=group)
    growth, refused = facts.tolist()
    if refused:
        message = None if error is None else str(error)
        for group in groups:
            messages = [None] * dist.get_world_size(group)
            dist.all_gather_object(messages, message, group=group)
            message = message or next((other for other in messages if other), None)
        raise error or ValueError(f"another process cannot make this step, so none makes it: {message}")
    return growth


def _widths(state: FactoredState, totals: bool) -> dict[str, int]:
    """The columns of each part."""
    d = state.features
    every = {"hidden": d, "products": 2 * d + 2, "by_hidden": d, "sparse": d, "by_norm": 1, "by_total": 1}
    return {name: every[name] for name in FIXED if name != "by_total" or totals}


def _part(widths: dict[str, int], numbers: Tensor, ids: Tensor) -> Gradient:
    """The gradient of one process, of what it sent."""
    columns = numbers.split([*widths.values(), ids.shape[1]], 1)
    found = dict(zip(widths, columns, strict=False))
    return Gradient(
        hidden=found["hidden"].contiguous(),
        products=found["products"].contiguous(),
        ids=ids.contiguous(),
        by_score=columns[-1].contiguous(),
        by_norm=found["by_norm"][:, 0].contiguous(),
        by_total=found["by_total"][:, 0].contiguous() if "by_total" in found else None,
        by_hidden=found["by_hidden"].contiguous(),
        sparse=found["sparse"].contiguous(),
    )


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    count_sent("all_gather", tensor.nbytes * (len(parts) - 1))
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
