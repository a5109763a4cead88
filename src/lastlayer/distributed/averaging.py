"""Gradients averaged over data-parallel processes, row-sparse ones without their zeros."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from lastlayer.distributed.collectives import averaged, largest
from lastlayer.distributed.ranks import Ranks, check_ranks
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
        super().__init__()
        self.module = module
        self.ranks, _ = check_ranks(group, self.join_device.type)

    def __call__(self) -> None:
        """Averages all gradients, in place of the process's own."""
        Join.notify_join_context(self)
        _average_gradients(self.module.parameters(), self.ranks)

    # For `Join`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a process does that has no batch left."""
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def join_process_group(self) -> Any:
        return self.ranks.group


class _Joined(JoinHook):
    def __init__(self, averager: GradientAverager) -> None:
        self.averager = averager

    def main_hook(self) -> None:
        """Takes part in the others' averages, with no gradient of its own."""
        parameters = list(self.averager.module.parameters())
        for parameter in parameters:
            parameter.grad = None
        _average_gradients(parameters, self.averager.ranks)
        for parameter in parameters:
            parameter.grad = None

    def post_hook(self, is_last_joiner: bool) -> None:
        """The parameters of the process that trained longest."""
        ranks, device = self.averager.ranks, self.averager.join_device
        last = largest(torch.tensor(ranks.rank if is_last_joiner else -1, device=device), ranks)
        for parameter in self.averager.module.parameters():
            dist.broadcast(parameter.data, group=ranks.group, group_src=int(last))


@torch.no_grad()
def _average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    own = [0 if p.grad is None else 1 if p.grad.is_sparse else 2 for p in trained]
    kinds = largest(torch.tensor(own, device=trained[0].device), ranks).tolist()
    for parameter, kind in zip(trained, kinds, strict=True):
        gradient = parameter.grad
        if kind == 0:  # no process has one
            continue
        if kind == 2:
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        elif gradient is None:
            nothing = torch.empty(0, dtype=torch.int64, device=parameter.device)
            gradient = row_sparse(nothing, parameter.detach()[:0], len(parameter))
        parameter.grad = averaged(gradient, ranks)
