"""Logits that share a large number: every path equals PyTorch on the same logits without it.

The logits are multiples of 1/4 around 2^20, which float32 holds exactly, so that what is lost is lost afterwards.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lastlayer import (
    AdaptiveSoftmax,
    BlackOut,
    FullSoftmax,
    HierarchicalSoftmax,
    Int8Preview,
    LogUniform,
    MixtureOfSoftmaxes,
    SampledSoftmax,
    ScreenedSoftmax,
    Sigsoftmax,
    SVDPreview,
)
from lastlayer.functional import linear_cross_entropy, linear_statistics
from lastlayer.kernels import engine

SHAPE = 300, 1500  # rows, classes


@pytest.fixture(autouse=True, params=["plain", "compiled"])
def path(request):
    """Everything by PyTorch's operations, and by the compiled engine where it is."""
    if request.param == "compiled":
        if not engine.available():
            pytest.skip(f"no compiled engine: {engine.reason()}")
        yield
    else:
        with engine.forced(None):
            yield


def head(rows, classes, common=2.0**10, seed=0, dtype=torch.float32):
    """Hidden states and a weight, each with one column `common`; targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, 5), generator=generator).to(dtype)
    weight = torch.randint(-4, 5, (classes, 5), generator=generator).to(dtype) / 4
    hidden[:, 0] = weight[:, 0] = common
    return hidden, weight, torch.randint(classes, (rows,), generator=generator)


def close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"class_weights": True}, {"bias": True}], ids=str
)
def test_cross_entropy(options):
    hidden, weight, targets = head(*SHAPE)
    options = dict(options)
    bias = torch.arange(SHAPE[1]) % 7 / 4 if options.pop("bias", False) else None
    if options.get("class_weights"):
        options["class_weights"] = torch.linspace(0.5, 2, SHAPE[1])
    theirs = {"weight": options.get("class_weights"), "label_smoothing": options.get("label_smoothing", 0.0)}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("mean", "none"):
        ours = linear_cross_entropy(*leaves, targets, bias=bias, reduction=reduction, **options)
        logits = F.linear(*leaves, bias).double()
        theirs["weight"] = None if theirs["weight"] is None else theirs["weight"].double()
        expected = F.cross_entropy(logits, targets, reduction=reduction, **theirs)
        close(ours, expected)
        # An entry is a sum of products with 1,024.
        close(gradients(ours.sum(), *leaves), gradients(expected.sum(), *leaves), 1e-5 * 1024)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_logits_of_the_report(dtype):
    size = 4096.0 if dtype != torch.float16 else 64.0
    hidden, weight = torch.full((4, 1), size, dtype=dtype), torch.full((8, 1), size, dtype=dtype)
    targets = torch.arange(4)
    expected = F.cross_entropy((hidden @ weight.T).float(), targets)
    close(linear_cross_entropy(hidden, weight, targets), expected)
    compiled = torch.compile(linear_cross_entropy, backend="eager")
    close(compiled(hidden, weight, targets), expected)
    answer = linear_statistics(hidden, weight, targets, k=3)
    close(answer.target_log_prob, -expected.expand(4))
    close(answer.topk.log_prob, -expected.expand(4, 3))
    close(answer.entropy, expected.expand(4))


def test_statistics():
    hidden, weight, targets = head(*SHAPE)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    answer = linear_statistics(*leaves, targets, k=3)
    log_prob = (hidden @ weight.T).double().log_softmax(-1)
    best = log_prob.topk(3)
    expected = log_prob.gather(1, targets[:, None])[:, 0], -(log_prob.exp() * log_prob).sum(-1), best.values
    ours = answer.target_log_prob, answer.entropy, answer.topk.log_prob
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)
        slopes = (torch.autograd.grad(part.sum(), leaves, retain_graph=True) for part in (mine, theirs))
        close(*slopes, 1e-5 * 1024)


def test_the_twins_of_second_derivatives():
    """`torch.func` takes them; the gradients are those that the chunked code forms."""
    hidden, weight, targets = head(*SHAPE)

    def square(weight):
        return linear_cross_entropy(hidden, weight, targets, z_loss=1e-6)

    def normalizer(weight):
        return linear_statistics(hidden, weight).log_normalizer.sum()

    for call in (square, normalizer):
        leaf = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(leaf), leaf)
        close(torch.func.grad(call)(weight), slope, 1e-3)


def test_a_logit_map():
    """Sigsoftmax is nearly the identity there."""
    hidden, weight, targets = head(*SHAPE)
    expected = F.cross_entropy((hidden @ weight.T).double(), targets)
    close(linear_cross_entropy(hidden, weight, targets, logit_map=Sigsoftmax()), expected)


def with_large_columns(layer):
    """A layer whose every matrix over hidden has the column of `head`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)
            if parameter.dim() == 2 and parameter.shape[1] == layer.in_features:
                parameter[:, 0] = 2.0**10
        if isinstance(layer, AdaptiveSoftmax):
            layer.tail[0][0].weight.copy_(torch.eye(5))  # so that the tail's logits are exact too
    return layer


