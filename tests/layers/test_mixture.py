"""What is specific to `MixtureOfSoftmaxes`: one component, rank, memory, dropout, ties, the compiled kernel."""

import pytest
import torch
from torch import nn

from lastlayer import PLIF, FullSoftmax, MixtureOfSoftmaxes, Sigsoftmax
from lastlayer.functional import linear_chunks
from lastlayer.kernels import engine

DOUBLE = torch.float64


def test_one_component_is_full_softmax():
    layer = MixtureOfSoftmaxes(6, 30, 1, latent_features=4, dtype=DOUBLE)
    full = FullSoftmax(4, 30, dtype=DOUBLE)
    full.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    hidden, targets = torch.randn(8, 6, dtype=DOUBLE), torch.randint(30, (8,))
    latent = layer.latents(hidden)[:, 0]
    torch.testing.assert_close(layer(hidden, targets), full(latent, targets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.log_prob(hidden), full.log_prob(latent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_rank_law(bias):
    """A softmax of width d has log-probabilities of rank d + 1, with a bias d + 2; a mixture has more."""
    torch.manual_seed(0)
    hidden = torch.randn(60, 5, dtype=DOUBLE)
    full = FullSoftmax(5, 50, bias=bias, dtype=DOUBLE)
    mixture = MixtureOfSoftmaxes(5, 50, 3, bias=bias, dtype=DOUBLE)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
    assert torch.linalg.matrix_rank(full.log_prob(hidden)) == 6 + bias
    assert torch.linalg.matrix_rank(mixture.log_prob(hidden)) > 20


def test_no_floor():
    """A class of probability 1e-40 keeps its loss; the usual `log(p + 1e-8)` would say 18.4."""
    layer = MixtureOfSoftmaxes(2, 3, 2, dtype=DOUBLE)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 0.0, -92.0]))
    loss = layer(torch.zeros(1, 2, dtype=DOUBLE), torch.tensor([2]))
    assert 90 < loss < 95


def test_never_holds_all_logits(monkeypatch):
    """Training makes no tensor of `N V` numbers, whatever K is."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 8 * 200 * 4)
    layer = MixtureOfSoftmaxes(4, 200, 4)
    hidden, targets = torch.randn(50, 4), torch.randint(200, (50,))
    sizes = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *s, **k: (sizes.append(s), new_empty(self, *s, **k))[1]
    )
    layer(hidden, targets).backward()
    assert (8, 200) in sizes
    assert not any(len(size) == 2 and size[0] * size[1] > 8 * 200 for size in sizes)


def test_dropout_is_of_latents_in_training():
    torch.manual_seed(0)
    layer = MixtureOfSoftmaxes(8, 20, 2, dropout=0.5)
    hidden = torch.randn(4, 8)
    assert (layer.latents(hidden) == 0).any()
    layer.eval()
    assert not (layer.latents(hidden) == 0).any()
    torch.testing.assert_close(layer.log_prob(hidden), layer.log_prob(hidden))


def test_tied_weight():
    embedding = nn.Embedding(30, 4)
    layer = MixtureOfSoftmaxes(6, 30, 2, latent_features=4, weight=embedding.weight)
    assert layer.weight is embedding.weight
    layer(torch.randn(3, 6), torch.randint(30, (3,))).backward()
    assert embedding.weight.grad.any()


@pytest.mark.parametrize(
    "logit_map", [None, Sigsoftmax, lambda: PLIF(50, 5.0)], ids=["plain", "sigsoftmax", "plif"]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_kernel_is_the_plain_one(monkeypatch, isa, logit_map, autocast):
    torch.manual_seed(1)
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 12 * 101 * 4)
    layer = MixtureOfSoftmaxes(8, 101, 3, logit_map=None if logit_map is None else logit_map())
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(101, (20,))
    targets[4] = -100
    answers = []
    for kind in (isa, None):
        with engine.forced(kind), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = layer(hidden, targets)
        answers.append([loss, *torch.autograd.grad(loss, [hidden, *layer.parameters()])])
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance / 20)


def test_backward_again():
    layer = MixtureOfSoftmaxes(4, 30, 3, dtype=DOUBLE)
    loss = 2 * layer(torch.randn(5, 4, dtype=DOUBLE), torch.randint(30, (5,)))
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(layer.parameters()))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("match", "arguments", "options"),
    [
        ("num_components", (4, 9, 0), {}),
        ("latent_features", (4, 9, 2), {"latent_features": 0}),
        ("dropout", (4, 9, 2), {"dropout": 1.5}),
        ("weight", (4, 9, 2), {"weight": nn.Parameter(torch.ones(4, 9))}),
    ],
)
def test_bad_options(match, arguments, options):
    with pytest.raises(ValueError, match=match):
        MixtureOfSoftmaxes(*arguments, **options)
