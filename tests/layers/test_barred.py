"""Classes with a bias of -inf where compiled kernels compute: in float32, and with whole blocks barred."""

import pytest
import torch

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    Sigsoftmax,
    SoftCap,
)

V, WIDTH, ROWS = 5000, 8, 60
LAYERS = {
    "full": lambda: FullSoftmax(WIDTH, V),
    "full, no map's -inf is one": lambda: FullSoftmax(WIDTH, V, logit_map=SoftCap(5.0)),
    "full, sigsoftmax": lambda: FullSoftmax(WIDTH, V, logit_map=Sigsoftmax()),
    "full, plif": lambda: FullSoftmax(WIDTH, V, logit_map=PLIF(50, 4.0)),
    "mixture": lambda: MixtureOfSoftmaxes(WIDTH, V, 2),
    "two levels": lambda: HierarchicalSoftmax(WIDTH, V),
    "two levels, sparse": lambda: HierarchicalSoftmax(WIDTH, V, sparse=True),
    "two clusters": lambda: HierarchicalSoftmax(WIDTH, V, clusters=(torch.arange(V) >= 2500).long()),
}
BARRED = torch.cat([torch.arange(1000, 4000), torch.arange(4100, V, 7)])


def make(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias[BARRED] = -torch.inf  # the classes' own order: clusters are of neighbouring ids
    hidden = torch.randn(ROWS, WIDTH)
    targets = torch.arange(ROWS) * 16
    return layer.to(dtype), hidden.to(dtype), targets


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_as_float64(name):
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, hidden, targets = make(name, dtype)
        hidden.requires_grad_()
        loss = layer(hidden, targets)
        loss.backward()
        slopes = {key: parameter.grad.to_dense().double() for key, parameter in layer.named_parameters()}
        assert not slopes["weight"][BARRED].any()
        assert not slopes["bias"][BARRED].any()
        found.append({"loss": loss.detach().double(), "hidden": hidden.grad.double(), **slopes})
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_queries_return_none_of_them(name):
    layer, hidden, _ = make(name, torch.float32)
    best = layer.topk(hidden, V)
    left = V - len(BARRED)
    assert bool((best.indices[:, :left] >= 0).all() and (best.indices[:, left:] == -1).all())
    assert not torch.isin(best.indices, BARRED).any()
    assert not torch.isin(layer.sample(hidden, 200), BARRED).any()
    first = layer.topk(hidden, 3, exclude=best.indices[:, :1])
    assert torch.equal(first.indices, best.indices[:, 1:4])


@pytest.mark.parametrize("name", LAYERS)
def test_a_barred_target_has_infinite_loss_and_no_nan(name):
    layer, hidden, targets = make(name, torch.float32)
    targets[0] = 2000
    layer.reduction = "none"
    loss = layer(hidden, targets)
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()
    loss.sum().backward()
    assert not any(parameter.grad.to_dense().isnan().any() for parameter in layer.parameters())


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_of_the_head_of_adaptive_softmax(ignore_index):
    """A class of the head, and a whole tail."""
    torch.manual_seed(0)
    layer = AdaptiveSoftmax(WIDTH, 300, [40, 100], div_value=2.0, head_bias=True, ignore_index=ignore_index)
    with torch.no_grad():
        layer.head.bias[[5, 41]] = -torch.inf  # class 5, and the classes from 100 on
    hidden = torch.randn(ROWS, WIDTH)
    barred = torch.zeros(300, dtype=torch.bool)
    barred[5], barred[100:] = True, True
    log_prob = layer.log_prob(hidden)
    assert torch.equal(log_prob == -torch.inf, barred.expand(ROWS, -1))
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(ROWS))
    assert not barred[layer.sample(hidden, 100)].any()
    best = layer.topk(hidden, 300)
    assert torch.equal(best.indices == -1, best.log_prob == -torch.inf)
    loss = layer(hidden, torch.arange(ROWS) % 40 + 45)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert layer.head.bias.grad[[5, 41]].tolist() == [0, 0]
