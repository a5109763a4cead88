"""Probabilities that are exactly 0: what every call returns there, and the package that finds the thresholds."""

import copy
import sys

import entmax as package
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lastlayer import (
    Entmax,
    FullSoftmax,
    LogitMap,
    Normalizer,
    ScreenedSoftmax,
    Sigsoftmax,
    Sparsemax,
    TopKSoftmax,
)
from lastlayer.distributed import shard
from oracles import entmax, full_softmax

V, D, N = 40, 5, 9
NORMALIZERS = {
    "sparsemax": Sparsemax(),
    "1.5-entmax": Entmax(),
    "1.25-entmax": Entmax(1.25),
    "top 4": TopKSoftmax(4),
}
ALL = pytest.mark.parametrize("name", NORMALIZERS)


def make(name="sparsemax", **options):
    torch.manual_seed(0)
    layer = FullSoftmax(D, V, normalizer=NORMALIZERS[name], dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.normal_(std=2.0)
    return layer, torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))


def rows_of(layer, hidden):
    return hidden @ layer.weight.T + layer.bias


@ALL
def test_every_call_where_classes_have_probability_0(name):
    layer, hidden, _ = make(name)
    log_prob = layer.log_prob(hidden)
    none = log_prob == -torch.inf
    assert none.any(1).all()
    assert torch.allclose(log_prob.exp().sum(1), torch.ones(N, dtype=torch.float64), rtol=1e-12)
    everything = torch.arange(V).expand(N, V)
    assert torch.equal(layer.score(hidden, everything), log_prob)
    for target in range(V):
        assert torch.equal(layer.target_log_prob(hidden, torch.full((N,), target)), log_prob[:, target])
    best = layer.topk(hidden, V)
    assert torch.equal(best.indices == -1, best.log_prob == -torch.inf)
    assert torch.equal((best.indices >= 0).sum(1), (~none).sum(1))
    assert not none.gather(1, layer.sample(hidden, 100)).any()
    first = layer.topk(hidden, 1).indices
    assert torch.equal(layer.topk(hidden, 1, exclude=first).log_prob, log_prob.topk(2).values[:, 1:])


@ALL
def test_nothing_is_nan_at_probability_0(name):
    """Neither a class of probability 0 nor a target of it has a gradient that is not a number."""
    layer, hidden, _ = make(name)
    hidden.requires_grad_()
    worst = layer.log_prob(hidden).argmin(1)
    for values in (layer.log_prob(hidden), layer.target_log_prob(hidden, worst), layer(hidden, worst)):
        layer.zero_grad()
        values.masked_fill(values == -torch.inf, 0).sum().backward()
        assert layer.weight.grad.isfinite().all()
    assert layer(hidden, worst).isfinite()


@pytest.mark.parametrize("name", ["sparsemax", "1.5-entmax"])
def test_equals_the_formula(name):
    layer, hidden, _ = make(name)
    torch.testing.assert_close(layer.log_prob(hidden), entmax(layer, hidden), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("sparsemax", package.sparsemax_loss),
        ("1.5-entmax", package.entmax15_loss),
        ("1.25-entmax", lambda logits, targets: package.entmax_bisect_loss(logits, targets, 1.25, n_iter=80)),
    ],
)
def test_the_loss_is_the_packages(name, loss):
    layer, hidden, targets = make(name, reduction="none")
    results = []
    for of in (layer, lambda h, t: loss(rows_of(layer, h), t)):
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        rows = of(leaf, targets)
        (rows * torch.linspace(-1, 2, N, dtype=torch.float64)).sum().backward()
        results.append([rows.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@ALL
def test_gradient_is_the_probabilities_less_the_target(name):
    normalizer = NORMALIZERS[name]
    torch.manual_seed(1)
    logits = (2 * torch.randn(3, 9, dtype=torch.float64)).requires_grad_()
    targets = logits.topk(3, 1).indices[:, 2].detach()  # where the top k softmax is the model's own
    normalizer.loss(logits, targets).sum().backward()
    expected = normalizer.log_prob(logits).exp() - torch.nn.functional.one_hot(targets, 9)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-10)
    assert gradcheck(lambda z: normalizer.log_prob(z).exp(), logits)
    assert gradgradcheck(lambda z: normalizer.loss(z, targets), logits)


@ALL
def test_a_target_far_ahead_costs_nothing(name):
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 3] = 60.0
    loss = NORMALIZERS[name].loss(logits, torch.tensor([3]))
    assert 0 <= float(loss) < 1e-20


