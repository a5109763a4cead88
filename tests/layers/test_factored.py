"""FactoredOutput with FactoredSGD against plain SGD on a dense weight, to rounding."""

import pytest
import torch
from torch import nn

from lastlayer import (
    FactoredOutput,
    FactoredSGD,
    Int8Preview,
    ScoreTopK,
    ScreenedSoftmax,
    SphericalSoftmax,
    SquaredError,
    SVDPreview,
    SVDSoftmax,
    TaylorSoftmax,
    ZLoss,
)
from lastlayer.functional import spherical_loss
from lastlayer.functional.gram import principal_rotation
from lastlayer.functional.spherical import SphericalLoss
from lastlayer.layers.factored_step import gradient_norm
from lastlayer.screening import svd_preview

D, V = 12, 200
LOSSES = [SquaredError(), SphericalSoftmax(), TaylorSoftmax(), ZLoss(alpha=1.5, beta=0.3)]
RATES = dict(zip(LOSSES, (0.004, 0.01, 0.05, 0.05), strict=True))


class Twins:
    """A factored layer and a dense weight under the same loss, each with its own SGD."""

    def __init__(self, loss, lr=None, *, bias=False, reduction="sum", dtype=torch.float64, d=D, v=V, **settings):
        torch.manual_seed(0)
        self.loss = loss
        lr = RATES[loss] if lr is None else lr
        self.layer = FactoredOutput(d, v, loss=loss, bias=bias, reduction=reduction, dtype=dtype)
        self.optimizer = FactoredSGD(self.layer, lr, **settings)
        self.weight = self.layer.weight.clone().requires_grad_()
        self.bias = self.layer.bias.clone().requires_grad_() if bias else None
        self.parameters = [self.weight] + ([self.bias] if bias else [])
        self.max_norm = settings.pop("max_norm", None)
        self.dense = torch.optim.SGD(self.parameters, lr, **settings)

    def backward(self, hidden, targets, weights=None):
        """Loss and gradient of hidden of both, compared."""
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        ours = self.layer(leaves[0], targets, weights)
        theirs = spherical_loss(
            leaves[1],
            self.weight,
            targets,
            self.bias,
            loss=self.loss,
            target_weights=weights,
            reduction=self.layer.reduction,
        )
        ours.sum().backward()
        theirs.sum().backward()
        return ours.detach(), theirs.detach(), leaves[0].grad, leaves[1].grad

    def step(self):
        self.optimizer.step()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.dense.step()
        self.optimizer.zero_grad()
        self.dense.zero_grad()

    def compare(self, tolerance=1e-10):
        assert worst(self.layer.weight, self.weight.detach()) < tolerance
        if self.bias is not None:
            assert worst(self.layer.bias, self.bias.detach()) < tolerance
        drift = self.layer.consistency()
        assert max(drift.inverse, drift.gram, drift.total) < tolerance

    def train(self, batches, tolerance=1e-10):
        for batch in batches:
            loss, expected, grad, expected_grad = self.backward(*batch)
            assert worst(loss, expected) < tolerance
            assert worst(grad, expected_grad) < tolerance
            self.step()
        self.compare(tolerance)


def worst(actual, expected):
    """The largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def batches(steps, rows=9, k=3, d=D, v=V, scale=0.5, dtype=torch.float64, seed=1):
    """Random steps in which classes repeat across rows and twice within one, and some ids are padding."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        hidden = scale * torch.randn(rows, d, generator=generator, dtype=torch.float64)
        ids = torch.randint(v, (rows, k), generator=generator)
        weights = torch.rand(rows, k, generator=generator, dtype=torch.float64)
        ids[1:3] = ids[0]
        if k > 1:
            ids[0, 1] = ids[0, 0]
            ids[3, 1:] = -100
            ids[4] = -100
        yield hidden.to(dtype), ids, weights.to(dtype)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [9, 40])
def test_equals_dense_sgd(loss, bias, rows):
    """L1, on both sides of N = d."""
    Twins(loss, lr=RATES[loss] * 9 / rows, bias=bias).train(batches(200, rows))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.2}, {"max_norm": 0.5}, {"weight_decay": 0.2, "max_norm": 0.5}], ids=str
)
@pytest.mark.parametrize("rows", [9, 40])
def test_decay_clipping_and_schedules(loss, settings, rows):
    """L2."""
    twins = Twins(loss, bias=True, reduction="mean", **settings)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in (twins.optimizer, twins.dense)]
    for batch in batches(60, rows):
        twins.train([batch])
        for schedule in schedules:
            schedule.step()
    assert twins.optimizer.param_groups[0]["lr"] < RATES[loss]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_class_a_row(loss):
    twins = Twins(loss, reduction="mean", lr=9 * RATES[loss])
    twins.train((hidden, ids[:, 0]) for hidden, ids, _ in batches(100, k=1))


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


def test_nothing_changes_without_a_gradient():
    """L6: a zero rate, `eval()`, no rows, and nothing but ignored rows leave the state as it was."""
    twins = Twins(TaylorSoftmax(), reduction="mean")
    twins.train(batches(5))
    hidden, ids, _ = next(batches(1))
    before = snapshot(twins.layer)
    for rows, targets in ((hidden[:0], ids[:0, 0]), (hidden, torch.full_like(ids, -100))):
        loss = twins.layer(rows, targets)
        assert loss.isnan()
        loss.backward()
        twins.optimizer.step()
        twins.optimizer.zero_grad()
    twins.layer.eval()
    leaf = hidden.clone().requires_grad_()
    loss = twins.layer(leaf, ids)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad.any()
    twins.layer.train()
    with torch.no_grad():
        twins.layer(hidden, ids)
    twins.optimizer.param_groups[0]["lr"] = 0.0
    twins.layer(hidden, ids).backward()
    twins.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(twins.layer), strict=True))


