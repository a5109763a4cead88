"""What queries return: named tuples, best first."""

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The `k` most probable classes of every row, best first."""

    log_prob: Tensor  # (..., k)
    indices: Tensor  # (..., k), class ids


class ScoreTopK(NamedTuple):
    """The `k` best classes of a method that has scores but no probabilities, best first."""

    scores: Tensor  # (..., k)
    indices: Tensor  # (..., k), class ids


class ScreenedTopK(NamedTuple):
    """A screened result; where `certified`, indices and their logits are proved equal to the full layer's."""

    log_prob: Tensor  # (..., k)
    indices: Tensor  # (..., k), class ids
    certified: Tensor  # (...), bool
