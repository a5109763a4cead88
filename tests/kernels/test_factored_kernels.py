"""The compiled form of a factored step is its plain twin: every function, and whole training."""

import copy

import pytest
import torch

from lastlayer import FactoredOutput, FactoredSGD, SquaredError, TaylorSoftmax
from lastlayer.kernels import factored as kernels
from lastlayer.kernels import factored_update as update
from lastlayer.kernels.factored_gradient import Columns, FactoredGradient, padded

pytest.importorskip("numba")
if kernels.gemm() is None:
    pytest.skip("PyTorch's BLAS was not found", allow_module_level=True)

N, D, V, RATE = 24, 70, 50, 0.02
AT = Columns.of(D)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(kernels, "LEAST_NUMBERS", 1)


def randoms(*shapes, dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def batch(dtype, width, with_total):
    """Ids that repeat within and across rows, derivatives of both signs, and the state's matrices."""
    ids = torch.randint(V, (N, width), generator=torch.Generator().manual_seed(4))
    ids[1:4] = ids[0, 0]
    stacked, factor, pair, products, target, norm, total = randoms(
        (AT.end, D), (V, D), (2 * N, padded(D)), (N, AT.end), (N, width), (N,), (N,), dtype=dtype
    )
    used = torch.zeros(AT.end, dtype=dtype)
    for start, count in ((AT.gram, D), (AT.map, D), (AT.shared, 2), (AT.inverse, D)):
        used[start : start + count] = 1
    pair[:, D:] = 0
    return (
        stacked * used[:, None] / 8,
        factor,
        pair,
        products * used,
        ids,
        target,
        norm,
        total if with_total else None,
    )


def gradient_of(pair, products, ids, target, norm, total):
    return FactoredGradient(pair / 4, ids, target, norm, total, products, D, scaled=0.7)


def twins(monkeypatch, function, *arguments):
    """What both forms answer, with what they wrote into their arguments."""
    answers = []
    for compiled in (True, False):
        own = [copy.deepcopy(a) for a in arguments]
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "gemm", lambda: None)
            found = function(*own)
        found = list(found) if isinstance(found, tuple) else [found] if found is not None else [None]
        answers.append([*found, *own])
    return answers


def assert_same(both, dtype, skip=()):
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for place, (ours, theirs) in enumerate(zip(*both, strict=True)):
        if place not in skip and ours is not None:
            if isinstance(ours, tuple | FactoredGradient):
                ours, theirs = (
                    tuple(vars(a).values()) if isinstance(a, FactoredGradient) else a for a in (ours, theirs)
                )
                assert_same((ours, theirs), dtype)
                continue
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("with_inverse", [True, False])
def test_answer(monkeypatch, threads, dtype, width, with_inverse):
    stacked, factor, pair, _, ids, *_ = batch(dtype, width, False)
    hidden = pair[:N, :D].T.contiguous().T  # not contiguous
    columns = AT.end if with_inverse else AT.inverse
    both = twins(monkeypatch, kernels.answer, hidden, stacked, factor, ids, columns)
    used = stacked.any(1)[:columns]
    for found in both:
        assert found[1].shape == (N, columns)
        found[0], found[1] = found[0][:N, :D], found[1][:, used]  # the rest is room, not yet written
    assert_same(both, dtype)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize("records", [True, False])
def test_hidden_gradient(monkeypatch, threads, dtype, width, with_total, records):
    stacked, factor, pair, products, *rest = batch(dtype, width, with_total)
    both = twins(monkeypatch, kernels.hidden_gradient, pair, products, stacked, factor, *rest, records)
    assert_same(both, dtype)
    assert torch.equal(both[0][1], pair) != records


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("with_total", [True, False])
def test_row_matrices(monkeypatch, threads, dtype, width, with_total):
    stacked, factor, *rest = batch(dtype, width, with_total)
    gradient = gradient_of(*rest)
    both = twins(monkeypatch, update.row_matrices, stacked, factor, gradient, RATE)
    assert_same(both, dtype)
    gradient.target[5] = torch.inf
    assert not torch.tensor(update.row_matrices(stacked, factor, gradient, RATE).probe).isfinite()
    gradient.pair[2, 3] = torch.nan
    assert not torch.tensor(update.row_matrices(stacked, factor, gradient, RATE)[1:4]).isfinite().all()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("with_total", [True, False])
