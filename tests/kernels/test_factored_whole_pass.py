"""The compiled training pass makes what the plain functions do one after the other, and leaves their record."""

import subprocess
import sys

import pytest
import torch

from lastlayer import FactoredOutput, FactoredSGD, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.functional.spherical import SphericalLoss, built_in
from lastlayer.kernels import factored as kernels
from lastlayer.kernels.factored_gradient import Columns
from lastlayer.layers import factored_pass

pytest.importorskip("numba")
if kernels.gemm() is None:
    pytest.skip("PyTorch's BLAS was not found", allow_module_level=True)

N, D, V = 24, 70, 50
LOSSES = [SquaredError(), SphericalSoftmax(0.2), TaylorSoftmax(), ZLoss(1.5, 0.3)]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_NUMBERS", 1)


@pytest.fixture
def passes(monkeypatch):
    """Whether each pass of a layer was made by one compiled call."""
    found = []

    def noted(*given):
        made = kernels.whole_pass(*given)
        found.append(made is not None)
        return made

    monkeypatch.setattr(factored_pass, "whole_pass", noted)
    return found


def a_layer(loss=LOSSES[1], **settings):
    torch.manual_seed(0)
    layer = FactoredOutput(D, V, loss=loss, **{"dtype": torch.float64, **settings})
    return layer, FactoredSGD(layer, 0.05)


def a_batch(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype) / 4
    return hidden.requires_grad_(), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses(loss):
    """Compiled and plain derivatives, where all outputs are alike or one is not finite, too."""
    from lastlayer.kernels.factored_losses import row_derivatives

    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    outputs[4], outputs[5], outputs[6, 20], outputs[7, 0] = 0.7, 0, torch.inf, torch.nan
    weights = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    weights[1, 2] = 0
    statistics = outputs[:, :3], weights, outputs.square().sum(1), outputs.sum(1)
    expected = loss.derivatives(*statistics, 50)
    kind, one, two, uses_sum = built_in(loss)
    assert uses_sum == loss.uses_sum
    for n, (scores, counts, norm, total) in enumerate(
        zip(*(part.numpy().copy() for part in statistics), strict=True)
    ):
        own, by_norm, by_total = row_derivatives(kind, one, two, scores, counts, norm, total, 50)
        found = [own, *scores, by_norm] + [by_total] * uses_sum
        theirs = [expected.row_loss[n], *expected.by_score[n], expected.by_norm[n]]
        theirs += [expected.by_total[n]] if uses_sum else []
        torch.testing.assert_close(
            torch.tensor(found), torch.stack(theirs), rtol=1e-12, atol=1e-14, equal_nan=True
        )


