"""The gradient of `FactoredOutput`'s weight, as the few matrices of N rows that determine it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.kernels.factored import sparse_overlap


@dataclass
class FactoredGradient:
    """One backward pass, or several at the same weight: what the step needs, N rows in all."""

    pair: Tensor  # (2 N, d), H over `both`: each has products with H
    ids: Tensor  # (N, K)
    target: Tensor  # (N, K), dL/da
    norm: Tensor  # (N,), dL/dq
    total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    products: Tensor  # (N, 3 d + 2), of H with Q, U, offset, total and R (the last not where `prefers_features`)

    @property
    def hidden(self) -> Tensor:  # (N, d), H
        return self.pair[: len(self.ids)]

    @property
    def both(self) -> Tensor:  # (N, d), the gradient of hidden and its sparse part: D H Q + 2 sparse
        return self.pair[len(self.ids) :]

    @property
    def sparse(self) -> Tensor:  # (N, d), Y W + g_s total^T
        return (self.both - 2 * self.norm[:, None] * self.products[:, : self.both.shape[1]]) / 2

    def scale(self, factor: float) -> None:
        """Multiplies the gradient of the loss."""
        self.target, self.norm = self.target * factor, self.norm * factor
        self.pair = torch.cat([self.hidden, self.both * factor])
        if self.total is not None:
            self.total = self.total * factor

    @classmethod
    def joined(cls, parts: Sequence["FactoredGradient"]) -> "FactoredGradient":
        """Several passes as one of all their rows."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)
        needed = min(part.products.shape[1] for part in parts)  # a large pass is without H R^T, and so is the step
        ids, target = (
            torch.cat([F.pad(getattr(part, name), (0, width - part.ids.shape[1])) for part in parts])
            for name in ("ids", "target")
        )
        return cls(
            pair=torch.cat([part.hidden for part in parts] + [part.both for part in parts]),
            ids=ids,
            target=target,
            norm=torch.cat([part.norm for part in parts]),
            total=None if parts[0].total is None else torch.cat([part.total for part in parts]),  # pyright: ignore
            products=torch.cat([part.products[:, :needed] for part in parts]),
        )


def gradient_norm(gradient: FactoredGradient, num_classes: int) -> float:
    """`||dL/dW||_F`, exact: the sum of `(G G^T) o (H H^T)`, in float64."""
    hidden = gradient.hidden.double()
    overlap = hidden @ hidden.T
    weighted = overlap @ (2 * gradient.norm.double()[:, None] * hidden)
    targets = sparse_overlap(gradient.ids, gradient.target, gradient.total, num_classes).double()
    square = (weighted * gradient.both.double()).sum() + (targets * overlap).sum()
    return float(square.clamp(min=0).sqrt())
