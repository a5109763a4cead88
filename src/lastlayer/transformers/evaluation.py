"""What `Trainer` keeps of the logits of an evaluation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lastlayer.functional.checks import check_count


def top_predictions(k: int = 1) -> Callable[[Any, Any], Tensor]:
    """A `preprocess_logits_for_metrics` for `Trainer`: of the logits `(N, T, V)` it keeps the `k` best class ids.

    Under `chunked_loss` they are computed over chunks of rows, and never all logits at once. `compute_metrics`
    gets `predictions (N, T, k)`, best first, whose `[..., 0]` is `argmax(-1)`. Without a
    `preprocess_logits_for_metrics` `Trainer` gathers all logits of the data set.

    Args:
        k: from 1 to the number of classes.

    Cost: one product of `2 N T V d` operations; memory one chunk of logits.

    >>> import torch
    >>> keep = top_predictions(2)
    >>> keep(torch.tensor([[[0.1, 0.9, 0.5]]]), None)
    tensor([[[1, 2]]])
    """
    check_count("k", k, 1)

    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> Tensor:
        if isinstance(logits, (tuple, list)):  # other outputs follow, as of encoder-decoder models
            logits = logits[0]
        return logits.topk(k).indices

    return preprocess_logits_for_metrics
