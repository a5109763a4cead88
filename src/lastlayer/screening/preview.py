"""What every preview is: settings that, given a weight, make something that scores all classes cheaply."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lastlayer.screening.exact import full_logits
from lastlayer.screening.summary import Summary


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
    normalizer_shift: Tensor | None = None  # (V,), added to scores in the normaliser only

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
        return logits + (self.scores(hidden.detach()) - logits.detach())

    def summary(
        self,
        hidden: Tensor,  # (N, d), float32 on a CPU
        workers: int,
    ) -> tuple[Summary, np.ndarray]:
        """Scores summarised for the fused kernels, and the rows' part of the error bound, `(N, m)` float32.

        Override it where scores and summary can be made in one pass.
        """
        return Summary.of(self.scores(hidden)), self.error(hidden).of_rows.contiguous().numpy()

    def one_call(self) -> "OneCall | None":
        """The kernel that scans and answers for one hidden state in one call, where there is one."""
        return None


class OneCall(NamedTuple):
    """A kernel of `kernels.screening.query`, and what it keeps between calls."""

    kernel: Any
    kept: tuple[Any, ...]  # what it has before `room` and `layer`
    of_row: np.ndarray  # (m,) float32, the rows' part of the error bound: room, all but constants


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