def snapshot(layer):
    state = layer.state
    parts = [state.factor, state.square, state.offset, *([] if state.total is None else [state.total])]
    return [part.clone() for part in parts]


def test_weight_is_an_ordinary_one():
    """It loads into `nn.Linear` and back, and training goes on from it like the uninterrupted run."""
    twins = Twins(SphericalSoftmax(), bias=True)
    twins.train(batches(50))
    linear = nn.Linear(D, V, dtype=torch.float64)
    linear.load_state_dict(twins.layer.state_dict())
    hidden = next(batches(1))[0]
    assert worst(linear(hidden).detach(), twins.layer.scores(hidden)) < 1e-12
    resumed = FactoredOutput(D, V, bias=True, dtype=torch.float64, reduction="sum")
    resumed.load_state_dict(linear.state_dict())
    twins.layer = resumed
    twins.optimizer = FactoredSGD(resumed, RATES[twins.loss])
    twins.train(batches(50, seed=8))

    with pytest.raises(RuntimeError, match=r"size|shape"):
        resumed.load_state_dict(nn.Linear(D, V + 1, dtype=torch.float64).state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        resumed.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected"):
        FactoredOutput(D, V).load_state_dict(linear.state_dict())


def test_scores_without_probabilities():
    for loss in (SquaredError(), ZLoss()):
        layer = FactoredOutput(D, V, loss=loss, bias=True)
        hidden = torch.randn(2, 3, D)
        answer = layer.topk(hidden, 4)
        expected = (hidden @ layer.weight.T + layer.bias).topk(4)
        assert isinstance(answer, ScoreTopK)
        torch.testing.assert_close(answer.scores, expected.values)
        assert torch.equal(answer.indices, expected.indices)
        weight, bias, logit_map = layer.linear_head()
        assert (weight.shape, bias.shape, logit_map) == ((V, D), (V,), None)
        with pytest.raises(TypeError, match="no probabilities"):
            layer.log_prob(hidden)
        with pytest.raises(TypeError, match="no probabilities"):
            layer.target_log_prob(hidden, torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="no probabilities"):
            layer.sample(hidden)
    with pytest.raises(TypeError, match="linear_head"):
        FactoredOutput(D, V).linear_head()


def test_half_precision_computes_in_single():
    twins = Twins(SphericalSoftmax(), dtype=torch.bfloat16, reduction="mean", lr=0.2)
    twins.weight = twins.weight.detach().float().requires_grad_()
    dense = torch.optim.SGD([twins.weight], 0.2)
    for hidden, ids, _ in batches(30, k=1, dtype=torch.bfloat16):
        loss = twins.layer(hidden, ids)
        expected = spherical_loss(hidden.float(), twins.weight, ids, loss=twins.loss)
        assert loss.dtype == torch.float32
        assert worst(loss.detach(), expected.detach()) < 1e-5
        for value, optimizer in ((loss, twins.optimizer), (expected, dense)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert worst(twins.layer.state.weight(), twins.weight.detach()) < 1e-5

    layer = FactoredOutput(D, V)
    FactoredSGD(layer, 0.1)
    hidden, ids, _ = next(batches(1, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(hidden, ids)
    assert torch.equal(inside, layer(hidden, ids))
    with pytest.raises(TypeError, match="float16"):
        layer.half()(hidden.half(), ids)


def test_moves_between_dtypes():
    twins = Twins(ZLoss(), lr=0.05, bias=True)
    twins.train(batches(20))
    weight = twins.layer.weight
    single = twins.layer.to(torch.float32)
    assert torch.equal(single.weight, weight.float())
    assert max(single.consistency()[:3]) < 1e-6
    before = snapshot(single)
    single.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(single), strict=True))


@pytest.mark.parametrize("make", [ScreenedSoftmax, SVDSoftmax])
def test_a_screen_gets_its_rotation_for_nothing(make, monkeypatch):
    """The kept Q has the eigenvectors that an `SVDPreview` makes from the weight at O(V d^2)."""
    twins = Twins(SquaredError(), bias=True)
    twins.train(batches(40))
    layer = twins.layer
    made = []
    monkeypatch.setattr(svd_preview, "gram_matrix", lambda weight: made.append(weight) or weight.T @ weight)
    settings = {"window": 6} if make is SVDSoftmax else {"preview": SVDPreview(6)}
    screen = make.from_layer(layer, **settings, candidates=30, exact=True)
    assert not made
    hidden = next(batches(1))[0]
    assert torch.equal(screen.topk(hidden, 5).indices, layer.topk(hidden, 5).indices)
    kept = principal_rotation(layer.gram()).weight_side
    from_weight = SVDPreview(6).rotation(layer.weight).weight_side
    assert worst((kept.T @ from_weight).abs(), torch.eye(D, dtype=torch.float64)) < 1e-8
    screen.refresh()  # the weight may have changed since: now Q is made
    assert len(made) == 2
    with pytest.raises(ValueError, match="gram"):
        ScreenedSoftmax(layer.weight, preview=SVDPreview(6), candidates=30, gram=torch.eye(3))
    ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=30)  # has no use for it


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_derivatives_in_closed_form(loss):
    """Those of each loss equal autograd's, outputs that are all alike (no variance) among them."""
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    outputs[4] = 0.7
    outputs[5] = 0
    weights = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    statistics = (outputs[:, :3], weights, outputs.square().sum(1), outputs.sum(1), 50)
    closed, expected = loss.derivatives(*statistics), SphericalLoss.derivatives(loss, *statistics)
    assert (closed.by_total is None) == (expected.by_total is None) == (not loss.uses_sum)
    for ours, theirs in zip(closed, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


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