def test_top_k_loss_is_over_the_k_and_the_target():
    layer, hidden, targets = make("top 4", reduction="none")
    logits = rows_of(layer, hidden)
    for row in range(N):
        kept = torch.unique(torch.cat([logits[row].topk(4).indices, targets[row : row + 1]]))
        expected = logits[row, kept].logsumexp(0) - logits[row, targets[row]]
        assert torch.allclose(layer(hidden, targets)[row], expected, rtol=1e-12)


@ALL
def test_barred_classes_and_a_logit_map(name):
    layer, hidden, _ = make(name, logit_map=Sigsoftmax())
    with torch.no_grad():
        layer.bias[::2] = -torch.inf
    targets = torch.arange(1, 2 * N, 2)
    assert (layer.log_prob(hidden)[:, ::2] == -torch.inf).all()
    layer(hidden, targets).backward()
    assert layer.weight.grad.isfinite().all()
    assert not layer.weight.grad[::2].any()
    if isinstance(NORMALIZERS[name], Entmax):
        left = Entmax.log_prob(NORMALIZERS[name], layer.logit_map(rows_of(layer, hidden)[:, 1::2]))
        torch.testing.assert_close(layer.log_prob(hidden)[:, 1::2], left, rtol=1e-9, atol=1e-9)


def test_top_k_of_all_classes_is_the_softmax():
    layer = FullSoftmax(D, V, normalizer=TopKSoftmax(V))
    hidden = torch.randn(N, D)
    torch.testing.assert_close(layer.log_prob(hidden), full_softmax(layer, hidden))


@ALL
def test_it_learns_in_float32(name):
    """A fresh top-k softmax learns too, as each target is among its own classes."""
    torch.manual_seed(0)
    layer = FullSoftmax(8, 20, normalizer=NORMALIZERS[name])
    targets = torch.arange(20)
    hidden = torch.randn(20, 8)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        layer(hidden, targets).backward()
        optimizer.step()
    assert torch.equal(layer.topk(hidden, 1).indices[:, 0], targets)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.log_prob(hidden), layer.log_prob(hidden))


class Squares(Normalizer):
    """`relu(z + 3) ** 2`, normalised: one of a user's own."""

    def log_prob(self, logits):
        squares = (logits + 3).relu().square()
        return (squares / squares.sum(1, keepdim=True)).log()

    def loss(self, logits, targets):
        return -self.log_prob(logits).gather(1, targets[:, None])[:, 0]


def test_a_normalizer_of_ones_own():
    layer = FullSoftmax(D, V, normalizer=Squares(), dtype=torch.float64)
    hidden = 0.1 * torch.randn(N, D, dtype=torch.float64)
    assert torch.allclose(layer.log_prob(hidden).exp().sum(1), torch.ones(N, dtype=torch.float64))
    layer(hidden, torch.arange(N)).backward()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)
    for make_one in (Entmax, Sparsemax):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lastlayer\[entmax\]'"):
            make_one()
    TopKSoftmax(3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "alpha must be above 1 and at most 2, got 1.0", lambda: Entmax(1.0)),
        (ValueError, "alpha must be above 1", lambda: Entmax(float("nan"))),
        (ValueError, "k must be at least 1, got 0", lambda: TopKSoftmax(0)),
        (TypeError, "k must be a whole number", lambda: TopKSoftmax(1.5)),
        (
            ValueError,
            "k must be at most num_classes=3, got 4",
            lambda: FullSoftmax(2, 3, normalizer=TopKSoftmax(4)),
        ),
        (TypeError, "normalizer must be a Normalizer", lambda: FullSoftmax(2, 3, normalizer="sparsemax")),
        (TypeError, "normalizer must be a Normalizer", lambda: FullSoftmax(2, 3, normalizer=LogitMap)),
        (ValueError, "z_loss must not be set with", lambda: make(z_loss=0.1)),
        (ValueError, "label_smoothing must not be set with", lambda: make(label_smoothing=0.1)),
        (ValueError, "class_weights must not be set with", lambda: make(class_weights=torch.ones(V))),
        (ValueError, "target_weights must be None", lambda: make()[0](make()[1], make()[2], torch.ones(N))),
        (TypeError, "targets must be class ids", lambda: make()[0](make()[1], torch.ones(N, V))),
        (TypeError, "no linear_head", lambda: make()[0].linear_head()),
        (TypeError, "no normalizer to be sharded", lambda: shard(make()[0])),
        (
            TypeError,
            "no linear_head",
            lambda: ScreenedSoftmax.from_layer(make()[0], preview=None, candidates=3),
        ),
    ],
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
