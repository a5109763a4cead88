"""Many small softmaxes: non-temporal stores of a large gradient give the same numbers; threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lastlayer import FullSoftmax, HierarchicalSoftmax, TreeSoftmax
from lastlayer.kernels import backends, engine
from lastlayer.kernels.grouped import add_rows, softmax_backward

SIZES, COUNTS = torch.tensor([30_000, 1, 9_999]), torch.tensor([1, 2, 7])
NUM_ROWS, NUM_CLASSES = int(COUNTS.sum()), int(SIZES.sum())


@pytest.mark.parametrize("large_work", [0, 1 << 40])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", [64, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gradients_at_any_address_and_width(dtype, width, shift, threads, large_work, isa):
    """Rows of 63 numbers, and an address shifted by one, do not lie where such stores may."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, width, generator=generator, dtype=dtype)
    scale = torch.arange(1, NUM_ROWS + 1, dtype=dtype)
    parts = [torch.randn(c, s, generator=generator, dtype=dtype) for c, s in zip(COUNTS, SIZES, strict=True)]
    rows, starts = COUNTS.cumsum(0) - COUNTS, SIZES.cumsum(0) - SIZES
    table = torch.stack([rows, COUNTS, starts, SIZES], 1)
    order = torch.randperm(NUM_ROWS, generator=generator)
    memory = torch.full((NUM_CLASSES * width + 2,), float("nan"), dtype=dtype)
    of_weight = memory[shift : shift + NUM_CLASSES * width].view(NUM_CLASSES, width)
    of_bias = torch.full((NUM_CLASSES,), float("nan"), dtype=dtype)
    residual = torch.cat([part.reshape(-1) for part in parts])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        softmax_backward(table, large_work, order, hidden, residual, scale, of_weight, of_bias, compact=False)
    finally:
        torch.set_num_threads(before)

    own = order.split(COUNTS.tolist())
    scaled = [(part * scale[o, None]).T for part, o in zip(parts, own, strict=True)]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    expected = torch.cat([s @ hidden[o] for s, o in zip(scaled, own, strict=True)])
    torch.testing.assert_close(of_weight, expected, rtol=tolerance, atol=tolerance)
    sums = torch.cat([s.sum(1) for s in scaled])
    torch.testing.assert_close(of_bias, sums, rtol=tolerance, atol=tolerance)
    assert memory[:shift].isnan().all()
    assert memory[shift + NUM_CLASSES * width :].isnan().all()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rows", [1, 301])
def test_a_head_and_clusters_by_shared_products(rows, sparse, monkeypatch, isa):
    """By products from some thousand multiply-adds on, those above four million shared by threads."""
    monkeypatch.setattr(backends, "GROUP_WORK", 1 << 12)
    torch.manual_seed(0)
    layer = HierarchicalSoftmax(97, 20_000, sparse=sparse)
    hidden, targets = torch.randn(97, rows).T, torch.randint(20_000, (rows,))

    def found():
        layer.zero_grad()
        leaf = hidden.clone().requires_grad_()
        loss = layer(leaf, targets)
        loss.backward()
        return [loss.detach(), leaf.grad, *(p.grad.to_dense() for p in layer.parameters())]

    compiled = found()
    with engine.forced(None):
        torch.testing.assert_close(compiled, found(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [HierarchicalSoftmax, TreeSoftmax, FullSoftmax])
def test_eight_python_threads_on_one_layer(kind, isa):
    """The interpreter's lock is released inside: what a call needs must be its own."""
    torch.manual_seed(0)
    layer = kind(16, 500)
    batches = [(torch.randn(40, 16), torch.randint(500, (40,))) for _ in range(16)]

    def gradient(batch):
        hidden = batch[0].clone().requires_grad_()
        return torch.autograd.grad(layer(hidden, batch[1]), hidden)[0]

    expected = [gradient(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(gradient, batches))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_added_where_they_belong(count, weighted, dtype, isa):
    generator = torch.Generator().manual_seed(0)
    rows, places = (
        torch.randn(50, 33, generator=generator, dtype=dtype),
        torch.arange(50 * count).view(50, count) % 7,
    )
    factors = torch.randn(50, count, generator=generator, dtype=dtype) if weighted else None
    sums = torch.ones(8, 33, dtype=dtype)
    add_rows(sums, places, factors, rows)
    terms = rows.repeat_interleave(count, 0) * (1 if factors is None else factors.reshape(-1, 1))
    expected = torch.ones(8, 33, dtype=torch.float64).index_add_(0, places.reshape(-1), terms.double())
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
