"""The spherical family: losses that see V outputs only through their squared norm, their sum, and the targets'.

(Vincent, de Brebisson and Bouthillier 2015; de Brebisson and Vincent 2016.) Such a loss and its gradient never
need the V outputs, on which `FactoredOutput` is based; `spherical_loss` is the dense twin over a plain
weight.

A loss of your own is one class with one method; its derivatives come from autograd:

>>> import torch
>>> from lastlayer.functional.spherical import SphericalLoss
>>> class SquaredHinge(SphericalLoss):
...     def row_loss(self, scores, weights, squared_norm, total, num_classes):
...         spread = (squared_norm / num_classes).sqrt()
...         return (weights * (1 - scores / spread[:, None]).clamp(min=0).square()).sum(1)
>>> scores, weights = torch.tensor([[2.0]]), torch.ones(1, 1)
>>> SquaredHinge().row_loss(scores, weights, torch.tensor([90.0]), torch.zeros(1), 10)
tensor([0.1111])
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import REDUCTIONS, check_above_zero, check_choice, check_hidden
from lastlayer.functional.reduce import reduce_loss
from lastlayer.functional.sparse_targets import sparse_targets


class RowDerivatives(NamedTuple):
    """The loss of every row and its derivatives, all float64."""

    row_loss: Tensor  # (N,)
    by_score: Tensor  # (N, K)
    by_norm: Tensor  # (N,), by the squared norm
    by_total: Tensor | None  # (N,); None where the loss does not read the sum


class SphericalLoss(ABC):
    """A loss of one example's outputs `o (V,)` that reads `o` at the targets, `||o||^2` and `sum(o)` only.

    `FactoredOutput` calls it in float64 on a few numbers a row; within a row no class occurs twice, and an entry
    of weight 0 is padding and must not count.
    """

    uses_sum = False  # True when `row_loss` reads `total`, which costs the layer two more vectors

    @abstractmethod
    def row_loss(
        self,
        scores: Tensor,  # (N, K), the outputs of the target classes
        weights: Tensor,  # (N, K), the weight of each target
        squared_norm: Tensor,  # (N,)
        total: Tensor,  # (N,), the sum of the outputs
        num_classes: int,
    ) -> Tensor:  # (N,)
        """The loss of every row."""

    def derivatives(
        self, scores: Tensor, weights: Tensor, squared_norm: Tensor, total: Tensor, num_classes: int
    ) -> RowDerivatives:
        """`row_loss` with its derivatives, from autograd.

        Raises:
            TypeError: a loss with trained parameters of its own, or `total` read without `uses_sum = True`.
        """
        with torch.enable_grad():
            if self.row_loss(scores, weights, squared_norm, total, num_classes).requires_grad:
                raise TypeError(
                    f"{type(self).__name__} has parameters that require a gradient, and none is computed"
                )
            leaves = [part.detach().requires_grad_() for part in (scores, squared_norm, total)]
            row_loss = self.row_loss(leaves[0], weights, leaves[1], leaves[2], num_classes)
            found = torch.autograd.grad(row_loss.sum(), leaves, allow_unused=True)
        if found[2] is not None and not self.uses_sum:
            raise TypeError(f"{type(self).__name__} reads total: it must set uses_sum = True")
        by_score, by_norm, by_total = (
            torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, found, strict=True)
        )
        return RowDerivatives(row_loss.detach(), by_score, by_norm, by_total if self.uses_sum else None)


class NormalizedLoss(SphericalLoss):
    """A member of the family that is the negative log-likelihood of `p_i = n(o_i) / sum_j n(o_j)`."""

    @abstractmethod
    def log_numerator(self, scores: Tensor) -> Tensor:
        """`log n(o)` of each output."""

    @abstractmethod
    def log_normalizer(self, squared_norm: Tensor, total: Tensor, num_classes: int) -> Tensor:
        """`log sum_j n(o_j)`."""

    def row_loss(
        self, scores: Tensor, weights: Tensor, squared_norm: Tensor, total: Tensor, num_classes: int
    ) -> Tensor:
        log_normalizer = self.log_normalizer(squared_norm, total, num_classes)
        return (weights * (log_normalizer[:, None] - self.log_numerator(scores))).sum(1)

    def log_prob(
        self,
        outputs: Tensor,  # (N, V)
    ) -> Tensor:  # (N, V)
        """Exact, normalised log-probabilities of every class."""
        squared_norm, total = outputs.square().sum(1), outputs.sum(1)
        return self.log_numerator(outputs) - self.log_normalizer(squared_norm, total, outputs.shape[1])[:, None]


@dataclass(frozen=True)
class SquaredError(SphericalLoss):
    """`||o - y||^2` for a sparse target `y (V,)`: regression, or embeddings trained with all negatives at once.

    No probabilities; classes are ranked by their score.
    """

    def row_loss(
        self, scores: Tensor, weights: Tensor, squared_norm: Tensor, total: Tensor, num_classes: int
    ) -> Tensor:
        return squared_norm + (weights * torch.sub(weights, scores, alpha=2)).sum(1)

    def derivatives(
        self, scores: Tensor, weights: Tensor, squared_norm: Tensor, total: Tensor, num_classes: int
    ) -> RowDerivatives:
        # In closed form: on so few numbers the calls of autograd take longer than the arithmetic.
        row_loss = self.row_loss(scores, weights, squared_norm, total, num_classes)
        return RowDerivatives(row_loss, -2 * weights, torch.ones_like(squared_norm), None)


class _QuadraticSoftmax(NormalizedLoss):
    """`p_i` proportional to `n(o_i) = a o_i^2 + b o_i + c`, which is positive everywhere."""

    @abstractmethod
    def coefficients(self) -> tuple[float, float, float]:
        """a, b and c."""

    def log_numerator(self, scores: Tensor) -> Tensor:
        a, b, c = self.coefficients()
        return ((a * scores + b) * scores + c).log()

    def log_normalizer(self, squared_norm: Tensor, total: Tensor, num_classes: int) -> Tensor:
        a, b, c = self.coefficients()
        normalizer = a * squared_norm + num_classes * c
        return (normalizer + b * total if self.uses_sum else normalizer).log()


@dataclass(frozen=True)
class SphericalSoftmax(_QuadraticSoftmax):
    """`p_i = (o_i^2 + epsilon) / sum_j (o_j^2 + epsilon)`.

    Even in `o`, and invariant to its scale but for `epsilon`. The gradient reaches `1 / sqrt(epsilon)` near
    `o = 0`, so a smaller `epsilon` needs a smaller learning rate.

    Args:
        epsilon: what keeps every probability above 0.

    Raises:
        ValueError: `epsilon` is not positive and finite.
    """

    epsilon: float = 0.05

    def __post_init__(self) -> None:
        check_above_zero("epsilon", self.epsilon)

    def coefficients(self) -> tuple[float, float, float]:
        return 1.0, 0.0, self.epsilon


@dataclass(frozen=True)
class TaylorSoftmax(_QuadraticSoftmax):
    """`p_i` proportional to `1 + o_i + o_i^2 / 2`, the softmax with `exp` cut after its second term.

    No hyperparameter, and every numerator is at least 1/2; the least probable output is `o = -1`, not minus
    infinity.
    """

    uses_sum = True

    def coefficients(self) -> tuple[float, float, float]:
        return 0.5, 1.0, 1.0


@dataclass(frozen=True)
class ZLoss(SphericalLoss):
    """`softplus(alpha (beta - z)) / alpha` of the target's z-score `z = (o - mean(o)) / std(o)`.

    Invariant to shift and scale of the outputs; `alpha` and `beta` tune it towards a top-k. No probabilities;
    classes are ranked by their score. The variance is bounded below by a millionth of the mean square, since
    outputs that are all equal have no z-score. Of one class the z-score is 0 and of two 1 and -1 whatever the
    outputs: then the gradient is exactly 0.

    Raises:
        ValueError: `alpha` is not positive and finite.
    """

    uses_sum = True

    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero("alpha", self.alpha)

    def row_loss(
        self, scores: Tensor, weights: Tensor, squared_norm: Tensor, total: Tensor, num_classes: int
    ) -> Tensor:
        mean, mean_square = total / num_classes, squared_norm / num_classes
        variance = torch.maximum(mean_square - mean.square(), 1e-6 * mean_square.detach() + 1e-30)
        z = (scores - mean[:, None]) / variance.sqrt()[:, None]
        if num_classes <= 2:
            z = z.detach() + 0 * scores
        return -(weights * F.logsigmoid(self.alpha * (z - self.beta))).sum(1) / self.alpha


def spherical_loss(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    targets: Tensor,  # (...), (..., K), or sparse (N, V)
    bias: Tensor | None = None,  # (V,)
    *,
    loss: SphericalLoss,
    target_weights: Tensor | None = None,  # the shape of targets
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:  # (), or (...) for "none"
    """`loss` of the outputs `hidden @ weight.T + bias`, by plain autograd.

    What `FactoredOutput(..., loss=loss)` computes, at O(V d) an example instead of O(d^2); use it for few
    classes, or where an optimizer other than SGD matters more than speed. Half precision is summed in float32.

    Raises:
        TypeError, ValueError, IndexError: as `FactoredOutput` does.

    Example:
        >>> import torch
        >>> from lastlayer import TaylorSoftmax
        >>> from lastlayer.functional import spherical_loss
        >>> hidden, weight = torch.ones(2, 3), torch.zeros(10, 3)
        >>> spherical_loss(hidden, weight, torch.tensor([1, 7]), loss=TaylorSoftmax())  # log 10
        tensor(2.3026)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    num_classes, in_features = weight.shape
    check_hidden(hidden, in_features, weight.dtype)
    shape = hidden.shape[:-1]
    ids, weights, kept = sparse_targets(targets, target_weights, shape, num_classes, ignore_index)
    outputs = F.linear(hidden.reshape(-1, in_features), weight, bias)  # (N, V)
    if outputs.element_size() < 4:
        outputs = outputs.float()
    squared_norm = outputs.square().sum(1, dtype=torch.float64)  # few numbers, and differences of them cancel
    total = outputs.sum(1, dtype=torch.float64)
    row_loss = loss.row_loss(outputs.gather(1, ids).double(), weights, squared_norm, total, num_classes)
    row_loss = row_loss if kept is None else row_loss.masked_fill(~kept, 0)
    reduced = reduce_loss(row_loss, kept, reduction).to(outputs.dtype)
    return reduced.reshape(shape) if reduction == "none" else reduced
