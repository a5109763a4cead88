"""`linear_cross_entropy` is `F.cross_entropy` of a linear layer: values, gradients, dtypes, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lastlayer import LogitMap, SoftCap
from lastlayer.functional import linear_chunks, linear_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, the last one not full."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 3 * 19 * 8)


class Scaled(LogitMap):
    """A map with two parameters, one frozen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(0.1, dtype=torch.float64), requires_grad=False)

    def forward(self, logits):
        return logits + self.scale.abs() * torch.sinh(logits / 4 + self.shift)


def leaves(dtype=torch.float64, rows=11, classes=19, width=5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    targets = torch.randint(classes, (rows,), generator=generator)
    return draw(rows, width), draw(classes, width), draw(classes), targets


def reference(hidden, weight, targets, *, bias, logit_map, z_loss, class_weights, **options):
    logits = F.linear(hidden, weight, bias)
    logits = logits if logit_map is None else logit_map(logits)
    loss = F.cross_entropy(logits, targets, weight=class_weights, **options)
    kept = targets != options["ignore_index"]
    square = z_loss * logits.logsumexp(-1).square() * kept
    return loss + {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[options["reduction"]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("with_bias", "with_map", "smoothing", "z_loss", "weighted"),
    list(itertools.product([False, True], [False, True], [0.0, 0.2], [0.0, 0.05], [False, True])),
)
def test_equals_cross_entropy(reduction, with_bias, with_map, smoothing, z_loss, weighted):
    hidden, weight, bias, targets = leaves()
    targets[4:7] = -1
    logit_map = Scaled() if with_map else None
    options = {
        "bias": bias if with_bias else None,
        "logit_map": logit_map,
        "label_smoothing": smoothing,
        "z_loss": z_loss,
        "class_weights": torch.linspace(0.1, 3, 19, dtype=torch.float64) if weighted else None,
        "ignore_index": -1,
        "reduction": reduction,
    }
    inputs = [hidden, weight, *([bias] if with_bias else []), *([logit_map.scale] if logit_map else [])]
    for leaf in inputs:
        leaf.requires_grad_()
    losses = [f(hidden, weight, targets, **options) for f in (linear_cross_entropy, reference)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-2, 3, losses[0].numel(), dtype=torch.float64).reshape(losses[0].shape)
    ours, theirs = (torch.autograd.grad(loss, inputs, upstream) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_shapes_and_layouts():
    hidden, weight, _, targets = leaves(rows=12)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    shaped = hidden.reshape(2, 6, 5).transpose(0, 1)
    loss = linear_cross_entropy(shaped, weight, targets.reshape(2, 6).T, reduction="none")
    torch.testing.assert_close(loss, expected.reshape(2, 6).T)
    strided = weight.T.contiguous().T
    torch.testing.assert_close(linear_cross_entropy(hidden, strided, targets), expected.mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction):
    """All ignored: the answer and the gradient of `F.cross_entropy`."""
    hidden, weight, _, targets = leaves()
    targets[:] = -100
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    theirs = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not torch.autograd.grad(ours, weight)[0].any()


def test_frozen_leaves_get_no_work(monkeypatch):
    hidden, weight, _, targets = leaves()
    asked = []
    want = linear_chunks.LinearChunks.want
    monkeypatch.setattr(linear_chunks.LinearChunks, "want", lambda self, w: (asked.append(w), want(self, w))[1])
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert asked == [(True, False, False)]
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    linear_cross_entropy(hidden.detach(), weight, targets)
    assert len(asked) == 1, "gradients formed that nobody can ask for"


def test_backward_again():
    """A retained graph answers the same again; the first answer is not changed by the second."""
    hidden, weight, _, targets = leaves()
    weight.requires_grad_()
    loss = 3 * linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    torch.testing.assert_close(second, kept)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, weight)


def test_third_derivative():
    hidden, weight, _, targets = leaves()

    def third(call):
        leaf = hidden.clone().requires_grad_()
        found = call(leaf)
        for _ in range(3):
            (slope,) = torch.autograd.grad(found, leaf, create_graph=True)
            found = slope.square().sum()
        return slope

    ours = third(lambda h: linear_cross_entropy(h, weight, targets))
    torch.testing.assert_close(ours, third(lambda h: F.cross_entropy(h @ weight.T, targets)))


def test_hidden_computed_from_the_weight():
    """The gradient of the weight at fixed hidden states, though these depend on it."""
    _, weight, _, targets = leaves()
    found = []
    for call in (linear_cross_entropy, lambda h, w, t: F.cross_entropy(h @ w.T, t)):
        leaf = weight.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(leaf[targets].tanh(), leaf, targets), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(monkeypatch, dtype, autocast):
    """No further from float64 than `F.cross_entropy` of `F.linear` in the same dtype."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 32 * 300 * 2)
    stored = torch.float32 if autocast else dtype
    hidden, weight, bias, targets = leaves(stored, rows=64, classes=300, width=32)
    scale = 0.3
    answers = []
    for kind in ("exact", "plain", "ours"):
        cast = (lambda x: x.double()) if kind == "exact" else (lambda x: x)
        inputs = [cast((scale * x).detach()).requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", dtype=dtype, enabled=autocast and kind != "exact"):
            if kind == "ours":
                loss = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
                assert loss.dtype == torch.float32
            else:
                logits = F.linear(*inputs)
                loss = F.cross_entropy(logits if kind == "exact" else logits.float(), targets)
        gradients = torch.autograd.grad(loss, inputs)
        assert all(g.dtype == x.dtype for g, x in zip(gradients, inputs, strict=True))
        answers.append([loss.detach().double(), *(g.double() for g in gradients)])
    exact, plain, ours = answers
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        norm = float(truth.norm())
        assert (mine - truth).norm() <= 1.2 * (theirs - truth).norm() + 1e-4 * norm


def test_huge_logits_are_finite():
    hidden, weight, _, targets = leaves(torch.float32)
    hidden = (1e4 * hidden).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_class_that_is_ruled_out():
    """A bias of minus infinity gives a class no probability and no gradient, as in `F.cross_entropy`."""
    hidden, weight, bias, targets = leaves()
    bias[18], targets = float("-inf"), targets.clamp(max=17)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T + bias, targets))
    gradient = torch.autograd.grad(loss, weight)[0]
    assert gradient.isfinite().all()
    assert not gradient[18].any()


@pytest.mark.parametrize(
    ("error", "argument", "change"),
    [
        (ValueError, "hidden", {"hidden": torch.randn(11, 4)}),
        (TypeError, "hidden", {"hidden": torch.randn(11, 5).bfloat16()}),
        (TypeError, "weight", {"weight": torch.ones(19, 5, dtype=torch.int64)}),
        (ValueError, "weight", {"weight": torch.randn(5)}),
        (ValueError, "weight", {"weight": torch.randn(0, 5)}),
        (ValueError, "bias", {"bias": torch.randn(18)}),
        (TypeError, "targets", {"targets": torch.zeros(11)}),
        (IndexError, "targets", {"targets": torch.full((11,), 19)}),
        (ValueError, "class_weights", {"class_weights": torch.ones(18)}),
        (TypeError, "class_weights", {"class_weights": [1.0] * 19}),
        (ValueError, "label_smoothing", {"label_smoothing": 1.5}),
        (ValueError, "reduction", {"reduction": "average"}),
        (TypeError, "logit_map", {"logit_map": torch.tanh}),
    ],
)
def test_bad_input(error, argument, change):
    hidden, weight, _, targets = leaves(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=argument):
        linear_cross_entropy(**arguments)


def test_saturated_map_still_counts():
    hidden, weight, _, targets = leaves(torch.float32)
    loss = linear_cross_entropy(100 * hidden, weight, targets, logit_map=SoftCap(5.0))
    expected = F.cross_entropy(5 * torch.tanh(100 * hidden @ weight.T / 5), targets)
    torch.testing.assert_close(loss, expected)


def test_second_derivative_of_soft_targets():
    hidden, weight, bias, _ = leaves()
    shares = torch.rand(len(hidden), len(weight), dtype=torch.float64)
    found = []
    for call in (
        lambda h: linear_cross_entropy(h, weight, shares, bias=bias),
        lambda h: F.cross_entropy(F.linear(h, weight, bias), shares),
    ):
        found.append(torch.autograd.functional.hessian(call, hidden.detach()))
        found.append(torch.func.hessian(call)(hidden.detach()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
