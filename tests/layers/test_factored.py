"""FactoredOutput with FactoredSGD against plain SGD on a dense weight, to rounding."""

import pytest
import torch
from factored_twins import LOSSES, RATES, Twins, V, batches, worst
from torch import nn

from lastlayer import (
    FactoredOutput,
    FactoredSGD,
    SphericalSoftmax,
    SquaredError,
    TaylorSoftmax,
)
from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import SphericalLoss
from lastlayer.layers.factored.step import gradient_norm


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [9, 40])
def test_equals_dense_sgd(loss, bias, rows):
    """L1, on both sides of N = d."""
    Twins(loss, lr=RATES[loss] * 9 / rows, bias=bias).train(batches(60, rows))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.2}, {"max_norm": 0.5}, {"weight_decay": 0.2, "max_norm": 0.5}], ids=str
)
@pytest.mark.parametrize("rows", [9, 40])
def test_decay_clipping_and_schedules(loss, settings, rows):
    """L2."""
    twins = Twins(loss, bias=True, reduction="mean", **settings)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in (twins.optimizer, twins.dense)]
    for batch in batches(25, rows):
        twins.train([batch])
        for schedule in schedules:
            schedule.step()
    assert twins.optimizer.param_groups[0]["lr"] < RATES[loss]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_class_a_row(loss):
    twins = Twins(loss, reduction="mean", lr=9 * RATES[loss])
    twins.train((hidden, ids[:, 0]) for hidden, ids, _ in batches(50, k=1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_upstream_gradient(reduction):
    """Rows that count negatively make D of both signs."""
    for loss in LOSSES:
        twins = Twins(loss, reduction=reduction)
        for hidden, ids, _ in batches(30, k=1):
            factor = torch.linspace(-1, 2, 9, dtype=torch.float64) if reduction == "none" else 0.7
            ids[4, 0] = -100
            (twins.layer(hidden, ids[:, 0]) * factor).sum().backward()
            dense = spherical_loss(hidden, twins.weight, ids[:, 0], loss=loss, reduction=reduction)
            (dense * factor).sum().backward()
            twins.step()
        twins.compare()


@pytest.mark.parametrize("rows", [5, 12, 40])
def test_gradients_accumulate(rows):
    """Several backwards, of any number of rows and targets, are one step."""
    twins = Twins(TaylorSoftmax(), bias=True)
    for one, two in zip(batches(40, k=2), batches(40, rows=rows, k=4, seed=5), strict=True):
        twins.backward(*one)
        twins.backward(*two)
        twins.step()
    twins.compare()


def test_one_layer_twice_in_one_graph():
    twins = Twins(SphericalSoftmax())
    for (h1, t1, _), (h2, t2, _) in zip(batches(20), batches(20, seed=6), strict=True):
        (twins.layer(h1, t1) + 2 * twins.layer(h2, t2)).backward()
        loss = spherical_loss(h1, twins.weight, t1, loss=twins.loss, reduction="sum")
        (loss + 2 * spherical_loss(h2, twins.weight, t2, loss=twins.loss, reduction="sum")).backward()
        twins.step()
    twins.compare()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_matrix_targets(layout):
    """Values of a sparse matrix, an empty row among them, and a COO entry given in two parts."""
    twins = Twins(SquaredError(), reduction="mean", lr=0.05)
    generator = torch.Generator().manual_seed(4)
    for hidden, _, _ in batches(40):
        matrix = torch.rand(9, V, generator=generator, dtype=torch.float64)
        matrix *= matrix > 0.97
        matrix[5] = 0
        if layout == torch.sparse_coo:
            indices, values = matrix.nonzero().T, matrix[matrix != 0]
            targets = torch.sparse_coo_tensor(
                torch.cat([indices, indices], 1), torch.cat([values / 2, values / 2]), matrix.shape
            )
        else:
            targets = matrix.to_sparse_csr()
        loss = twins.layer(hidden, targets)
        loss.backward()
        expected = (hidden @ twins.weight.T - matrix).square().sum() / 9
        expected.backward()
        assert worst(loss.detach(), expected.detach()) < 1e-10
        twins.step()
    twins.compare()


def test_gradient_norm_is_exact():
    """L3, from the record alone."""
    for loss in LOSSES:
        twins = Twins(loss, bias=True)
        hidden, ids, weights = next(batches(1))
        twins.backward(hidden, ids, weights)
        gradient = twins.layer._ledger.take()
        expected = torch.cat([p.grad.flatten() for p in twins.parameters]).norm()
        assert abs(gradient_norm(gradient, V) / float(expected) - 1) < 1e-12


def test_scaling_the_anchor_scales_the_step():
    """`clip_grad_norm_` over a whole model reaches the layer; zeroing in place empties it."""
    twins = Twins(SphericalSoftmax())
    hidden, ids, weights = next(batches(1))
    twins.backward(hidden, ids, weights)
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.tensor([3.0, 4.0, 0.0])
    nn.utils.clip_grad_norm_([other, *twins.layer.parameters()], 2.5)
    assert torch.allclose(other.grad, torch.tensor([1.5, 2.0, 0.0]))  # the mark does not count
    twins.weight.grad *= 2.5 / (5 + 1e-6)
    twins.step()
    twins.compare()

    twins.backward(hidden, ids, weights)
    twins.optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="without a backward"):
        twins.optimizer.step()
    twins.dense.zero_grad()
    twins.train(batches(3))


def test_parameter_groups_and_several_layers():
    torch.manual_seed(0)
    layers = [FactoredOutput(4, 30, dtype=torch.float64) for _ in range(2)]
    optimizer = FactoredSGD([{"params": layers[0], "lr": 0.5}, {"params": [layers[1]]}], lr=0.0)
    before = [layer.weight for layer in layers]
    hidden = torch.randn(5, 4, dtype=torch.float64)
    for layer in layers:
        layer(hidden, torch.arange(5)).backward()
    optimizer.step()
    assert not torch.equal(layers[0].weight, before[0])
    assert torch.equal(layers[1].weight, before[1])
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.0}
    loss = optimizer.step(lambda: (optimizer.zero_grad(), layers[0](hidden, torch.arange(5)))[1].backward())
    assert loss is None


