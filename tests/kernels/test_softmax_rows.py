"""The compiled rows kernel equals its plain twin on every instruction set: loss, gradient, hostile rows."""

import pytest
import torch

from lastlayer import PLIF, Sigsoftmax, SoftCap
from lastlayer.functional import linear_cross_entropy
from lastlayer.kernels import engine
from lastlayer.kernels.backends import softmax_rows_backend_for
from lastlayer.kernels.softmax_rows import KernelMap, RowTerms, fused, plain

MAPS = {
    "identity": None,
    "sigsoftmax": Sigsoftmax,
    "soft-cap": lambda: SoftCap(3.0),
    "plif": lambda: PLIF(1000, 10.0, init_std=1.0),
}
SHAPES = [(9, 1003), (1, 7), (5, 1), (40, 64), (3, 2048), (2, 4097)]


@pytest.fixture(params=[1, 3])
def threads(request):
    """PyTorch's threads, of which the kernel makes use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def chunk_of(rows=9, classes=1003, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    bias = torch.randn(classes, generator=generator)
    ids = torch.randint(classes, (rows,), generator=generator)
    ids[:2] = torch.tensor([0, classes - 1])[:rows]
    return logits, bias, RowTerms(ids, torch.rand(rows, generator=generator), None, None, None)


def truth(logits, bias, terms, logit_map=None):
    """The loss, and the gradient of the logits, in float64 by autograd."""
    leaf = (logits.float() + bias).double().requires_grad_()
    values = leaf if logit_map is None else logit_map(leaf)
    normalizer = values.logsumexp(1)
    loss = terms.hard * (normalizer - values.gather(1, terms.ids[:, None])[:, 0])
    if terms.square is not None:
        loss = loss + terms.square * normalizer.square()
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("with_square", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain(isa, threads, shape, with_square):
    logits, bias, terms = chunk_of(*shape)
    if with_square:
        terms = terms._replace(square=torch.linspace(0, 0.1, shape[0]))
    exact = logits.double() + bias.double()
    expected = plain(exact, terms.scaled(torch.ones(shape[0], dtype=torch.float64)), True)
    kept = logits.clone()
    loss = fused(logits, bias, terms, False)[0]
    assert torch.equal(logits, kept), "rows changed though no gradient was wanted"
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused(logits, bias, terms, True)[0], loss, rtol=0, atol=0)
    torch.testing.assert_close(logits, exact.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
def test_no_less_exact_than_pytorch(isa, make, shape):
    """The distance from float64 is that of PyTorch's own operations in float32, within the chance of rounding."""
    logits, bias, terms = chunk_of(*shape)
    if make is None:
        logit_map, kernel_map = None, KernelMap()
    else:
        torch.manual_seed(0)
        logit_map = make()
        kernel_map = logit_map.kernel_map()
    loss, gradient = truth(logits, bias, terms, logit_map)
    leaf = (logits + bias).requires_grad_()
    values = leaf if logit_map is None else logit_map(leaf)
    theirs = terms.hard * -values.log_softmax(1).gather(1, terms.ids[:, None])[:, 0]
    (their_gradient,) = torch.autograd.grad(theirs.sum(), leaf)
    ours = fused(logits, bias, terms, True, kernel_map)[0]
    # Where nothing is vectorised, as in `make sanitize`, a sum of 1,024 numbers in a row loses a little more.
    assert (ours - loss).norm() <= 1.5 * (theirs.detach() - loss).norm() + 3e-7 * loss.norm() + 1e-7
    assert (logits - gradient).norm() <= 1.5 * (their_gradient - gradient).norm() + 5e-7 * gradient.norm() + 1e-7


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
def test_bfloat16_is_rounded_once(isa, make):
    """As if the float32 form had run, and its gradient been rounded."""
    logits, bias, terms = chunk_of(dtype=torch.bfloat16)
    kernel_map = KernelMap() if make is None else make().kernel_map()
    wide = logits.float()
    expected = fused(wide, bias, terms, True, kernel_map)[0]
    torch.testing.assert_close(fused(logits, bias, terms, True, kernel_map)[0], expected, rtol=0, atol=0)
    assert torch.equal(logits, wide.bfloat16())


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
def test_hostile_rows(isa, make):
    """A class ruled out has a gradient of exactly 0; NaN stays NaN; huge logits stay finite."""
    logits, bias, terms = chunk_of(rows=4)
    bias[5] = float("-inf")
    terms.ids[0] = 3
    logits[1] *= 1e30
    logits[2, 7] = float("nan")
    logits[3] -= 1e4
    kernel_map = KernelMap() if make is None else make().kernel_map()
    loss = fused(logits, bias, terms, True, kernel_map)[0]
    assert loss.isfinite().tolist() == [True, True, False, True]
    assert logits[2].isnan().all()
    assert logits[[0, 1, 3]].isfinite().all()
    if make is None:
        assert not logits[[0, 1, 3], 5].any()
        torch.testing.assert_close(logits[[0, 1, 3]].sum(1), torch.zeros(3), rtol=0, atol=1e-5)


def test_plif_counts_the_same_on_any_number_of_threads(isa):
    """The sums over segments, against PyTorch's; and the same twice, to the last bit."""
    torch.manual_seed(0)
    logit_map = PLIF(50, 6.0, init_std=1.0)
    kernel_map = logit_map.kernel_map()._replace(counted=True)
    found = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        logits, bias, terms = chunk_of(300, 1003)
        found.append(fused(logits, bias, terms, True, kernel_map)[1])
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], found[2])

    logits, bias, terms = chunk_of(300, 1003)
    leaf = (logits + bias).double()
    values = logit_map(leaf).requires_grad_()
    loss = terms.hard * -values.log_softmax(1).gather(1, terms.ids[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    knots, at = logit_map.knots(leaf.flatten())
    inside = (at - knots) * gradient.flatten()
    expected = torch.zeros(50, 2, dtype=torch.float64)
    expected.index_add_(0, knots, torch.stack([inside, gradient.flatten()], 1))
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_layer_is_the_same_either_way(isa, autocast, z_loss):
    generator = torch.Generator().manual_seed(6)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((40, 16), (500, 16), (500,))]
    targets = torch.randint(500, (80,), generator=generator)[::2]  # not contiguous
    targets[3] = -100
    answers = []
    for kind in (isa, None):
        with engine.forced(kind), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], z_loss=z_loss)
        answers.append([loss, *torch.autograd.grad(loss, leaves)])
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance / 20)


def test_all_targets_ignored(isa):
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    ignored = torch.full((4,), -100)
    loss = linear_cross_entropy(hidden, weight, ignored, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_says_when_it_serves():
    cpu = torch.device("cpu")
    here = "compiled" if engine.available() else "plain"
    assert softmax_rows_backend_for(cpu, torch.float32) == here
    assert softmax_rows_backend_for(cpu, torch.bfloat16) == here
    assert softmax_rows_backend_for(cpu, torch.float32, label_smoothing=True) == "plain"
    assert softmax_rows_backend_for(cpu, torch.float64) == "plain"
    assert softmax_rows_backend_for(torch.device("cuda"), torch.float32) == "plain"
    with engine.forced(None):
        assert softmax_rows_backend_for(cpu, torch.float32) == "plain"
