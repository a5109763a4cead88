"""Soft targets of the chunked cross-entropy against PyTorch's, over dense probabilities; and distillation."""

import math

import pytest
import torch
from torch.nn import functional as F

from lastlayer import FullSoftmax, SoftCap
from lastlayer.functional import linear_chunks, linear_cross_entropy, linear_kl_div

N, D, V, K = 7, 4, 11, 3
IDS = torch.tensor(
    [[0, 10, 3], [1, -100, -100], [5, 5, 2], [-100, -100, -100], [4, 3, -100], [9, 0, 9], [7, 8, 6]]
)


@pytest.fixture(autouse=True, params=[1 << 28, 400], ids=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(linear_chunks, "PART_NUMBERS", 2 * V)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, D), (V, D), (V,))
    )
    weights = torch.rand(N, K, generator=generator, dtype=torch.float64)
    dense = torch.zeros(N, V, dtype=torch.float64)
    for row, ids, own in zip(dense, IDS, weights, strict=True):
        for k, w in zip(ids.tolist(), own.tolist(), strict=True):
            if k >= 0:
                row[k] += w
    return (hidden, weight, bias), weights.to(dtype), dense.to(dtype)


OPTIONS = {
    "plain": {},
    "class weights": {"class_weights": torch.linspace(0.1, 2, V, dtype=torch.float64)},
    "smooth": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "mapped": {"logit_map": SoftCap(2.0)},
    "all": {
        "class_weights": torch.linspace(0.1, 2, V, dtype=torch.float64),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "logit_map": SoftCap(2.0),
    },
}


def pytorchs(leaves, dense, kept, reduction, class_weights=None, label_smoothing=0.0, z_loss=0.0, logit_map=None):
    """`F.cross_entropy` of probabilities, which are of any sum, row by row."""
    hidden, weight, bias = leaves
    logits = F.linear(hidden, weight, bias)
    logits = logits if logit_map is None else logit_map(logits)
    loss = F.cross_entropy(logits, dense, class_weights, label_smoothing=label_smoothing, reduction="none")
    loss = (loss + z_loss * logits.logsumexp(1).square()) * kept
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


def gradients(loss, leaves):
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype).view_as(loss)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


def assert_same(found, expected, tolerance=1e-11):
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["weighted", "unweighted", "matrix", "dense"])
@pytest.mark.parametrize("name", OPTIONS)
def test_soft_targets_are_pytorchs(name, form, reduction):
    leaves, weights, dense = problem()
    kept = torch.ones(N, dtype=torch.float64)
    targets, target_weights = IDS, None
    if form == "weighted":
        target_weights, kept = weights, (IDS >= 0).any(1).double()
    elif form == "unweighted":
        dense, kept = torch.zeros_like(dense), (IDS >= 0).any(1).double()
        for row, ids in zip(dense, IDS, strict=True):
            row.index_add_(0, ids[ids >= 0], torch.ones(int((ids >= 0).sum()), dtype=torch.float64))
    else:
        targets = dense.to_sparse() if form == "matrix" else dense
    options = OPTIONS[name]
    hidden, weight, bias = leaves
    found = linear_cross_entropy(
        hidden, weight, targets, target_weights=target_weights, bias=bias, reduction=reduction, **options
    )
    assert_same(gradients(found, leaves), gradients(pytorchs(leaves, dense, kept, reduction, **options), leaves))


def test_one_weight_a_row():
    """Weights in the shape of one class a row: the weights of rows."""
    (hidden, weight, bias), weights, _ = problem()
    found = linear_cross_entropy(
        hidden, weight, IDS[:, 0], target_weights=weights[:, 0], bias=bias, reduction="sum"
    )
    rows = F.cross_entropy(F.linear(hidden, weight, bias), IDS[:, 0], reduction="none")
    assert torch.allclose(found, (rows * weights[:, 0]).sum())


def test_the_layer_takes_them_in_any_shape():
    (hidden, _, _), weights, dense = problem()
    layer = FullSoftmax(D, V, dtype=torch.float64, reduction="none")
    flat = layer(hidden, IDS, weights)
    shaped = layer(hidden[None], IDS[None], target_weights=weights[None])
    assert torch.equal(shaped, flat[None])
    assert torch.allclose(layer(hidden[None], dense[None])[0], flat)
    single = layer(hidden[0], IDS[0], weights[0])
    assert torch.allclose(single, flat[0])
    assert layer(hidden[:0], IDS[:0], weights[:0]).shape == (0,)
    assert layer(hidden[:0], dense[:0]).shape == (0,)
    layer.reduction = "mean"
    assert layer(hidden, torch.full_like(IDS, -100)).isnan()
    assert torch.equal(layer(hidden, IDS.int(), weights), layer(hidden, IDS, weights))


def test_barred_classes_without_weight_cost_nothing():
    leaves, _, dense = problem()
    bias = leaves[2].detach().clone()
    bias[[1, 6]] = -math.inf
    dense[:, [1, 6]] = 0
    dense[3] = 0.1
    dense[3, [1, 6]] = 0
    for targets in (dense, dense.to_sparse()):
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=bias, reduction="sum")
        found = torch.autograd.grad(loss, leaves[:2])
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in found)
        assert not found[1][[1, 6]].any()


