"""Every sampled loss against its formula, one row and one candidate at a time, gradients included."""

import math

import pytest
import torch
from given_sampler import Given, distribution
from torch.nn import functional as F

from lastlayer import BlackOut, NegativeSampling, NoiseContrastive, SampledSoftmax
from lastlayer.functional.sampled_losses import accidental_hits, black_out_loss, sampled_softmax_loss

V, D, N, S = 11, 4, 6, 7
PROB = distribution(V)
INCLUSION = 1 - (1 - PROB) ** S
SHARED = torch.tensor([3, 0, 7, 3, 10, 5, 3])
OWN = torch.randint(V, (N, S), generator=torch.Generator().manual_seed(4))


def softmax_row(o, y, candidates, w):
    kept = [j for j in candidates if j not in y]
    logits = [o[k] - INCLUSION[k].log() for k in y] + [o[j] - (S * PROB[j]).log() for j in kept]
    normalizer = torch.stack(logits).logsumexp(0)
    return sum(w_k * (normalizer - logits[i]) for i, w_k in enumerate(w))


def negatives_row(o, y, candidates, w):
    kept = [j for j in candidates if j not in y]
    logits = [o[k] for k in y] + [o[j] - (S * PROB[j]).log() for j in kept]
    normalizer = torch.stack(logits).logsumexp(0)
    return sum(w_k * (normalizer - o[k]) for k, w_k in zip(y, w, strict=True))


def uncorrected_row(o, y, candidates, w):
    kept = [j for j in candidates if j not in y]
    normalizer = torch.stack([o[k] for k in y] + [o[j] for j in kept]).logsumexp(0)
    return sum(w_k * (normalizer - o[k]) for k, w_k in zip(y, w, strict=True))


def ranking_row(o, y, candidates, w):
    logits = [o[k] - (S * PROB[k]).log() for k in y] + [o[j] - (S * PROB[j]).log() for j in candidates]
    normalizer = torch.stack(logits).logsumexp(0)
    return sum(w_k * (normalizer - logits[i]) for i, w_k in enumerate(w))


def noise_row(o, y, candidates, w):
    total = sum(-w_k * F.logsigmoid(o[k] - (S * PROB[k]).log()) for k, w_k in zip(y, w, strict=True))
    return total - sum(F.logsigmoid(-(o[j] - (S * PROB[j]).log())) for j in candidates)


def negative_row(o, y, candidates, w):
    beta = 0.5 * (S / (V - 1) - 1) + 1
    total = sum(-beta * w_k * F.logsigmoid(o[k]) for k, w_k in zip(y, w, strict=True))
    return total - sum(F.logsigmoid(-o[j]) for j in candidates if j not in y)


def black_out_row(o, y, candidates, w):
    weighted = o.exp() / PROB
    kept = [j for j in candidates if j not in y]
    total = sum(weighted[k] for k in y) + sum(weighted[j] for j in kept)
    loss = sum(-w_k * (weighted[k] / total).log() for k, w_k in zip(y, w, strict=True))
    return loss - sum((1 - weighted[j] / total).log() for j in kept)


LOSSES = {
    "sampled softmax": (SampledSoftmax, {}, softmax_row),
    "negatives corrected": (SampledSoftmax, {"correction": "negatives"}, negatives_row),
    "uncorrected": (SampledSoftmax, {"correction": "none"}, uncorrected_row),
    "ranking": (SampledSoftmax, {"remove_hits": False}, ranking_row),
    "noise-contrastive": (NoiseContrastive, {}, noise_row),
    "negative sampling": (NegativeSampling, {"calibration": 0.5}, negative_row),
    "black-out": (BlackOut, {}, black_out_row),
}