def test_no_gradient_of_hidden_alone_is_recorded():
    """`autograd.grad` for the hidden states is no training; `backward` is, once."""
    layer = FactoredOutput(4, 30, dtype=torch.float64)
    optimizer = FactoredSGD(layer, 0.1)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = layer(hidden, torch.arange(5))
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="without a backward"):
        optimizer.step()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    optimizer.step()


def test_custom_loss_in_ten_lines():
    class Margin(SphericalLoss):
        uses_sum = True

        def row_loss(self, scores, weights, squared_norm, total, num_classes):
            mean = total / num_classes
            return (weights * (1 - scores + mean[:, None]).square()).sum(1) + 0.01 * squared_norm

    torch.manual_seed(0)
    RATES[loss := Margin()] = 0.02
    Twins(loss, bias=True).train(batches(60))


def test_derivatives_in_closed_form_equal_those_of_autograd():
    torch.manual_seed(0)
    scores, weights = torch.randn(2, 5, 3, dtype=torch.float64)
    squared_norm, total = torch.rand(2, 5, dtype=torch.float64) + 9
    for loss in LOSSES:
        found = loss.derivatives(scores, weights, squared_norm, total, 20)
        expected = SphericalLoss.derivatives(loss, scores, weights, squared_norm, total, 20)
        torch.testing.assert_close(found, expected)


def test_losses_of_ones_own_that_would_train_wrongly():
    class Total(SphericalLoss):  # reads the sum, and does not say so
        def row_loss(self, scores, weights, squared_norm, total, num_classes):
            return squared_norm - total - (weights * scores).sum(1)

    class Trained(SphericalLoss):
        scale = nn.Parameter(torch.ones(()))

        def row_loss(self, scores, weights, squared_norm, total, num_classes):
            return squared_norm - self.scale * (weights * scores).sum(1)

    for loss, said in ((Total(), "uses_sum"), (Trained(), "parameters")):
        with pytest.raises(TypeError, match=said):
            FactoredOutput(4, 20, loss=loss)(torch.ones(2, 4), torch.arange(2))
