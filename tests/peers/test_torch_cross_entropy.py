"""What PyTorch's own tests check of its cross-entropies, applied to `linear_cross_entropy`."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lastlayer import FullSoftmax
from lastlayer.functional import linear_cross_entropy

REDUCTIONS = ["mean", "sum", "none"]


def problem(*shape, classes=7, width=5, dtype=torch.float64):
    torch.manual_seed(sum(shape))
    hidden = torch.randn(*shape, width, dtype=dtype)
    return hidden, torch.randn(classes, width, dtype=dtype), torch.randn(classes, dtype=dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (15,), (4, 3), (2, 3, 2)])
def test_index_targets(shape, smoothing, weighted, reduction):
    hidden, weight, bias = problem(*shape)
    targets = torch.randint(7, shape)
    class_weights = torch.rand(7, dtype=torch.float64) + 0.1 if weighted else None
    found = linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        class_weights=class_weights,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    logits = F.linear(hidden, weight, bias).reshape(-1, 7)
    options = {"weight": class_weights, "label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(logits, targets.reshape(-1), **options)
    torch.testing.assert_close(found, expected.reshape(shape) if reduction == "none" else expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_probability_targets(smoothing, weighted, reduction):
    hidden, weight, bias = problem(15)
    targets = torch.rand(15, 7, dtype=torch.float64).softmax(1)
    class_weights = torch.rand(7, dtype=torch.float64) + 0.1 if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, class_weights=class_weights, **options)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, weight=class_weights, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.05, 0.15])
def test_smoothed_indices_equal_their_smoothed_probabilities(smoothing, reduction):
    hidden, weight, _ = problem(9)
    targets = torch.randint(7, (9,))
    smoothed = (1 - smoothing) * F.one_hot(targets, 7).double() + smoothing / 7
    found = linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(found, linear_cross_entropy(hidden, weight, smoothed, reduction=reduction))


@pytest.mark.parametrize(("reduction", "smoothing"), list(itertools.product(REDUCTIONS, [0.0, 0.2])))
@pytest.mark.parametrize("ignore_index", [-100, 0, 3])
def test_ignored_rows_count_nothing(ignore_index, reduction, smoothing):
    hidden, weight, bias = problem(15)
    hidden.requires_grad_()
    targets = torch.randint(7, (15,))
    targets[::4] = ignore_index
    options = {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(hidden, weight, bias), targets, **options))
    found.sum().backward()
    assert (hidden.grad[targets == ignore_index] == 0).all()


@pytest.mark.parametrize(("reduction", "value"), [("mean", float("nan")), ("sum", 0.0)])
def test_no_rows(reduction, value):
    hidden, weight, _ = problem(0)
    found = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), reduction=reduction)
    torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), equal_nan=True)


def test_refusals():
    hidden, weight, _ = problem(4)
    targets = torch.randint(7, (4,))
    for smoothing in (-0.1, 1.5):
        with pytest.raises(ValueError, match="label_smoothing"):
            linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="total")
    with pytest.raises(ValueError, match="class_weights"):
        linear_cross_entropy(hidden, weight, targets, class_weights=torch.ones(6))
    with pytest.raises(IndexError, match="targets"):
        linear_cross_entropy(hidden, weight, targets + 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_pytorchs(dtype):
    hidden, weight, _ = problem(256, classes=512, width=64)
    targets = torch.randint(512, (256,))
    exact = F.cross_entropy(hidden @ weight.T, targets)
    low, small = hidden.to(dtype), weight.to(dtype)
    own = (linear_cross_entropy(low, small, targets).double() - exact).abs()
    theirs = (F.cross_entropy((low @ small.T).float(), targets).double() - exact).abs()
    assert own <= 1.2 * theirs + 1e-4


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no F.linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_pytorchs_linear_cross_entropy_with_gradients(smoothing, reduction):
    hidden, weight, _ = problem(33, dtype=torch.float32)
    targets = torch.randint(7, (33,))
    targets[5] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    results = []
    for function in (linear_cross_entropy, F.linear_cross_entropy):
        leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
        loss = function(*leaves, targets, **options)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


def test_module_takes_what_the_loss_module_takes():
    layer = FullSoftmax(5, 7, class_weights=torch.rand(7), label_smoothing=0.1, reduction="sum", ignore_index=2)
    hidden, targets = torch.randn(15, 5), torch.randint(7, (15,))
    loss = torch.nn.CrossEntropyLoss(layer.class_weights, ignore_index=2, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(layer(hidden, targets), loss(F.linear(hidden, layer.weight, layer.bias), targets))
