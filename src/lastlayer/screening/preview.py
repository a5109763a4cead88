"""What every preview is: settings that, given a weight, make something that scores all classes cheaply."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.screening.exact import full_logits


class ErrorBound(NamedTuple):
    """A bound on `|logit - score|` for every row and class, as a sum of few products.

    Row n and class i differ by at most `(of_rows @ of_classes)[n, i]`, rounding of both sides included.
    """

    of_rows: Tensor  # (N, m)
    of_classes: Tensor  # (m, V)

    def all(self) -> Tensor:  # (N, V)
        """The bound of every row and class."""
        return self.of_rows @ self.of_classes


class PreparedPreview(ABC):
    """A preview of one weight, ready to be queried; `N` rows of hidden states, `V` classes."""

    bytes_read: int  # of the preview, by one query
    of_classes: Tensor  # (m, V), the classes' part of the error bound

    @abstractmethod
    def scores(
        self,
        hidden: Tensor,  # (N, d)
    ) -> Tensor:  # (N, V)
        """Approximate logits of all classes, bias included, in the working dtype (float32, or float64)."""

    @abstractmethod
    def error(
        self,
        hidden: Tensor,  # (N, d)
    ) -> ErrorBound:
        """What the scores of these rows can be off by."""

    def follow(
        self,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
    ) -> Tensor:  # (N, V)
        """The scores as a differentiable function of hidden, weight and bias; costs what the full layer does.

        As it stands for scores that are logits but for rounding, which has no gradient of use: the scores' values,
        the logits' gradient.
        """
        logits = full_logits(hidden, weight, bias)
        rounding = self.scores(hidden.detach()) - logits.detach()
        return logits + rounding.masked_fill(logits.detach() == -torch.inf, 0.0)  # a barred class stays at -inf


class Preview(ABC):
    """Immutable settings of a preview; `prepare` does the work that is done once a weight."""

    uses_gram = False  # True where `prepare` also takes `gram=`, a ready `weight.T @ weight`

    @abstractmethod
    def prepare(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
    ) -> PreparedPreview:
        """The preview of this weight."""
