"""What a training step of a sharded layer sends and holds: what its docstring says, and never `(N, V)`."""

import pytest
import torch
from same_answers import batch, make_sharded
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lastlayer import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    LogUniform,
    MixtureOfSoftmaxes,
    OneVsAll,
    SampledSoftmax,
)
from lastlayer.distributed import count_bytes
from lastlayer.functional import linear_chunks, one_vs_all

N, D, V = 48, 16, 3000
RANDOM_STATE = 5056  # bytes of PyTorch's generator


def of_tails(layer, targets):
    """The numbers sent for the rows in tails."""
    edges = [*layer.cutoffs, layer.num_classes]
    total = 0
    for i, tail in enumerate(layer.tail):
        count = int(((targets >= edges[i]) & (targets < edges[i + 1])).sum())
        total += count * (tail[0].weight.shape[0] + 3)
    return total


# A layer, how many collectives a step has, and the numbers of results that it reduces.
STEPS = {
    "full": (lambda: FullSoftmax(D, V), 3, lambda layer, targets: N * (D + 3)),
    "class weights": (
        lambda: FullSoftmax(D, V, class_weights=torch.linspace(0.2, 2.0, V)),
        3,
        lambda layer, targets: N * (D + 5),
    ),
    "adaptive": (
        lambda: AdaptiveSoftmax(D, V, [500, 1500], div_value=2.0),
        3,
        lambda layer, targets: N * (D + 3) + of_tails(layer, targets),
    ),
    "hierarchical": (
        lambda: HierarchicalSoftmax(D, V, clusters=torch.arange(V) * 7 // V),
        6,
        lambda layer, targets: N * (D + 6) + layer.num_clusters,
    ),
    "mixture": (lambda: MixtureOfSoftmaxes(D, V, 3, latent_features=8), 3, lambda layer, targets: N * 3 * (8 + 3)),
    "one against all": (lambda: OneVsAll(D, V), 2, lambda layer, targets: N * D + 1),
    "sampled": (
        lambda: SampledSoftmax(D, V, LogUniform(V), 100),
        4,
        lambda layer, targets: N * (D + 3) + RANDOM_STATE / 8,
    ),
}


def sends(group, name):
    """Collectives by PyTorch's own counter, and bytes within 5% of the documented numbers."""
    make, calls, numbers = STEPS[name]
    layer, R = make(), group.size()
    sharded = make_sharded(layer, group)
    hidden, targets = batch(layer, N, dtype=torch.float32)
    if name == "hierarchical":
        targets[:3] = V // R  # in a cluster that two ranks share
    hidden.requires_grad_()
    sharded(hidden, targets)  # the first call compares the inputs
    with CommDebugMode() as mode, count_bytes() as sent:
        sharded(hidden, targets).backward()
    assert mode.get_total_counts() == calls, mode.get_comm_counts()
    expected = 2 * (R - 1) / R * 4 * numbers(sharded, targets)
    assert sent.total() <= 1.05 * expected, (sent, expected)
    assert sent.total() < 4 * N * V / 10  # never (N, V)


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_sends(pool, name):
    for ranks in (2, 3):
        pool.run(sends, ranks, name)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that some operation makes, and which one does."""

    def __init__(self):
        super().__init__()
        self.numbers, self.operation = 0, None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if type(part) is torch.Tensor and part.layout == torch.strided and part.numel() > self.numbers:
                self.numbers, self.operation = part.numel(), operation
        return result


def holds(group, name):
    """Nothing larger than the rank's parameters, the batch, and 1/32 of all logits."""
    with pytest.MonkeyPatch.context() as patch:  # parts that are small even of these few logits
        for module, constant in ((linear_chunks, "PART_NUMBERS"), (one_vs_all, "BLOCK_NUMBERS")):
            patch.setattr(module, constant, 64)
        patch.setattr(one_vs_all, "LEAST_CLASSES", 16)
        rows, layer = 400, STEPS[name][0]()
        if name == "hierarchical":  # with clusters of the usual size: a step holds all logits within them
            layer = HierarchicalSoftmax(D, V)
        sharded = make_sharded(layer, group)
        hidden, targets = batch(layer, rows, dtype=torch.float32)
        hidden.requires_grad_()
        sharded(hidden, targets)
        parameters = max(p.to_local().numel() for p in sharded.parameters())
        components = 3 if name == "mixture" else 1
        most = max(parameters, rows * 100, components * rows * V // 32 + V)
        with Largest() as largest:
            sharded(hidden, targets).backward()
        assert rows * D < largest.numbers <= most, (largest.numbers, most, largest.operation)
        if name in ("full", "sampled"):  # others hold chunks of all their log-probabilities in a query
            with Largest() as largest:
                sharded.topk(hidden, 3)
            assert largest.numbers <= most, (largest.numbers, most, largest.operation)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "class weights"])
def test_what_a_step_holds(pool, name):
    for ranks in (1, 3):
        pool.run(holds, ranks, name)
