"""Gradients averaged over data-parallel processes, row-sparse ones without their zeros."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from lastlayer.distributed.row_sums import quotient, sum_rows
from lastlayer.functional.row_sparse import row_sparse


class GradientAverager(Joinable):
    """Averages the gradients of a layer over processes that each have a part of the batch.

    For layers with `sparse=True`, whose gradients `DistributedDataParallel` does not take: keep the layer
    outside of it, the encoder inside, and call the averager between `backward` and the optimizer's step.
    Afterwards every process has the same gradients, those of the mean of all losses; row-sparse ones stay so,
    coalesced.

    All processes call it together. One whose batch gave some parameter no gradient counts 0 for it; a parameter
    that has none anywhere keeps none. For uneven numbers of batches use `Join`, together with the encoder's:

        with Join([encoder, averager]):
            for inputs, targets in batches:
                layer(encoder(inputs), targets).backward()
                averager()
                ...

    Processes that have run out count 0 then, as in `DistributedDataParallel`, and get the parameters of the last
    one at the end.

    Sends for a dense gradient what an all-reduce does; for a sparse one, with r touched rows in the process that
    has most, `r (d + 1)` numbers to each other process: no more than a dense one's while r is below V / 2.

    Args:
        module: the layer; its parameters must be the same on all processes.
        group: a process group; None: all processes.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.

    >>> import tempfile
    >>> from lastlayer import HierarchicalSoftmax
    >>> store = tempfile.NamedTemporaryFile()
    >>> dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    >>> layer = HierarchicalSoftmax(8, 1000, sparse=True)
    >>> averager = GradientAverager(layer)
    >>> layer(torch.randn(4, 8), torch.randint(1000, (4,))).backward()
    >>> averager()
    >>> layer.weight.grad.is_sparse
    True
    >>> dist.destroy_process_group()
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("a GradientAverager needs torch.distributed: call init_process_group first")
        super().__init__()
        world = dist.group.WORLD if group is None else group
        assert world is not None  # it is initialised
        self.module, self.group = module, world

    def __call__(self) -> None:
        """Averages all gradients, in place of the process's own."""
        Join.notify_join_context(self)
        average_gradients(self.module.parameters(), self.group)

    # For `Join`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a process does that has no batch left."""
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def join_process_group(self) -> Any:
        return self.group


class _Joined(JoinHook):
    def __init__(self, averager: GradientAverager) -> None:
        self.averager = averager

    def main_hook(self) -> None:
        """Takes part in the others' averages, with no gradient of its own."""
        parameters = list(self.averager.module.parameters())
        for parameter in parameters:
            parameter.grad = None
        average_gradients(parameters, self.averager.group)
        for parameter in parameters:
            parameter.grad = None

    def post_hook(self, is_last_joiner: bool) -> None:
        """The parameters of the process that trained longest."""
        group, device = self.averager.group, self.averager.join_device
        last = torch.tensor(dist.get_rank(group) if is_last_joiner else -1, device=device)
        dist.all_reduce(last, dist.ReduceOp.MAX, group=group)
        for parameter in self.averager.module.parameters():
            dist.broadcast(parameter.data, group=group, group_src=int(last))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """The means over the processes in place of each gradient; see `GradientAverager`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    gradients = [None if p.grad is None else _as_rows(p.grad) for p in trained]
    own = [
        (-1, 0) if g is None else (g.indices().shape[1] if g.is_sparse else 0, not g.is_sparse) for g in gradients
    ]
    facts = torch.tensor(own, device=trained[0].device)
    most = facts.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    for parameter, gradient, (rows, dense) in zip(trained, gradients, most.tolist(), strict=True):
        if rows < 0:  # no process has one
            continue
        average = _dense_average if dense else _sparse_average
        parameter.grad = average(parameter, gradient, rows, group)


def _as_rows(gradient: Tensor) -> Tensor:
    return gradient.coalesce() if gradient.is_sparse else gradient


def _dense_average(parameter: Tensor, gradient: Tensor | None, rows: int, group: dist.ProcessGroup) -> Tensor:
    total = torch.zeros_like(parameter) if gradient is None else gradient.to_dense().contiguous()
    dist.all_reduce(total, group=group)
    return total.div_(dist.get_world_size(group))


def _sparse_average(parameter: Tensor, gradient: Tensor | None, rows: int, group: dist.ProcessGroup) -> Tensor:
    if gradient is None:
        nothing = torch.empty(0, dtype=torch.int64, device=parameter.device)
        gradient = row_sparse(nothing, parameter.detach()[:0], len(parameter))
    return quotient(sum_rows(gradient, rows, group), dist.get_world_size(group))
