"""What the tests of Apple's cut-cross-entropy and of Liger's fused linear cross-entropy check, applied to ours.

Both compare with the plain loss in float32 and allow a low precision no more error than PyTorch's own has in it,
over sizes that are no multiple of anything, ignored rows, a soft cap, biases, next-token shifts and accumulation.
"""

import pytest
import torch
import torch.nn.functional as F

from lastlayer import SoftCap
from lastlayer.functional import linear_cross_entropy

SIZES = [(256, 512, 128), (255, 507, 128), (252, 507, 123), (9, 1000, 17)]  # N, V, d


def drawn(rows, classes, width, ignored=True):
    torch.manual_seed(rows + classes + width)
    hidden = torch.randn(rows, width) / width**0.5
    weight, bias = torch.randn(classes, width), 0.02 * torch.randn(classes)
    weight[0] = hidden[0] * 50  # a probability near 1
    targets = torch.randint(classes, (rows,))
    targets[0] = 0
    if ignored:
        targets[torch.rand(rows) < 0.3] = -100
        targets[1] = 3
    return hidden, weight, bias, targets


def plain(hidden, weight, targets, *, bias=None, cap=None, **options):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, **options)


def fused(hidden, weight, targets, *, bias=None, cap=None, **options):
    logit_map = None if cap is None else SoftCap(cap)
    return linear_cross_entropy(hidden, weight, targets, bias=bias, logit_map=logit_map, **options)


def with_gradients(loss_of, hidden, weight, targets, bias=None, upstream=None, **options):
    leaves = [part.detach().clone().requires_grad_() for part in (hidden, weight, bias) if part is not None]
    loss = loss_of(leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None, **options)
    loss.backward(upstream)
    return [loss.detach().float(), *(leaf.grad.float() for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradients_no_worse_than_plain_in_each_dtype(sizes, biased, cap, dtype):
    hidden, weight, bias, targets = drawn(*sizes)
    parts = hidden, weight, targets, bias if biased else None
    low = hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype) if biased else None
    exact = with_gradients(
        plain,
        *(part.double() if part is not None and part.is_floating_point() else part for part in parts),
        cap=cap,
    )
    theirs, ours = (with_gradients(function, *low, cap=cap) for function in (plain, fused))
    for truth, other, own in zip(exact, theirs, ours, strict=True):
        scale = truth.abs().max()
        rounding = max(1e-6, torch.finfo(dtype).eps / 2) * scale
        allowed = 1.2 * (other - truth).abs().max() + rounding
        assert (own - truth).abs().max() <= allowed


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [False, True])
def test_upstream_gradient(reduction, biased):
    hidden, weight, bias, targets = drawn(*SIZES[2])
    upstream = torch.randn(len(hidden)) if reduction == "none" else torch.tensor(0.37)
    parts = hidden, weight, targets, bias if biased else None
    expected, found = (
        with_gradients(function, *parts, upstream=upstream, reduction=reduction) for function in (plain, fused)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 2])
def test_next_token_shift(shift):
    hidden, weight, _, targets = drawn(12 * 21, 507, 33)
    hidden, targets = hidden.view(12, 21, -1), targets.view(12, 21)
    found = fused(hidden[:, :-shift], weight, targets[:, shift:])
    expected = plain(hidden[:, :-shift].reshape(-1, 33), weight, targets[:, shift:].reshape(-1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_z_loss_smoothing_and_class_weights_together(z_loss, smoothing, weighted):
    hidden, weight, bias, targets = drawn(*SIZES[1])
    class_weights = torch.rand(len(weight)) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": "sum"}

    def with_square(hidden, weight, targets, *, bias):
        logits = F.linear(hidden, weight, bias)
        square = logits.logsumexp(1).square()[targets != -100].sum()
        return F.cross_entropy(logits, targets, weight=class_weights, **options) + z_loss * square

    found = with_gradients(
        fused, hidden, weight, targets, bias, class_weights=class_weights, z_loss=z_loss, **options
    )
    torch.testing.assert_close(
        found, with_gradients(with_square, hidden, weight, targets, bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, bias, targets = drawn(*SIZES[3])
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    fused(hidden, weight, targets, bias=bias).backward()
    expected = torch.autograd.grad(
        plain(hidden, weight, targets, bias=bias), [leaf for leaf in leaves.values() if leaf.requires_grad]
    )
    assert leaves[frozen].grad is None
    found = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_over_passes():
    hidden, weight, _, targets = drawn(*SIZES[1])
    weight.requires_grad_()
    for part in (slice(0, 100), slice(100, None)):
        fused(hidden[part], weight, targets[part], reduction="sum").backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets, reduction="sum"), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_all_ignored():
    hidden, weight, _, targets = drawn(*SIZES[3])
    hidden.requires_grad_()
    loss = fused(hidden, weight, torch.full_like(targets, -100), reduction="sum")
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    hidden, weight, bias, targets = drawn(*SIZES[0])
    exact = plain(hidden.double(), weight.double(), targets, bias=bias.double())
    with torch.autocast("cpu", dtype=dtype):
        own, theirs = (function(hidden, weight, targets, bias=bias) for function in (fused, plain))
    assert own.dtype == torch.float32
    assert (own - exact).abs() <= 1.2 * (theirs - exact).abs() + 1e-4


def test_logits_of_a_large_scale_are_finite():
    hidden, weight, _, targets = drawn(*SIZES[3])
    found = with_gradients(fused, 1e4 * hidden, weight, targets)
    assert all(part.isfinite().all() for part in found)
