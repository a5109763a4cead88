"""OneVsAll against PyTorch's binary cross-entropy over dense targets."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lastlayer import InBatch, LogUniform, OneVsAll, QuadraticKernel, ScreenedSoftmax, SVDPreview, Uniform
from lastlayer.functional import one_vs_all as blocks

V, D, N = 37, 5, 6
TARGETS = torch.tensor([[3, 36, -100], [0, -100, -100], [5, 5, 7], [-100, -100, -100], [9, 10, 11], [3, 0, 36]])
VALUES = torch.tensor(
    [[1.0, 0.5, 9.0], [0.25, 9.0, 9.0], [0.5, 0.5, 1.0], [9.0, 9.0, 9.0], [0.3, 1.0, 0.9], [1, 1, 1]]
)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_CLASSES", 10)
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 1)


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = OneVsAll(D, V, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def hidden_rows(rows=N, dtype=torch.float64):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(targets, values=None):
    """The (N, V) matrix of y."""
    y = torch.zeros(len(targets), V, dtype=torch.float64)
    for row, ids, own in zip(y, targets, torch.ones(targets.shape) if values is None else values, strict=True):
        for k, value in zip(ids.tolist(), own.tolist(), strict=True):
            if k >= 0:
                row[k] = 1 if values is None else row[k] + value
    return y


def naive(layer, hidden, y, kept, positive_weight=None):
    logits = F.linear(hidden, layer.weight, layer.bias)
    loss = (
        F.binary_cross_entropy_with_logits(logits, y, pos_weight=positive_weight, reduction="none").sum(1) * kept
    )
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[layer.reduction]


def gradients(loss, layer, hidden):
    layer.zero_grad()
    leaf = hidden.clone().requires_grad_()
    value = loss(leaf)
    (value * torch.linspace(0.5, 2, max(value.numel(), 1), dtype=torch.float64).view_as(value)).sum().backward()
    return [value.detach(), leaf.grad, *(p.grad.to_dense().clone() for p in layer.parameters())]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positive_weight", [None, 2.5, torch.linspace(0, 3, V)])
@pytest.mark.parametrize("values", [None, VALUES])
def test_loss_and_gradients_are_pytorchs(reduction, bias, positive_weight, values):
    options = {} if positive_weight is None else {"positive_weight": positive_weight}
    layer = make(reduction=reduction, bias=bias, **options)
    kept = (TARGETS >= 0).any(1).double()
    y = dense(TARGETS, values)
    of_positives = None if positive_weight is None else torch.ones(V, dtype=torch.float64) * positive_weight
    found = gradients(lambda h: layer(h, TARGETS, values), layer, hidden_rows())
    expected = gradients(lambda h: naive(layer, h, y, kept, of_positives), layer, hidden_rows())
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_other_forms_of_targets():
    layer = make(reduction="none")
    hidden = hidden_rows()
    y = dense(TARGETS)
    matrix = layer(hidden, y.to_sparse())
    expected = naive(layer, hidden, y, torch.ones(N).double())
    assert torch.allclose(matrix, expected)
    assert torch.allclose(layer(hidden, y.to_sparse_csr()), expected)
    single = layer(hidden.reshape(2, 3, D), TARGETS[:, :1].reshape(2, 3).clamp(min=0))
    assert torch.allclose(
        single.flatten(), naive(layer, hidden, dense(TARGETS[:, :1].clamp(min=0)), torch.ones(N))
    )
    shaped = layer(hidden.reshape(2, 3, D), TARGETS.reshape(2, 3, 3))
    assert torch.allclose(shaped.flatten(), layer(hidden, TARGETS))


@pytest.mark.parametrize("sampler", [None, Uniform(V)])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn(rows, sampler):
    options = {} if sampler is None else {"sampler": sampler, "num_samples": 5}
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        layer = make(reduction=reduction, **options)
        no_column = layer(hidden_rows(rows), torch.empty(rows, 0, dtype=torch.int64))
        loss = layer(hidden_rows(rows).requires_grad_(), torch.full((rows, 2), -100))
        assert torch.allclose(no_column, loss, equal_nan=True)
        assert torch.allclose(loss, torch.full_like(loss, expected), equal_nan=True)
        loss.sum().backward()
        assert not any(p.grad is not None and bool(p.grad.nan_to_num().any()) for p in layer.parameters())


def test_gradcheck_and_a_retained_graph():
    layer = make(positive_weight=2.0)
    hidden = hidden_rows().requires_grad_()
    for reduction in ("mean", "none"):
        layer.reduction = reduction
        assert torch.autograd.gradcheck(lambda h, w, b: layer(h, TARGETS), (hidden, layer.weight, layer.bias))
    layer.reduction = "sum"
    loss = layer(hidden, TARGETS)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(2 * loss, hidden)[0], 2 * first)
    assert torch.autograd.gradgradcheck(lambda h: layer(h, TARGETS), hidden)


def test_transforms_and_tensors_without_values():
    layer = make(reduction="sum", positive_weight=torch.linspace(0.1, 3, V))
    hidden, parameters = hidden_rows(), {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, hidden, targets):
        return torch.func.functional_call(layer, parameters, (hidden, targets))

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, hidden, TARGETS)
    for row, targets, *found in zip(hidden, TARGETS, *per_example.values(), strict=True):
        expected = torch.autograd.grad(layer(row, targets), list(layer.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    planned = OneVsAll(D, V, reduction="none", device="meta", dtype=torch.float64)
    planned(hidden.to("meta"), TARGETS.to("meta")).sum().backward()
    assert planned.weight.grad.shape == (V, D)


def test_huge_logits_and_barred_classes():
    layer = make()
    with torch.no_grad():
        layer.bias[20:25] = -torch.inf
    for scale in (1.0, 1e4):
        layer.zero_grad()
        hidden = (scale * hidden_rows()).requires_grad_()
        loss = layer(hidden, TARGETS)
        loss.backward()
        assert loss.isfinite()
        assert all(t.isfinite().all() for t in (hidden.grad, layer.weight.grad, layer.bias.grad))
    assert not layer.weight.grad[20:25].any()
    assert not set(layer.topk(hidden, 30).indices.flatten().tolist()) & set(range(20, 25))


def test_low_precision_is_near_double():
    layer = make(torch.float32)
    truth = copy.deepcopy(layer).double()
    exact = gradients(lambda h: truth(h, TARGETS), truth, hidden_rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = gradients(lambda h: layer(h, TARGETS), layer, hidden_rows(dtype=torch.float32))
    half = layer.bfloat16()
    low = gradients(lambda h: half(h, TARGETS), half, hidden_rows(dtype=torch.bfloat16))
    assert autocast[0].dtype == low[0].dtype == torch.float32
    for ours in (autocast, low):
        for one, other in zip(ours, exact, strict=True):
            assert float((one.double() - other).norm()) < 0.02 * float(other.norm())


@pytest.mark.parametrize("make_sampler", [lambda: Uniform(V), lambda: LogUniform(V, replacement=False)])
@pytest.mark.parametrize("shared", [True, False])
def test_sampled_negatives_are_all_of_them_on_average(make_sampler, shared):
    """The mean of loss and gradients over many samples, within five standard errors of the exact ones."""
    exact_layer = make(positive_weight=2.0)
    sampler = make_sampler()
    sampler.shared = shared
    layer = make(positive_weight=2.0, sampler=sampler, num_samples=12, sparse=True)
    exact = torch.cat(
        [t.flatten() for t in gradients(lambda h: exact_layer(h, TARGETS), exact_layer, hidden_rows())]
    )
    drawn = torch.stack(
        [
            torch.cat([t.flatten() for t in gradients(lambda h: layer(h, TARGETS), layer, hidden_rows())])
            for _ in range(400)
        ]
    )
    error = drawn.std(0) / 20 + 1e-12
    # The expected counts of samples without replacement are an approximation, of about a hundredth.
    slack = 0.03 * exact.abs() + 0.01 if not sampler.replacement else 0.0
    assert bool(((drawn.mean(0) - exact).abs() <= 5 * error + slack).all())
    assert layer.weight.grad.is_sparse
    assert len(layer.sparse_parameters()) == 2


def test_other_samplers_train():
    for sampler in (InBatch(V), QuadraticKernel(V, D)):
        layer = make(sampler=sampler, num_samples=6, sparse=True)
        layer(hidden_rows(), TARGETS).backward()
        assert layer.weight.grad.to_dense().isfinite().all()


def test_queries_and_a_screen():
    layer = make(torch.float32)
    hidden = hidden_rows(dtype=torch.float32)
    scores = F.linear(hidden, layer.weight, layer.bias)
    assert torch.allclose(layer.scores(hidden), scores)
    best = layer.topk(hidden, 4)
    assert type(best).__name__ == "ScoreTopK"
    assert torch.allclose(best.scores, scores.topk(4).values)
    excluded = layer.topk(hidden, 3, exclude=best.indices[:, :1])
    assert torch.equal(excluded.indices, best.indices[:, 1:])
    none_left = layer.topk(hidden, 2, exclude=torch.arange(V).expand(N, V))
    assert (none_left.indices == -1).all()
    ids = torch.cat([best.indices, torch.full((N, 1), layer.ignore_index)], 1)
    assert torch.allclose(layer.score(hidden, ids)[:, :4], best.scores)
    assert not layer.score(hidden, ids)[:, 4].any()
    screen = ScreenedSoftmax.from_layer(layer, preview=SVDPreview(3), candidates=20, exact=True)
    assert torch.equal(screen.topk(hidden, 3).indices, best.indices[:, :3])
    for call in (layer.log_prob, layer.sample, lambda h: layer.target_log_prob(h, TARGETS[:, 0])):
        with pytest.raises(TypeError, match=r"use scores\(hidden\)"):
            call(hidden)


def test_copies_and_casts():
    layer = make(positive_weight=torch.linspace(0.1, 3, V))
    hidden = hidden_rows()
    other = make(positive_weight=torch.linspace(0.1, 3, V))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(hidden, TARGETS), layer(hidden, TARGETS))
    assert layer.bfloat16().positive_weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "go together", lambda: make(sampler=Uniform(V))),
        (ValueError, "go together", lambda: make(num_samples=3)),
        (ValueError, "needs a sampler", lambda: make(sparse=True)),
        (ValueError, "num_classes=37, got one of 3", lambda: make(sampler=Uniform(3), num_samples=2)),
        (ValueError, "positive_weight must be finite", lambda: make(positive_weight=-1.0)),
        (ValueError, "positive_weight must have shape", lambda: make(positive_weight=torch.ones(3))),
        (ValueError, "target_weights must be from 0 to 1", lambda: make()(hidden_rows(), TARGETS, VALUES + 1)),
        (
            ValueError,
            "targets must be from 0 to 1",
            lambda: make()(hidden_rows(), 2 * torch.eye(N, V).to_sparse()),
        ),
        (IndexError, "targets must be class ids", lambda: make()(hidden_rows(), TARGETS + V)),
        (IndexError, "exclude must be class ids", lambda: make().topk(hidden_rows(), 1, exclude=TARGETS + V)),
        (IndexError, "allowed must be class ids", lambda: make().topk(hidden_rows(), 1, allowed=TARGETS[0] + V)),
        (IndexError, "ids must be class ids", lambda: make().score(hidden_rows(), TARGETS + V)),
        (TypeError, "to_sparse", lambda: make()(hidden_rows(), dense(TARGETS))),
        (TypeError, "hidden must have the layer's dtype", lambda: make()(hidden_rows().float(), TARGETS)),
    ],
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
