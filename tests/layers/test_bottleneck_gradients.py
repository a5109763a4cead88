"""Gradients of softmaxes and mixtures under every logit map at irregular points: knots, beyond the bound, flat"""

import pytest
import torch

from lastlayer import PLIF, FullSoftmax, MixtureOfSoftmaxes, MonotoneNetwork, Sigsoftmax, SoftCap

DOUBLE = torch.float64
CLASSES = 11


def flat():
    """A PLIF whose second slope has underflowed."""
    made = PLIF(5, 2.0, init_std=1.0)
    with torch.no_grad():
        made.raw_slopes[1] = -1000.0
    return made


MAPS = {
    "none": lambda: None,
    "sigsoftmax": Sigsoftmax,
    "soft-cap": lambda: SoftCap(3.0),
    "plif": lambda: PLIF(7, 1.5, init_std=1.0),  # most logits are beyond the bound
    "plif-flat": flat,
    "network": lambda: MonotoneNetwork(4),
}
LAYERS = {
    "full": lambda made: FullSoftmax(4, CLASSES, logit_map=made, dtype=DOUBLE),
    "mixture": lambda made: MixtureOfSoftmaxes(4, CLASSES, 3, latent_features=3, logit_map=made, dtype=DOUBLE),
    "mixture-no-context": lambda made: MixtureOfSoftmaxes(
        4, CLASSES, 2, context_prior=False, logit_map=made, dtype=DOUBLE
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("make", "logit_map"),
    [*(("full", name) for name in MAPS), ("mixture", "plif-flat"), ("mixture-no-context", "none")],
)
def test_gradcheck(make, logit_map, reduction):
    """Of the loss, in hidden and every parameter of layer and map."""
    torch.manual_seed(2)
    layer = LAYERS[make](MAPS[logit_map]())
    layer.reduction = reduction
    with torch.no_grad():
        layer.weight.mul_(6)
    hidden = (2 * torch.randn(5, 4, dtype=DOUBLE)).requires_grad_()
    targets = torch.tensor([0, 3, -100, CLASSES - 1, 5])
    assert torch.autograd.gradcheck(lambda hidden, *_: layer(hidden, targets), (hidden, *layer.parameters()))


def test_at_knots():
    """There the slope is that of the right; the slopes' own gradients are those of finite differences."""
    torch.manual_seed(2)
    made = PLIF(8, 2.0, init_std=1.0).double()
    knots = torch.linspace(-2, 2, 9, dtype=DOUBLE).requires_grad_()  # exact in binary
    assert torch.autograd.gradcheck(lambda _: made(knots.detach()), (made.raw_slopes,))
    (slope,) = torch.autograd.grad(made(knots).sum(), knots)
    slopes = made.slopes.detach()
    torch.testing.assert_close(slope, torch.cat([slopes, slopes[-1:]]))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_infinite_logits(make):
    """A class ruled out by a bias of minus infinity has probability 0, and takes no gradient."""
    for name, logit_map in MAPS.items():
        if name == "soft-cap":
            continue  # it makes every logit finite: nothing can be ruled out
        torch.manual_seed(2)
        layer = make(logit_map())
        with torch.no_grad():
            layer.bias[4] = float("-inf")
        hidden = torch.randn(5, 4, dtype=DOUBLE)
        assert not layer.log_prob(hidden)[:, 4].exp().any(), name
        loss = layer(hidden, torch.tensor([0, 3, 1, 2, 5]))
        loss.backward()
        assert loss.isfinite()
        assert not layer.weight.grad[4].any(), name
        assert layer.weight.grad.isfinite().all(), name


class Falling(Sigsoftmax):
    """No increasing function."""

    def forward(self, logits):
        return -logits


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_falling_map_is_refused(make):
    with pytest.raises(ValueError, match="increasing"):
        make(Falling())


@pytest.mark.parametrize("part_numbers", [1, 3 * CLASSES, 1 << 20])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_parts_of_a_chunk(monkeypatch, make, part_numbers):
    """However few rows PyTorch's operations take at once, the gradients are the same."""
    from lastlayer.functional import linear_chunks

    torch.manual_seed(2)
    layer = make(PLIF(7, 1.5, init_std=1.0))
    hidden, targets = torch.randn(9, 4, dtype=DOUBLE), torch.randint(CLASSES, (9,))
    expected = torch.autograd.grad(-layer.log_prob(hidden)[range(9), targets].mean(), list(layer.parameters()))
    monkeypatch.setattr(linear_chunks, "PART_NUMBERS", part_numbers)
    found = torch.autograd.grad(layer(hidden, targets), list(layer.parameters()))
    torch.testing.assert_close(found, expected)
