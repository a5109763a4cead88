"""Augment & Reduce and U-max: the mean gradient is that of the bound of all classes, at any number of samples."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lastlayer import AugmentReduce, FullSoftmax, LogUniform, UMax, Uniform

V, D, REPEATS = 12, 3, 6000
BOTH = pytest.mark.parametrize("layer_class", [AugmentReduce, UMax])
SAMPLERS = {"uniform": lambda: Uniform(V, shared=False), "log-uniform": lambda: LogUniform(V, shared=False)}


def make(layer_class, num_samples=2, sampler="uniform", **options):
    torch.manual_seed(0)
    options = {"num_examples": 4, "reduction": "sum", "dtype": torch.float64, **options}
    layer = layer_class(D, V, SAMPLERS[sampler](), num_samples, **options)
    with torch.no_grad():
        layer.weight.normal_()
    hidden, targets = torch.randn(4, D, dtype=torch.float64), torch.tensor([0, 3, 7, 11])
    return layer, hidden, targets


def bound(layer, hidden, targets, normalizers):
    """`u + exp(-u) (1 + sum over k != y of exp(o_k - o_y)) - 1` of every row."""
    logits = hidden @ layer.weight.T + layer.bias
    return normalizers + (-normalizers).exp() * (logits - logits.gather(1, targets[:, None])).exp().sum(1) - 1


def check_mean(drawn, exact):
    """Within five standard errors in every number, and the errors are small beside the numbers."""
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert float(error.norm()) < 0.15 * float(exact.norm())


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("above", [-0.5, 0.0, 1.5])  # u less the true value
@BOTH
def test_mean_loss_and_gradient_are_the_bounds(layer_class, above, sampler, num_samples):
    layer, hidden, targets = make(layer_class, num_samples, sampler, reduction="none")
    layer.eval()  # the state stays
    true = -layer.target_log_prob(hidden, targets).detach()
    layer.normalizers = true + above
    leaf = hidden.clone().requires_grad_()
    exact = bound(layer, leaf, targets, true + above)
    exact.sum().backward()
    rows = torch.arange(4).repeat(REPEATS)
    drawn = hidden[rows].requires_grad_()
    loss = layer(drawn, targets[rows], rows)
    loss.sum().backward()
    check_mean(loss.detach().reshape(REPEATS, 4), exact.detach())
    check_mean(drawn.grad.reshape(REPEATS, 4, D), leaf.grad)
    assert (exact.detach() >= true - 1e-12).all(), "the bound is below -log p"


@pytest.mark.parametrize("examples", [True, False])
@BOTH
def test_at_the_true_normalizer_it_is_the_full_softmax(layer_class, examples):
    """The mean of loss and all gradients; without examples u is exact by itself."""
    layer, hidden, targets = make(layer_class, 3, reduction="sum")
    layer.eval()
    layer.normalizers = -layer.target_log_prob(hidden, targets).detach()
    full = FullSoftmax(D, V, dtype=torch.float64, reduction="sum", weight=layer.weight)
    full.bias = layer.bias
    leaf = hidden.clone().requires_grad_()
    exact_loss = full(leaf, targets)
    exact_loss.backward()
    exact = [leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]
    layer.zero_grad()
    rows = torch.arange(4).repeat(REPEATS)
    drawn = hidden[rows].requires_grad_()
    loss = layer(drawn, targets[rows], rows if examples else None) / REPEATS
    loss.backward()
    assert torch.allclose(loss, exact_loss, rtol=0.03)
    mine = [drawn.grad.reshape(REPEATS, 4, D).sum(0), layer.weight.grad, layer.bias.grad]
    for one, other in zip(mine, exact, strict=True):
        assert float((one - other).norm()) < 0.05 * float(other.norm())


@BOTH
def test_the_state_tends_to_the_true_normalizers(layer_class):
    layer, hidden, targets = make(layer_class, 6)
    true = -layer.target_log_prob(hidden, targets).detach()
    assert torch.equal(layer.normalizers, torch.full((4,), math.log(V), dtype=torch.float64))
    layer.eval()(hidden, targets, torch.arange(4))
    assert torch.equal(layer.normalizers, torch.full((4,), math.log(V), dtype=torch.float64))
    layer.train()
    if layer_class is UMax:
        layer.rate = 0.05
    else:
        layer.decay = 0.9
    seen = []
    for _ in range(1500):
        layer(hidden, targets, torch.arange(4))
        seen.append(layer.normalizers.clone())
    assert torch.allclose(torch.stack(seen[500:]).mean(0), true, atol=0.15)


@BOTH
def test_an_average_or_a_step(layer_class):
    """The formula of the update, from the same candidates."""
    layer, hidden, targets = make(layer_class, 5)
    hidden = 0.3 * hidden  # so that no u is raised
    before = torch.tensor([2.5, 3.5, 4.0, 9.0], dtype=torch.float64)
    torch.manual_seed(3)
    ids, log_counts = layer.sampler.sample(5, hidden)
    logits = hidden @ layer.weight.T + layer.bias
    excess = (logits.gather(1, ids) - logits.gather(1, targets[:, None]) - log_counts).exp()
    total = 1 + excess.masked_fill(ids == targets[:, None], 0).sum(1)
    if layer_class is UMax:
        moved = before - layer.rate * (1 - (-before).exp() * total)
        nearest = torch.where(total.log() < before, torch.maximum(moved, total.log()), total.log())
        expected = torch.where(total.log() > before, torch.minimum(moved, total.log()), nearest)
    else:
        layer.uses.fill_(3)
        expected = ((1 - 4**-0.5) * before.exp() + 4**-0.5 * total).log()
    layer.normalizers.copy_(before)
    torch.manual_seed(3)
    layer(hidden, targets, torch.arange(4))
    assert torch.allclose(layer.normalizers, expected, rtol=1e-6)


@BOTH
def test_a_normalizer_far_too_low_is_raised_before_it_overflows(layer_class):
    layer, hidden, targets = make(layer_class, 200)
    layer.normalizers.fill_(-1e4)
    hidden = (100 * hidden).requires_grad_()
    loss = layer(hidden, targets, torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert (layer.normalizers > -1).all()


@BOTH
def test_all_candidates_are_hits(layer_class):
    """The bound of the target alone, which depends on no logit."""
    torch.manual_seed(0)
    layer = layer_class(D, 1, Uniform(1), 5, num_examples=2, dtype=torch.float64)
    layer.normalizers.fill_(0.5)
    hidden = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    loss = layer(hidden, torch.zeros(2).long(), torch.arange(2))
    loss.backward()
    assert math.isclose(float(loss.detach()), 0.5 + math.exp(-0.5) - 1, rel_tol=1e-12)
    assert not hidden.grad.any()
    assert not layer.weight.grad.any()


@BOTH
def test_ignored_rows_class_weights_and_reductions(layer_class):
    weights = torch.linspace(0.5, 2, V)
    layer, hidden, targets = make(layer_class, 4, reduction="none", class_weights=weights)
    layer.eval()
    targets[1] = layer.ignore_index
    results = {}
    for reduction in ("none", "sum", "mean"):
        layer.reduction = reduction
        torch.manual_seed(1)
        results[reduction] = layer(hidden, targets, torch.arange(4))
    rows = results["none"]
    assert rows[1] == 0
    assert torch.allclose(results["sum"], rows.sum())
    assert torch.allclose(results["mean"], rows.sum() / weights[targets[targets >= 0]].double().sum())
    layer.train()(hidden, targets, torch.arange(4))
    assert layer.normalizers[1] == torch.tensor(math.log(V), dtype=torch.float64)
    assert (layer.normalizers[[0, 2, 3]] != layer.normalizers[1]).all()


@BOTH
def test_it_learns_and_is_copied(layer_class):
    torch.manual_seed(0)
    layer = layer_class(8, 50, Uniform(50), 20, num_examples=100, sparse=True)
    vectors, targets = torch.randn(100, 8), torch.arange(100) % 50
    optimizer = torch.optim.Adagrad(layer.parameters(), 0.3)
    with torch.sparse.check_sparse_tensor_invariants(False):
        for _ in range(200):
            rows = torch.randint(100, (64,))
            optimizer.zero_grad()
            layer(vectors[rows], targets[rows], rows).backward()
            optimizer.step()
    assert float((layer.topk(vectors, 5).indices == targets[:, None]).any(1).float().mean()) > 0.7
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.normalizers, layer.normalizers)
    other = layer_class(8, 50, Uniform(50), 20, num_examples=100)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.normalizers, layer.normalizers)
    assert torch.equal(other.bfloat16().normalizers, layer.normalizers), "a cast of the layer rounded its state"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "examples must be None", lambda f, h, t: f(num_examples=None)(h, t, torch.arange(4))),
        (ValueError, "examples must have the shape", lambda f, h, t: f()(h, t, torch.arange(3))),
        (
            IndexError,
            "examples must be numbers of examples from 0 to 3; got 4",
            lambda f, h, t: f()(h, t, torch.arange(1, 5)),
        ),
        (TypeError, "examples must be", lambda f, h, t: f()(h, t, torch.ones(4))),
        (TypeError, "examples must be", lambda f, h, t: f()(h, t, [0, 1, 2, 3])),
        (ValueError, "targets must have", lambda f, h, t: f()(h, torch.stack([t, t], 1))),
        (ValueError, "num_examples must be at least 1", lambda f, h, t: f(num_examples=0)),
    ],
)
@BOTH
def test_bad_input_is_refused(layer_class, error, message, call):
    _, hidden, targets = make(layer_class)
    with pytest.raises(error, match=message):
        call(lambda **options: make(layer_class, **options)[0], hidden, targets)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="rate must be finite and at least 0"):
        UMax(D, V, Uniform(V), 2, rate=-1.0)
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        AugmentReduce(D, V, Uniform(V), 2, decay=1.5)
    with pytest.raises(ValueError, match="num_classes=12, got one of 5"):
        UMax(D, V, Uniform(5), 2)


def test_the_bound_is_least_at_the_truth():
    layer, hidden, targets = make(UMax)
    true = -layer.target_log_prob(hidden, targets)
    assert torch.allclose(bound(layer, hidden, targets, true), true)
    assert torch.allclose(true, F.cross_entropy(hidden @ layer.weight.T + layer.bias, targets, reduction="none"))