def make(layer_class, ids, prob=PROB, **options):
    torch.manual_seed(0)
    layer = layer_class(D, len(prob), Given(ids, prob), S, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return layer


def gradients(loss, layer, hidden, upstream):
    layer.zero_grad()
    leaf = hidden.clone().requires_grad_()
    (loss(leaf) * upstream).sum().backward()
    found = [p.grad.to_dense() for p in layer.parameters()]
    return [leaf.grad, *found]


@pytest.mark.parametrize("ids", [SHARED, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula(name, sparse, bias, ids):
    layer_class, options, row_loss = LOSSES[name]
    layer = make(layer_class, ids, bias=bias, sparse=sparse, reduction="none", **options)
    log_normalizer = getattr(layer, "log_normalizer", 0.0)
    hidden = torch.randn(N, D, dtype=torch.float64)
    targets = torch.tensor([3, 0, 10, -100, 3, 6])
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)

    def expected(hidden):
        logits = F.linear(hidden, layer.weight, layer.bias) - log_normalizer
        sets = ids.expand(N, S)
        return torch.stack(
            [
                0.0 * o.sum() if y == -100 else row_loss(o, [int(y)], own.tolist(), [1.0])
                for o, y, own in zip(logits, targets, sets, strict=True)
            ]
        )

    if ids.dim() == 2:  # the layer samples for the rows that are kept
        layer.sampler.ids = ids[targets != -100]
    loss = layer(hidden, targets)
    assert torch.allclose(loss, expected(hidden), rtol=1e-12, atol=1e-12)
    found = gradients(lambda h: layer(h, targets), layer, hidden, upstream)
    if sparse:
        assert layer.weight.grad.is_sparse
        assert set(layer.weight.grad.coalesce().indices()[0].tolist()) <= {
            *ids.flatten().tolist(),
            *targets.tolist(),
        }
    for one, other in zip(found, gradients(expected, layer, hidden, upstream), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_several_weighted_targets_a_row(name):
    layer_class, options, row_loss = LOSSES[name]
    layer = make(layer_class, SHARED, reduction="sum", **options)
    hidden = torch.randn(2, 2, D, dtype=torch.float64)
    targets = torch.tensor([[[3, 5, -100], [1, 2, 4]], [[-100, -100, -100], [0, -100, -100]]])
    weights = torch.rand(targets.shape, dtype=torch.float64) + 0.1
    logits = F.linear(hidden, layer.weight, layer.bias) - getattr(layer, "log_normalizer", 0.0)
    expected = sum(
        row_loss(o, [k for k in y.tolist() if k >= 0], SHARED.tolist(), w[y >= 0])
        for o, y, w in zip(logits.reshape(-1, V), targets.reshape(-1, 3), weights.reshape(-1, 3), strict=True)
        if bool((y >= 0).any())
    )
    assert torch.allclose(layer(hidden, targets, weights), expected, rtol=1e-12)
    matrix = torch.zeros(4, V, dtype=torch.float64)
    for row, y, w in zip(matrix, targets.reshape(-1, 3), weights.reshape(-1, 3), strict=True):
        row[y[y >= 0]] = w[y >= 0]
    kept = torch.tensor([0, 1, 3])
    as_matrix = layer(hidden.reshape(4, D)[kept], matrix[kept].to_sparse())
    assert torch.allclose(as_matrix, expected, rtol=1e-12)
    repeated = torch.cat([targets, targets], -1), torch.cat([0.25 * weights, 0.75 * weights], -1)
    assert torch.allclose(layer(hidden, *repeated), expected, rtol=1e-12)


def test_worked_example():
    """Logits [1, 2, 3, 4] of candidates [7, 5, 7, 8], the target 7 at place 2: the 7 at place 0 is set aside."""
    hits = accidental_hits(torch.tensor([[7]]), torch.ones(1, 1), torch.tensor([7, 5, 8]))
    assert hits.tolist() == [[True, False, False]]
    others = torch.tensor([[1.0, 2.0, 4.0]]).masked_fill(hits, -math.inf).requires_grad_()
    loss = sampled_softmax_loss(torch.tensor([[3.0]]), others, torch.ones(1, 1))
    (slope,) = torch.autograd.grad(loss, others)  # p of each candidate
    assert loss.exp().reciprocal().item() == pytest.approx(0.245, abs=5e-4)
    assert slope[0].tolist() == pytest.approx([0, 0.090, 0.665], abs=5e-4)
    assert slope[0, 0] == 0


def test_black_out_of_a_certain_candidate():
    """1 - p of a candidate that is nearly certain is the mass of all others, where 1 - p itself would be 0."""
    for gap in (10.0, 100.0, 1e4):
        target = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        candidates = torch.tensor([[gap, -1.0]], dtype=torch.float64, requires_grad=True)
        loss = black_out_loss(target, candidates, torch.ones(1, 1))
        expected = 2 * gap - math.log(1 + math.exp(-1))
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (target, candidates)))


def test_black_out_gradient_of_the_paper():
    """With S = sum c_j / (1 - p_j):

    dJ/ds_y = 1 - p_y (1 + n - S),    dJ/ds_j = -c_j p_j (1 + n - S + 1 / (1 - p_j))
    """
    layer = make(BlackOut, SHARED, reduction="sum")
    hidden, target = torch.randn(1, D, dtype=torch.float64), torch.tensor([0])
    layer(hidden, target).backward()
    counts = torch.bincount(SHARED, minlength=V).double()
    counts[0] = 0
    weighted = (F.linear(hidden, layer.weight, layer.bias)[0] - PROB.log()).exp()
    p = weighted / (weighted[0] + counts @ weighted)
    n, total = counts.sum(), (counts / (1 - p)).sum()
    of_logits = -counts * p * (1 + n - total + 1 / (1 - p))
    of_logits[0] = 1 - p[0] * (1 + n - total)
    assert torch.allclose(layer.bias.grad, -of_logits, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights(name):
    """Of one class a row: the row's loss times its class's weight, a mean over the weights."""
    layer_class, options, _ = LOSSES[name]
    class_weights = torch.linspace(0.2, 2, V)
    hidden, targets = torch.randn(N, D, dtype=torch.float64), torch.tensor([3, 0, -100, 1, 10, 3])
    plain = make(layer_class, SHARED, reduction="none", **options)(hidden, targets)
    of_rows = class_weights.double()[targets.clamp(min=0)] * (targets >= 0)
    expected = {"none": plain * of_rows, "sum": (plain * of_rows).sum()}
    expected["mean"] = expected["sum"] / of_rows.sum()
    for reduction, value in expected.items():
        layer = make(layer_class, SHARED, reduction=reduction, class_weights=class_weights, **options)
        assert torch.allclose(layer(hidden, targets), value, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ids", [torch.full((S,), 3), torch.full((N, S), 3)], ids=["shared", "own"])
def test_all_candidates_are_hits(name, ids):
    """The target alone is left: a softmax over it says nothing, a logistic loss has its one term."""
    layer_class, options, row_loss = LOSSES[name]
    layer = make(layer_class, ids, reduction="sum", **options)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    loss = layer(hidden, torch.full((N,), 3))
    loss.backward()
    logits = F.linear(hidden, layer.weight, layer.bias) - getattr(layer, "log_normalizer", 0.0)
    expected = sum(row_loss(o, [3], [3] * S, [1.0]) for o in logits)
    assert torch.allclose(loss, torch.as_tensor(expected, dtype=torch.float64), atol=1e-12)
    assert hidden.grad.isfinite().all()