LAYERS = {
    "full": lambda V: FullSoftmax(5, V),
    "hierarchical": lambda V: HierarchicalSoftmax(5, V),
    "adaptive": lambda V: AdaptiveSoftmax(5, V, [V // 2], div_value=1.0),
    "mixture": lambda V: MixtureOfSoftmaxes(5, V, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """Against the same layer in float64, where nothing is lost."""
    layer = with_large_columns(LAYERS[name](SHAPE[1]))
    exact = with_large_columns(LAYERS[name](SHAPE[1])).double()
    hidden, _, targets = head(*SHAPE)
    expected = exact.log_prob(hidden.double())
    close(layer.log_prob(hidden), expected, 1e-5)
    close(layer(hidden, targets), exact(hidden.double(), targets), 1e-5)
    close(layer.target_log_prob(hidden, targets), expected.gather(1, targets[:, None])[:, 0], 1e-5)
    best = layer.topk(hidden[:6], 3)
    close(best.log_prob, expected[:6].topk(3).values, 1e-5)


@pytest.mark.parametrize("kind", [SampledSoftmax, BlackOut])
def test_sampled_losses(kind):
    """The same candidates with and without the common number."""
    answers = []
    for common in (0.0, 2.0**10):
        hidden, weight, targets = head(*SHAPE, common=common)
        layer = kind(5, SHAPE[1], LogUniform(SHAPE[1]), 50, bias=False, weight=nn.Parameter(weight))
        torch.manual_seed(4)
        loss = layer(hidden, targets)
        (slope,) = torch.autograd.grad(loss, layer.weight)
        answers.append((loss, slope[:, 1:]))
    close(*answers)


def trained(kind, mapped):
    options = {"bias": False, "logit_map": Sigsoftmax() if mapped else None}
    if kind is FullSoftmax:
        return with_large_columns(FullSoftmax(5, 600, **options))
    layer = MixtureOfSoftmaxes(5, 600, 2, **options)
    with torch.no_grad():
        signs = torch.randint(2, (10,), generator=torch.Generator().manual_seed(2)) * 2 - 1
        signs[::5] = 1
        layer.weight.copy_(torch.arange(3000).view(600, 5) % 9 / 4)
        layer.weight[:, 0] = 2.0**20
        layer.latent.weight.zero_()
        layer.latent.bias.copy_(30 * signs)  # latents of 1 and -1
    return layer


@pytest.mark.parametrize("preview", [Int8Preview(), SVDPreview(5)], ids=str)
@pytest.mark.parametrize("kind", [FullSoftmax, MixtureOfSoftmaxes])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("candidates", [100, 600])
def test_screens(preview, kind, mapped, candidates):
    """With every class a candidate the layer's own answers; with few, normalised ones."""
    layer = trained(kind, mapped)
    hidden, _, _ = head(3, 1, common=2.0**10 if kind is FullSoftmax else 1.0)
    expected = layer.log_prob(hidden)
    screen = ScreenedSoftmax.from_layer(layer, preview=preview, candidates=candidates, exact=True)
    for rows in (hidden, hidden[:1]):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                log_prob, best = screen.log_prob(rows), screen.topk(rows, 1)
            close(log_prob.double().logsumexp(-1), torch.zeros(len(rows)), 1e-5)
            if candidates == 600 or not grad:  # else the preview's scores are rounded in another way
                close(log_prob.gather(-1, best.indices), best.log_prob, 1e-5)
            if candidates == 600:
                close(log_prob, expected[: len(rows)], 1e-5)
                assert (screen.log_normalizer_error(rows) < 1e-4).all()
