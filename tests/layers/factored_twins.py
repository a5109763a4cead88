"""A factored layer beside plain SGD on a dense weight, and the batches they train on."""

import torch
from torch import nn

from lastlayer import FactoredOutput, FactoredSGD, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.functional import spherical_loss

D, V = 12, 200
LOSSES = [SquaredError(), SphericalSoftmax(), TaylorSoftmax(), ZLoss(alpha=1.5, beta=0.3)]
RATES = dict(zip(LOSSES, (0.004, 0.01, 0.05, 0.05), strict=True))


class Twins:
    """A factored layer and a dense weight under the same loss, each with its own SGD."""

    def __init__(self, loss, lr=None, *, bias=False, reduction="sum", dtype=torch.float64, d=D, v=V, **settings):
        torch.manual_seed(0)
        self.loss = loss
        lr = RATES[loss] if lr is None else lr
        self.layer = FactoredOutput(d, v, loss=loss, bias=bias, reduction=reduction, dtype=dtype)
        self.optimizer = FactoredSGD(self.layer, lr, **settings)
        self.weight = self.layer.weight.clone().requires_grad_()
        self.bias = self.layer.bias.clone().requires_grad_() if bias else None
        self.parameters = [self.weight] + ([self.bias] if bias else [])
        self.max_norm = settings.pop("max_norm", None)
        self.dense = torch.optim.SGD(self.parameters, lr, **settings)

    def backward(self, hidden, targets, weights=None):
        """Loss and gradient of hidden of both, compared."""
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        ours = self.layer(leaves[0], targets, weights)
        theirs = spherical_loss(
            leaves[1],
            self.weight,
            targets,
            self.bias,
            loss=self.loss,
            target_weights=weights,
            reduction=self.layer.reduction,
        )
        ours.sum().backward()
        theirs.sum().backward()
        return ours.detach(), theirs.detach(), leaves[0].grad, leaves[1].grad

    def step(self):
        self.optimizer.step()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.dense.step()
        self.optimizer.zero_grad()
        self.dense.zero_grad()

    def compare(self, tolerance=1e-10):
        assert worst(self.layer.weight, self.weight.detach()) < tolerance
        if self.bias is not None:
            assert worst(self.layer.bias, self.bias.detach()) < tolerance
        drift = self.layer.consistency()
        assert max(drift.inverse, drift.gram, drift.total) < tolerance

    def train(self, batches, tolerance=1e-10):
        for batch in batches:
            loss, expected, grad, expected_grad = self.backward(*batch)
            assert worst(loss, expected) < tolerance
            assert worst(grad, expected_grad) < tolerance
            self.step()
        self.compare(tolerance)


def worst(actual, expected):
    """The largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def batches(steps, rows=9, k=3, d=D, v=V, scale=0.5, dtype=torch.float64, seed=1):
    """Random steps in which classes repeat across rows and twice within one, and some ids are padding."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        hidden = scale * torch.randn(rows, d, generator=generator, dtype=torch.float64)
        ids = torch.randint(v, (rows, k), generator=generator)
        weights = torch.rand(rows, k, generator=generator, dtype=torch.float64)
        ids[1:3] = ids[0]
        if k > 1:
            ids[0, 1] = ids[0, 0]
            ids[3, 1:] = -100
            ids[4] = -100
        yield hidden.to(dtype), ids, weights.to(dtype)


def snapshot(layer):
    """Copies of all that a step of the layer changes."""
    return [part.clone() for part in layer.state.tensors().values()]
