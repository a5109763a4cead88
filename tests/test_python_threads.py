"""Eight Python threads on one layer, and on one screen, get what one thread gets."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    Int4Preview,
    Int8Preview,
    MixtureOfSoftmaxes,
    ScreenedSoftmax,
    SVDPreview,
    TreeSoftmax,
)

THREADS, ROUNDS = 8, 6
LAYERS = {
    "full": lambda: FullSoftmax(16, 3000),
    "plif": lambda: FullSoftmax(16, 3000, logit_map=PLIF(50, 3.0)),
    "mixture": lambda: MixtureOfSoftmaxes(16, 1500, 2),
    "adaptive": lambda: AdaptiveSoftmax(16, 3000, [100, 1000], div_value=2.0),
    "hierarchical": lambda: HierarchicalSoftmax(16, 20_000),
    "hierarchical-sparse": lambda: HierarchicalSoftmax(16, 20_000, sparse=True),
    "tree-sparse": lambda: TreeSoftmax(16, 3000, sparse=True),
}
PREVIEWS = {"int8": Int8Preview(), "int4": Int4Preview(), "svd": SVDPreview(8)}


def in_threads(work):
    """`[work(0), ..., work(7)]`, `ROUNDS` times over, all threads starting together."""
    barrier = Barrier(THREADS)

    def run(number):
        barrier.wait()
        return [work(number) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def batch(number, num_classes):
    """Another batch, of another size, for each thread."""
    generator = torch.Generator().manual_seed(number)
    rows = 3 + 9 * number
    hidden = torch.randn(rows, 16, generator=generator)
    return hidden, torch.randint(num_classes, (rows,), generator=generator)


def results(layer, number):
    """Loss, gradients and queries of one thread's batch."""
    hidden, targets = batch(number, layer.num_classes)
    hidden.requires_grad_()
    loss = layer(hidden, targets)
    gradients = torch.autograd.grad(loss, [hidden, *layer.parameters()], allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        best = layer.topk(hidden, 5)
        values = [layer.target_log_prob(hidden, targets), best.log_prob, layer.log_prob(hidden[:3])]
    return [loss.detach(), *(g.to_dense() if g.is_sparse else g for g in gradients), *values]


@pytest.mark.parametrize("name", LAYERS)
def test_threads_on_one_layer(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    expected = [results(layer, number) for number in range(THREADS)]
    for found, own in zip(in_threads(partial(results, layer)), expected, strict=True):
        for again in found:
            torch.testing.assert_close(again, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", PREVIEWS)
def test_threads_on_one_screen(name, exact):
    torch.manual_seed(0)
    weight = torch.randn(5000, 16)
    # by times alone the full layer might take over between two queries, with another normaliser
    screen = ScreenedSoftmax(weight, preview=PREVIEWS[name], candidates=50, use="screen")

    def query(number):
        hidden, _ = batch(number, 5000)
        return [screen.topk(hidden[:1], 4, exact=exact), screen.topk(hidden, 4, exact=exact)]

    expected = [query(number) for number in range(THREADS)]
    for found, own in zip(in_threads(query), expected, strict=True):
        for again in found:
            torch.testing.assert_close(again, own, rtol=1e-5, atol=1e-5)