def test_easy_steps_are_made_at_once(threads, dtype, width, with_total):
    """As `update` makes them; and no other is."""
    rate, easy = 1e-5, update.Easy(0.9, 0.1)
    results = []
    for at_once in (easy, None):
        stacked, factor, *rest = batch(dtype, width, with_total)
        gradient = gradient_of(*rest)
        gradient.norm.abs_()
        rows = update.row_matrices(stacked, factor, gradient, rate, at_once)
        assert rows.applied == (at_once is not None)
        if not rows.applied:
            update.update(stacked, factor, gradient, rate, rows, None)
        results.append((stacked, factor))
    assert_same(results, dtype)

    stacked, factor, *rest = batch(dtype, width, with_total)
    before = stacked.clone(), factor.clone()

    def refused(name=None, value=0.0, easy=easy, rate=rate):
        gradient = gradient_of(*rest)
        gradient.norm = gradient.norm.abs()
        if name is not None:
            part = getattr(gradient, name).clone()
            part.view(-1)[5] = value
            setattr(gradient, name, part)
        assert not update.row_matrices(stacked, factor, gradient, rate, easy).applied
        assert all(torch.equal(a, b) for a, b in zip(before, (stacked, factor), strict=True))

    refused("norm", -1.0)  # a direction that grows
    refused("norm", torch.nan)
    refused("target", torch.inf)
    refused("pair", torch.nan)
    refused(easy=update.Easy(0.9, 1e-9))  # a long series
    refused(easy=update.Easy(1e-9, 0.1))  # a large trace
    refused(rate=1.0)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize("size", [None, 0.0, 1e-5, 0.05, 0.5])
def test_update(monkeypatch, threads, dtype, width, with_total, size):
    """With a solution that is given, or by a series of whatever length a system that is not symmetric needs."""
    stacked, factor, *rest = batch(dtype, width, with_total)
    system, inner, solution = randoms((N, N), (N, N), (N, D), dtype=dtype)
    if size is not None:
        system *= size / system.norm()
        solution = None
    rows = update.RowMatrices(torch.stack([system, inner]), 0.0, 0.0, float(system.norm()), 0.0)
    both = twins(monkeypatch, update.update, stacked, factor, gradient_of(*rest), RATE, rows, solution)
    for found in both:
        found[3] = None  # the products are used up
    assert_same(both, dtype)
    gram = both[0][1][:D]
    assert torch.equal(gram, gram.T)
    assert not torch.equal(both[0][2], factor)


@pytest.mark.parametrize("size", [0.0, 1e-5, 0.05, 0.5])
def test_solve_by_series(dtype, size):
    system, right = randoms((N, N), (N, D), dtype=dtype)
    system *= size / system.norm()
    rows = update.RowMatrices(torch.stack([system, system]), 0.0, 0.0, float(system.norm()), 0.0)
    exact = torch.linalg.solve(torch.eye(N) - system.double(), right.double())
    found = update.solve_by_series(rows, right)
    assert float((found - exact).abs().max()) < 32 * torch.finfo(dtype).eps


def test_add_columns(monkeypatch, threads, dtype):
    """More rows than one piece holds, of which some are left alone, with and without any that are not."""
    monkeypatch.setattr(update, "GATHERED", 7 * D)
    factor, change = randoms((4000, D), (3, D), dtype=dtype)
    columns, least = torch.tensor([4, 0, 69]), torch.tensor([1.0, 2.0, 0.5], dtype=dtype)
    some = factor[:, columns]
    expected = torch.where((some.abs() > least).any(1)[:, None], factor + some @ change, factor)
    both = twins(monkeypatch, update.add_columns, factor, columns, change, least)
    assert_same(both, dtype)
    torch.testing.assert_close(both[0][1], expected, rtol=1e-4, atol=1e-4)
    assert 0 < int((both[0][1] == factor).all(1).sum()) < 4000
    update.add_columns(factor, columns, change, torch.full_like(least, torch.inf))
    assert_same([[factor], [randoms((4000, D), dtype=dtype)[0]]], dtype)


@pytest.mark.parametrize("loss", [SquaredError(), TaylorSoftmax()], ids=repr)
def test_training_is_the_same_either_way(monkeypatch, threads, loss):
    weights = []
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "gemm", kernels.gemm if compiled else lambda: None)
        torch.manual_seed(0)
        layer = FactoredOutput(D, V, loss=loss, bias=True, dtype=torch.float64)
        optimizer = FactoredSGD(layer, 0.1, weight_decay=0.01)
        for hidden in torch.randn(20, N, D, dtype=torch.float64):
            optimizer.zero_grad()
            ids, counts = torch.randint(V, (N, 4)), torch.rand(2, N, dtype=torch.float64)
            layer(hidden / 4, ids[:, ::2], counts.T).backward()  # neither is contiguous
            optimizer.step()
        weights.append(layer.weight)
    torch.testing.assert_close(*weights, rtol=1e-11, atol=1e-11)
