"""What queries return: named tuples, best first."""

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The `k` most probable classes of every row, best first.

    Attributes:
        log_prob: `(..., k)`, log-probabilities of the whole model.
        indices: `(..., k)`, class ids.
    """

    log_prob: Tensor
    indices: Tensor


class ScoreTopK(NamedTuple):
    """The `k` best classes of a method that has scores but no probabilities, best first.

    Attributes:
        scores: `(..., k)`.
        indices: `(..., k)`, class ids.
    """

    scores: Tensor
    indices: Tensor


class ScreenedTopK(NamedTuple):
    """A screened result; where `certified`, indices and their logits are proved equal to the full layer's.

    Attributes:
        log_prob: `(..., k)`, log-probabilities by the screen's normaliser.
        indices: `(..., k)`, class ids, best first.
        certified: `(...)`, bool, one for each row.
    """

    log_prob: Tensor
    indices: Tensor
    certified: Tensor
