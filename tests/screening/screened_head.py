"""A small head whose directions matter unequally, and screens of it, for the tests beside this file."""

import torch

from lastlayer import LogitMap, ScreenedSoftmax, ScreenedTopK, SVDPreview

V, D = 203, 12


class Doubled(LogitMap):
    """An increasing map of one logit."""

    def forward(self, logits):
        return 2 * logits + logits.clamp(min=0)


def head(num_classes=V, width=D, dtype=torch.float64, seed=0, decay=True):
    """A weight whose directions matter unequally, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.05, width, dtype=torch.float64) if decay else 1.0
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64) * scale
    return weight.to(dtype), torch.randn(num_classes, generator=generator, dtype=torch.float64).to(dtype)


def coarse_head(num_classes=700, width=48, dtype=torch.float64, seed=4):
    """Hidden states of which one coordinate makes the steps of the others coarse."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    hidden = 3 * torch.randn(200, width, generator=generator, dtype=torch.float64)
    hidden[:, 5] *= 20
    return weight.to(dtype), bias.to(dtype), hidden.to(dtype)


def turned_head(num_classes=700, width=48, dtype=torch.float64, seed=4):
    """Hidden states whose directions matter very unequally, in no coordinate's own direction."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(width, width)).Q
    hidden = (3 * normal(400, width) / torch.arange(1, width + 1)) @ basis
    hidden[:, 0] += 4
    return normal(num_classes, width).to(dtype), normal(num_classes).to(dtype), hidden.to(dtype)


def states(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def screened(weight, bias=None, *, window=4, candidates=20, **settings):
    return ScreenedSoftmax(weight, bias, preview=SVDPreview(window), candidates=candidates, **settings)


def topk(layer, hidden, k, exact=None, rows=8):
    """`layer.topk` by few rows at a time: for many at once the full layer would run."""
    parts = [layer.topk(part, k, exact) for part in hidden.split(rows)]
    return ScreenedTopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


def by_rows(call, hidden):
    """`call` of one row at a time."""
    return torch.cat([call(row) for row in hidden.split(1)])


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
