"""`shard`: a layer with its classes divided among processes."""

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lastlayer.distributed.adaptive import ShardedAdaptiveSoftmax
from lastlayer.distributed.agreement import check_agreement
from lastlayer.distributed.factored import ShardedFactoredOutput
from lastlayer.distributed.full import ShardedFullSoftmax
from lastlayer.distributed.hierarchical import ShardedHierarchicalSoftmax
from lastlayer.distributed.layer import ShardedLayer
from lastlayer.distributed.mixture import ShardedMixtureOfSoftmaxes
from lastlayer.distributed.one_vs_all import ShardedOneVsAll
from lastlayer.distributed.ranks import check_ranks
from lastlayer.distributed.sampled import ShardedSampledSoftmax
from lastlayer.layers.adaptive import AdaptiveSoftmax
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.one_vs_all import OneVsAll
from lastlayer.layers.sampled.sampled_softmax import SampledSoftmax

KINDS: dict[type[OutputLayer], type[ShardedLayer]] = {
    FullSoftmax: ShardedFullSoftmax,
    AdaptiveSoftmax: ShardedAdaptiveSoftmax,
    FactoredOutput: ShardedFactoredOutput,
    HierarchicalSoftmax: ShardedHierarchicalSoftmax,
    MixtureOfSoftmaxes: ShardedMixtureOfSoftmaxes,
    OneVsAll: ShardedOneVsAll,
    SampledSoftmax: ShardedSampledSoftmax,
}


def shard(layer: OutputLayer, mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None) -> ShardedLayer:
    """The same layer with its classes divided among the ranks of a group.

    Equals `layer` in every call, on every rank: all ranks call it with the same hidden states and targets (as
    after a tensor-parallel encoder, or one that each rank computes) and get the same loss, and the same gradient
    of the hidden states. Each holds `ceil(V / ranks)` classes or fewer, perhaps none, and the gradients of these
    alone. `(N, V)` numbers are sent by `log_prob` only, which returns them; the docstrings of the sharded layers
    give the numbers of a step.

    Parameters are DTensors, `Shard(0)` where they have a row for each class and else `Replicate()`, named as in
    `layer`: optimizers, `torch.nn.utils.clip_grad_norm_` (of this layer's parameters alone: it takes no plain
    tensors beside DTensors) and `torch.distributed.checkpoint` work, the last with another number of ranks;
    `load_state_dict` also takes the state of a layer that is not sharded. With `sparse=True` the parameters with
    row-sparse gradients, `layer.sparse_parameters()`, are this rank's rows as plain tensors, as a DTensor holds no
    sparse gradient, and DTensors in `state_dict` alone. A `FactoredOutput` has its weight in the state dict alone,
    and is trained by `FactoredSGD`.

    A layer on "meta" is sharded there, so that no process ever holds the whole; `to_empty(device=...)` then makes
    each rank's part, and `reset_parameters()` or a state dict (`torch.distributed.checkpoint`) gives it values.

    With a mesh of two dimensions the first holds copies for data parallelism: each row of the mesh divides the
    classes, takes its own data, and all gradients of this layer are averaged over the first dimension in the
    backward pass, as `DistributedDataParallel` does. Use `DistributedDataParallel` or `fully_shard` for the
    encoder alone.

    Args:
        layer: the whole layer, with equal parameters on all ranks (the same seed, or a loaded checkpoint). It is
            copied, and can be deleted; a weight tied to an embedding is tied no longer.
        mesh_or_group: a `DeviceMesh` of one dimension, or two; or a process group. None: all processes.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: a layer that cannot be sharded.
        ValueError: ranks whose layers differ in type, sizes, dtype, options or parameters, on all of them; later,
            at the first call, ranks whose inputs differ.

    >>> import tempfile, torch
    >>> import torch.distributed as dist
    >>> from lastlayer import FullSoftmax
    >>> store = tempfile.NamedTemporaryFile()
    >>> dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    >>> layer = shard(FullSoftmax(16, 1000))
    >>> layer(torch.randn(4, 16), torch.randint(1000, (4,))).backward()
    >>> layer.weight.grad.placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
    """
    if not isinstance(layer, OutputLayer):
        raise TypeError(f"layer must be an OutputLayer of lastlayer, got {type(layer).__name__}")
    if isinstance(layer, ShardedLayer):
        raise TypeError("layer must not be sharded already")
    if getattr(layer, "normalizer", None) is not None:  # of FullSoftmax: it needs all logits of a row
        raise TypeError(f"layer must have no normalizer to be sharded, got normalizer={layer.normalizer}")
    first = next(layer.parameters(), None)
    ranks, copies = check_ranks(mesh_or_group, "cpu" if first is None else first.device.type)
    make = next((KINDS[kind] for kind in type(layer).__mro__ if kind in KINDS), None)
    more = {} if make is None else make.facts(layer)
    facts = {"type": type(layer).__name__, **_settings(layer), **layer.state_dict(), **more}
    check_agreement("layer", facts, ranks)
    if copies is not None:
        check_agreement("layer", facts, copies)
    if make is None:
        allowed = ", ".join(sorted(kind.__name__ for kind in KINDS))
        raise TypeError(f"layer must be one of {allowed} to be sharded, got {type(layer).__name__}")
    return make(layer, ranks, copies)


def _settings(layer: OutputLayer) -> dict[str, Any]:
    """What a layer was made with, but for its tensors."""
    plain = (bool, int, float, str, tuple, list)
    return {name: value for name, value in vars(layer).items() if isinstance(value, plain)}
