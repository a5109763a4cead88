"""Every class with the same probability."""

import math

import torch
from torch import Tensor

from lastlayer.layers.samplers.independent import IndependentSampler


class Uniform(IndependentSampler):
    """`q_i = 1 / V`: `torch.randint(V, (num_samples,))`.

    The right choice where nothing is known of the classes, and the worst where a few of them are frequent: their
    terms of the sum are then hardly ever sampled. O(1) a draw.

    Args:
        num_classes: V.
        replacement, shared: whether a class may come twice; one set for all rows, or one for each.

    >>> sampler = Uniform(1000, replacement=False)
    >>> ids, log_expected_counts = sampler.sample(10)
    >>> len(set(ids.tolist())), round(float(log_expected_counts[0].exp()), 4)
    (10, 0.01)
    """

    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        return torch.randint(self.num_classes, (num_sets, num_samples), device=device)

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`-log V`."""
        return torch.full(ids.shape, -math.log(self.num_classes), dtype=torch.float32, device=ids.device)
