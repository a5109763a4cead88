"""What `FactoredSGD` refuses beside singular steps: no layers, a layer twice, a weight that would overflow."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from lastlayer import FactoredOutput, FactoredSGD, SquaredError


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (lambda layer: [], ValueError, "at least one FactoredOutput"),
        (lambda layer: [layer, layer], ValueError, "one occurs twice"),
        (lambda layer: [{"params": [layer, layer]}], ValueError, "one occurs twice"),
        (lambda layer: nn.Linear(2, 3), TypeError, "got Linear"),
        (lambda layer: [layer, nn.Linear(2, 3)], TypeError, "got Linear"),
    ],
)
def test_layers(layers, error, message):
    layer = FactoredOutput(12, 500)
    with pytest.raises(error, match=message):
        FactoredSGD(layers(layer), lr=0.1)
    assert layer._ledger.owner is None


@pytest.mark.parametrize(("classes", "features", "rows"), [(500, 12, 8), (5000, 64, 64), (300, 6, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:lr reverses a direction")
def test_steps_that_diverge_end_in_a_refusal(classes, features, rows, dtype):
    """As plain SGD would, the weight grows at every step; it never becomes NaN."""
    generator = torch.Generator().manual_seed(1)
    layer = FactoredOutput(features, classes, loss=SquaredError(), dtype=dtype)
    optimizer = FactoredSGD(layer, lr=1e6)
    message = None
    for _ in range(60):
        optimizer.zero_grad()
        hidden = torch.randn(rows, features, generator=generator, dtype=dtype)
        layer(hidden, torch.randint(classes, (rows,), generator=generator)).backward()
        before = layer.weight
        try:
            optimizer.step()
        except ValueError as error:
            message = str(error)
            break
        assert layer.weight.isfinite().all()
    assert message is not None
    assert "range of torch.float" in message
    assert torch.equal(layer.weight, before)


def test_second_derivatives_and_transforms_are_refused_in_training():
    layer = FactoredOutput(4, 12)
    optimizer = FactoredSGD(layer, lr=0.1)
    hidden, targets = torch.randn(3, 4), torch.tensor([0, 5, 11])

    def loss(hidden):
        return layer(hidden, targets)

    def by_backward(hidden):
        leaf = hidden.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        slope.square().sum().backward(inputs=[leaf])

    ways = by_backward, lambda h: torch.autograd.functional.hvp(loss, h, h), lambda h: hessian(loss, h)
    for way in ways:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            way(hidden)
    for transform in (torch.func.grad(loss), lambda h: torch.func.jvp(loss, (h,), (h,)), torch.func.vmap(loss)):
        with pytest.raises(RuntimeError, match=r"FactoredOutput of lastlayer .* layer\.eval\(\)"):
            transform(hidden)
    layer.eval()
    torch.testing.assert_close(torch.func.hessian(loss)(hidden), hessian(loss, hidden))
    del optimizer