def test_gradcheck_and_retained_graphs():
    leaves, weights, dense = problem()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, IDS, target_weights=weights, bias=b, reduction=reduction
            ),
            leaves,
        )
    loss = linear_cross_entropy(leaves[0], leaves[1], dense, bias=leaves[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same(torch.autograd.grad(loss, leaves), first)


def test_low_precision():
    leaves, weights, dense = problem()
    exact = gradients(linear_cross_entropy(leaves[0], leaves[1], dense, bias=leaves[2]), leaves)
    with torch.no_grad():
        half = [leaf.bfloat16().requires_grad_() for leaf in leaves]
    for targets, own in ((dense.bfloat16(), None), (IDS, weights.bfloat16())):
        kept = IDS if own is None else None
        if kept is None:
            exact = gradients(
                linear_cross_entropy(leaves[0], leaves[1], IDS, target_weights=weights, bias=leaves[2]), leaves
            )
        loss = linear_cross_entropy(half[0], half[1], targets, target_weights=own, bias=half[2])
        assert loss.dtype == torch.float32
        for one, other in zip(gradients(loss, half), exact, strict=True):
            assert float((one.double() - other).norm()) < 0.02 * float(other.norm())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("biases", [True, False])
def test_divergence_from_a_teacher(biases, temperature, reduction):
    leaves, _, _ = problem()
    generator = torch.Generator().manual_seed(5)
    teacher_hidden, teacher_weight, teacher_bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, 6), (V, 6), (V,))
    )
    if not biases:
        leaves, teacher_bias = leaves[:2], None
    hidden, weight, *bias = leaves
    options = {"bias": bias[0], "teacher_bias": teacher_bias} if biases else {}
    found = linear_kl_div(
        hidden, weight, teacher_hidden, teacher_weight, temperature=temperature, reduction=reduction, **options
    )
    student = (F.linear(hidden, weight, *bias) / temperature).log_softmax(1)
    teacher = (F.linear(teacher_hidden, teacher_weight, teacher_bias) / temperature).log_softmax(1)
    rows = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
    assert_same(gradients(found, leaves), gradients(expected, leaves))


def test_a_student_that_is_its_teacher_diverges_not_at_all():
    (hidden, weight, bias), _, _ = problem()
    loss = linear_kl_div(hidden, weight, hidden.detach(), weight.detach(), bias=bias, teacher_bias=bias.detach())
    assert abs(loss.item()) < 1e-14
    assert float(torch.autograd.grad(loss, weight)[0].abs().max()) < 1e-14


def call(*targets, hidden=None, **options):
    (own, weight, bias), weights, dense = problem()
    named = {"ids": IDS, "weights": weights, "dense": dense}
    values = [named[t] if isinstance(t, str) else t for t in targets]
    weights = values[1] if len(values) > 1 else None
    return linear_cross_entropy(own, weight, values[0], target_weights=weights, bias=bias, **options)


def divergence(**changed):
    given = {"teacher_hidden": torch.zeros(N, 2).double(), "teacher_weight": torch.zeros(V, 2).double(), **changed}
    (hidden, weight, _), _, _ = problem()
    return linear_kl_div(hidden, weight, **given)


@pytest.mark.parametrize(
    ("error", "message", "refused"),
    [
        (ValueError, "target_weights must be weights that are finite", lambda: call("ids", -torch.ones(N, K))),
        (ValueError, "target_weights must be weights that are finite", lambda: call("ids", torch.ones(N, K) / 0)),
        (
            ValueError,
            "target_weights must be weights that are finite",
            lambda: call("ids", torch.ones(N, K) * math.nan),
        ),
        (ValueError, "targets must be weights that are finite", lambda: call(-torch.ones(N, V))),
        (ValueError, "target_weights must have targets' shape", lambda: call("ids", torch.ones(N, 2))),
        (TypeError, "target_weights must be a floating-point", lambda: call("ids", torch.ones(N, K).long())),
        (TypeError, "must not require a gradient", lambda: call("ids", torch.ones(N, K, requires_grad=True))),
        (TypeError, "must not require a gradient", lambda: call(torch.ones(N, V, requires_grad=True))),
        (ValueError, "target_weights must be None", lambda: call("dense", torch.ones(N, V))),
        (ValueError, r"must have shape \(7, 11\)", lambda: call(torch.ones(N, V - 1))),
        (TypeError, "class ids of an integer dtype", lambda: call(torch.ones(N))),
        (IndexError, "targets must be class ids", lambda: call(IDS + V, torch.ones(N, K))),
        (ValueError, "leading shape", lambda: call(IDS[:3])),
        (ValueError, "temperature must be positive", lambda: divergence(temperature=0.0)),
        (ValueError, "the rows", lambda: divergence(teacher_hidden=torch.zeros(2, 2).double())),
        (ValueError, "the 11 classes", lambda: divergence(teacher_weight=torch.zeros(2, 2).double())),
        (ValueError, "reduction", lambda: divergence(reduction="batchmean")),
    ],
)
def test_bad_input_is_refused(error, message, refused):
    with pytest.raises(error, match=message):
        refused()
