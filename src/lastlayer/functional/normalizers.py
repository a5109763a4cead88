"""Probabilities from logits in place of the softmax, many of them exactly 0, each with the loss that fits it."""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lastlayer.functional.checks import check_positive
from lastlayer.functional.ordinary import readable

STEPS_OF_BISECTION = 60
POLISHING_STEPS = 2  # of Newton's method: two give first and second derivatives, as its error is of fourth order


class Normalizer(ABC):
    """How logits become probabilities, and the training loss; `FullSoftmax(..., normalizer=)` takes one.

    Both hooks take the whole `(N, V)` logits, in float32 at least, where -inf marks a class that is barred.
    Larger logits must not have smaller probabilities.
    """

    @abstractmethod
    def log_prob(
        self,
        logits: Tensor,  # (N, V)
    ) -> Tensor:  # (N, V)
        """Log-probabilities: -inf, without a gradient, at probability 0."""

    @abstractmethod
    def loss(
        self,
        logits: Tensor,  # (N, V)
        targets: Tensor,  # (N,), class ids
    ) -> Tensor:  # (N,)
        """The training loss of every row."""

    def check(self, num_classes: int) -> None:  # noqa: B027 - most serve any number
        """A ValueError where it cannot serve so many classes."""


@dataclass(frozen=True)
class Entmax(Normalizer):
    """`p = argmax over distributions of p . z + (1 - sum(p ** alpha)) / (alpha (alpha - 1))` of logits z.

    In closed form `p_i = max((alpha - 1) z_i - tau, 0) ** (1 / (alpha - 1))`, with tau such that they sum to one:
    between the softmax (alpha near 1) and `Sparsemax` (2). Classes far below the best have probability 0.

    The loss is the Fenchel-Young loss of that maximum: its value, less `z_y`. It is convex, at least 0, has the
    gradient `p - e_y` like the cross-entropy, and is 0 once the target leads every other class by
    `1 / (alpha - 1)`. It is not `-log p_y`, which is infinite where p_y is 0.

    The threshold is found by the `entmax` package (`pip install 'lastlayer[entmax]'`): exactly at alpha 1.5 and
    2, else by bisection.

    Args:
        alpha: above 1, at most 2.

    Raises:
        ValueError: alpha out of range.
        ModuleNotFoundError: the `entmax` package is not installed.

    Source: B. Peters, V. Niculae, A. F. T. Martins, "Sparse sequence-to-sequence models", ACL 2019.

    Example:
        >>> import lastlayer
        >>> layer = lastlayer.FullSoftmax(8, 1000, normalizer=lastlayer.Entmax(1.5))
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(30)
        >>> prob = layer.log_prob(torch.randn(4, 8)).exp()
        >>> bool((prob == 0).sum(1).min() > 500), torch.allclose(prob.sum(1), torch.ones(4))
        (True, True)
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha <= 2.0:
            raise ValueError(f"alpha must be above 1 and at most 2, got {self.alpha!r}; 1 is the softmax")
        _package()

    def log_prob(self, logits: Tensor) -> Tensor:
        """`log p`, -inf where p is 0."""
        prob = self._prob(self._below_peak(logits))
        inside = prob > 0
        return torch.where(inside, prob, 1.0).log().masked_fill(~inside, -torch.inf)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`p . z - z_y + (1 - sum(p ** alpha)) / (alpha (alpha - 1))`."""
        below = self._below_peak(logits)
        prob = self._prob(below)
        inside = prob > 0
        entropy = (1 - torch.where(inside, prob, 1.0).pow(self.alpha).mul(inside).sum(1)) / (
            self.alpha * (self.alpha - 1)
        )
        own = below.gather(1, targets[:, None])[:, 0]
        return (prob * below.masked_fill(~inside, 0)).sum(1) - own + entropy

    def _below_peak(self, logits: Tensor) -> Tensor:
        """The same distribution, and no digits lost where all logits are large."""
        return logits - logits.detach().amax(1, keepdim=True)

    def _prob(self, below: Tensor) -> Tensor:
        """p of logits whose largest is 0.

        The threshold tau of the values that were found without a gradient is corrected by Newton's method, which
        is differentiable, and whose first two derivatives are those of the solution.
        """
        power = 1 / (self.alpha - 1)
        scores = ((self.alpha - 1) * below).clamp(min=-2.0)  # tau is at least -1: those below have probability 0
        with torch.no_grad():
            tau = self._threshold(scores.detach())
            inside = scores > tau
        for _ in range(POLISHING_STEPS):
            base = torch.where(inside, (scores - tau).clamp(min=0), 1.0)
            excess = (base.pow(power) * inside).sum(1, keepdim=True) - 1
            tau = tau + excess / (power * base.pow(power - 1) * inside).sum(1, keepdim=True)
        return torch.where(inside, (scores - tau).clamp(min=0), 1.0).pow(power) * inside

    def _threshold(self, scores: Tensor) -> Tensor:  # (N, V), whose largest is 0, to (N, 1)
        """tau, from the largest probability that the package finds; by bisection where no value can be read."""
        if readable(scores):
            prob = self._project(scores / (self.alpha - 1))
            return -prob.amax(1, keepdim=True).pow(self.alpha - 1)
        high = torch.zeros_like(scores[:, :1])
        low = high - 1
        for _ in range(STEPS_OF_BISECTION):
            middle = (low + high) / 2
            above = (scores - middle).clamp(min=0).pow(1 / (self.alpha - 1)).sum(1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return low

    def _project(self, logits: Tensor) -> Tensor:
        """p by the package."""
        if self.alpha == 2.0:
            return _package().sparsemax(logits, dim=1)
        if self.alpha == 1.5:
            return _package().entmax15(logits, dim=1)
        return _package().entmax_bisect(logits, alpha=self.alpha, dim=1)


class Sparsemax(Entmax):
    """The Euclidean projection of the logits onto the distributions: `Entmax(2.0)`.

    `p_i = max(z_i - tau, 0)`; the loss is `(sum over the support of z_i ** 2 - tau ** 2) / 2 + 1/2 - z_y`.

    Source: A. F. T. Martins, R. Astudillo, "From softmax to sparsemax", ICML 2016.

    Raises:
        ModuleNotFoundError: the `entmax` package is not installed.
    """

    def __init__(self) -> None:
        super().__init__(2.0)

    def __repr__(self) -> str:
        return "Sparsemax()"


@dataclass(frozen=True)
class TopKSoftmax(Normalizer):
    """The softmax of a row's k largest logits; all other classes have probability 0.

    The loss is the cross-entropy over these k and the target: classes outside them get no gradient, so that it is
    for a model that is already trained, not for a fresh one. Several other methods are called sparse softmax too.

    Args:
        k: at least 1, at most the number of classes.

    Raises:
        TypeError, ValueError: k of the wrong kind or out of range.

    Example:
        >>> import lastlayer
        >>> layer = lastlayer.FullSoftmax(8, 1000, normalizer=lastlayer.TopKSoftmax(10))
        >>> int(layer.log_prob(torch.randn(8)).isfinite().sum())
        10
    """

    k: int

    def __post_init__(self) -> None:
        check_positive("k", self.k)

    def check(self, num_classes: int) -> None:
        """At most all classes."""
        if self.k > num_classes:
            raise ValueError(f"k must be at most num_classes={num_classes}, got {self.k}")

    def log_prob(self, logits: Tensor) -> Tensor:
        """The log-softmax of the k largest, -inf elsewhere."""
        return logits.masked_fill(~self._best(logits), -torch.inf).log_softmax(1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`logsumexp` of the k largest and the target's logit, less the target's."""
        kept = self._best(logits).scatter(1, targets[:, None], True)
        return -logits.masked_fill(~kept, -torch.inf).log_softmax(1).gather(1, targets[:, None])[:, 0]

    def _best(self, logits: Tensor) -> Tensor:  # (N, V), bool
        indices = logits.detach().topk(self.k, 1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)


def _package() -> ModuleType:
    """The functions of the `entmax` package, imported when first needed."""
    try:
        return importlib.import_module("entmax")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "Entmax and Sparsemax need the entmax package: pip install 'lastlayer[entmax]'", name=missing.name
        ) from missing