def test_losses_of_ones_own_are_not_built_in():
    class Scaled(SquaredError):
        def row_loss(self, *given):
            return 2 * super().row_loss(*given)

    assert built_in(Scaled()) is None
    assert issubclass(Scaled, SphericalLoss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize(("width", "with_inverse", "mean"), [(1, True, True), (3, True, False), (1, False, False)])
def test_whole_pass(loss, dtype, width, with_inverse, mean):
    state = a_layer(loss, dtype=dtype)[0].state
    hidden = a_batch(dtype)[0].detach().view(2, -1, D)
    ids = torch.randint(V, (2, N // 2, width), generator=torch.Generator().manual_seed(4))
    weights = torch.rand(N, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    at = Columns.of(D)
    columns, given = at.end if with_inverse else at.inverse, (state.stacked, state.factor)
    made = kernels.whole_pass(hidden, ids, weights if width > 1 else None, *given, built_in(loss), mean, columns)

    weights, flat = weights if width > 1 else torch.ones_like(weights), ids.view(N, width)
    read = kernels.answer(hidden.reshape(N, D), *given, flat, columns)
    found, part = loss.derivatives(read.scores, weights, read.squared_norm, read.total, V), 1 / N if mean else 1
    target, norm = (part * found.by_score).to(dtype), (part * found.by_norm).to(dtype)
    total = None if found.by_total is None else (part * found.by_total).to(dtype)
    gradient = kernels.hidden_gradient(read.pair, read.products, *given, flat, target, norm, total, True)
    pairs = [(made.loss, (part * found.row_loss.sum()).to(dtype)), (made.gradient, gradient.view(hidden.shape))]
    left = made.record
    pairs += [(left.hidden, read.pair[:N, :D]), (left.both, read.pair[N:, :D]), (left.ids, flat)]
    pairs += [(left.target, target), (left.norm, norm), (left.products[:, :D], gradient)]
    pairs += [
        (left.mapped, read.products[:, at.map : at.map + D]),
        (left.shared, read.products[:, at.shared :][:, :2]),
    ]
    pairs += [] if total is None else [(left.total, total)]
    pairs += [(left.right, read.products[:, at.inverse :][:, :D])] if with_inverse else []
    assert (left.total is None) == (total is None)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_what_is_made_ahead(passes):
    """The usual pass is; one of rows, of a loss of one's own, or of targets that are ignored is not."""
    hidden, targets = a_batch()
    layer, optimizer = a_layer(bias=True)
    layer(hidden, targets).backward()
    layer(hidden.view(2, -1, D), targets.view(2, -1)).backward()
    layer(hidden, targets[:, None].expand(N, 2), torch.ones(N, 2)).backward()
    assert passes == [True] * 3
    optimizer.step()
    optimizer.zero_grad()
    layer(hidden, torch.where(targets > 9, -100, targets)).backward()
    assert passes == [True] * 3 + [False]
    for wrong in (V, -1):
        with pytest.raises(IndexError, match=f"got {wrong}"):
            layer(hidden, torch.where(targets > 9, wrong, targets))
    layer.reduction = "none"
    layer(hidden, targets).sum().backward()
    with torch.no_grad():
        layer(hidden, targets)
    layer.eval()(hidden, targets)
    assert not any(passes[3:])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, -0.5, 3.0])
def test_any_upstream_gradient(monkeypatch, passes, reduction, factor):
    """Whatever the order of `autograd.grad` and `backward`; the step is that of a pass that is made row by row."""
    results = []
    for ahead in (True, False):
        monkeypatch.setattr(
            "lastlayer.layers.factored.whole_loss", factored_pass.whole_loss if ahead else lambda *_: None
        )
        layer, optimizer = a_layer(reduction=reduction)
        seen = []
        for seed in range(3):
            hidden, targets = a_batch(seed=seed)
            optimizer.zero_grad()
            loss = factor * layer(hidden, targets)
            seen += torch.autograd.grad(loss, hidden, retain_graph=True)
            loss.backward(retain_graph=True)
            seen += [hidden.grad.clone(), *torch.autograd.grad(2 * loss, hidden, retain_graph=True)]
            layer.anchor.grad *= 0.5  # as a loss scaler does
            other, places = a_batch(seed=9)
            layer(other, places).backward()
            seen += [other.grad, *torch.autograd.grad(loss, hidden, retain_graph=True)]
            optimizer.step()
            with pytest.raises(RuntimeError, match="changed by a step"):
                torch.autograd.grad(loss, hidden)
        results.append([layer.weight, *seen])
    assert passes
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_pass_that_could_not_be_recorded_can_be_again():
    """After `zero_grad`, which the error asked for."""
    for reduction in ("mean", "none"):
        layer, optimizer = a_layer(reduction=reduction)
        hidden, targets = a_batch()
        layer(hidden, targets).sum().backward()
        optimizer.step()
        hidden.grad = None
        loss = layer(hidden, targets).sum()
        with pytest.raises(RuntimeError, match="without zero_grad"):
            loss.backward(retain_graph=True)
        optimizer.zero_grad()
        (expected,) = torch.autograd.grad(layer(hidden, targets).sum(), hidden)
        loss.backward()
        torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-14)


def test_twice_differentiated():
    layer, optimizer = a_layer()
    hidden, targets = a_batch()
    (gradient,) = torch.autograd.grad(hidden.sum() * layer(hidden, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    del optimizer


def test_refilled_targets_do_not_change_the_step():
    weights = []
    for refills in (False, True):
        layer, optimizer = a_layer()
        hidden, targets = a_batch()
        layer(hidden, targets).backward()
        if refills:
            targets.zero_()
        optimizer.step()
        weights.append(layer.weight)
    assert torch.equal(*weights)


def test_a_refused_step_leaves_all_layers_alone():
    """Of two layers in one optimizer, where the second would be singular."""
    (one, _), (two, _) = a_layer(SquaredError()), a_layer(SquaredError())
    optimizer = FactoredSGD([{"params": one, "lr": 1e-3}, {"params": two, "lr": 1.0}], lr=0.0)
    hidden, targets = a_batch()
    critical = 0.5 * N / float(torch.linalg.eigvalsh(hidden.detach().T @ hidden.detach())[-1])
    optimizer.param_groups[1]["lr"] = critical
    for layer in (one, two):
        layer(hidden, targets).backward()
    before = [layer.state.stacked.clone() for layer in (one, two)] + [
        layer.state.factor.clone() for layer in (one, two)
    ]
    with pytest.raises(ValueError, match="singular"):
        optimizer.step()
    after = [layer.state.stacked for layer in (one, two)] + [layer.state.factor for layer in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=0)


def test_where_numba_may_write_nowhere():
    """The kernels are compiled for this process only."""
    code = """
from numba.core.caching import CompileResultCacheImpl
CompileResultCacheImpl._locator_classes = []
import torch
from lastlayer import FactoredOutput, FactoredSGD
layer = FactoredOutput(64, 500)
optimizer = FactoredSGD(layer, lr=0.1)
before = layer.weight.clone()
layer(torch.randn(64, 64), torch.arange(64)).backward()
optimizer.step()
assert not torch.equal(layer.weight, before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
