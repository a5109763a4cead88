"""A sampler with fixed samples, so that losses can be computed by hand."""

import torch

from lastlayer import Candidates, Sampler


class Given(Sampler):
    """Draws the given ids; expected counts and inclusion are those of a given distribution."""

    def __init__(self, ids, prob):
        super().__init__(len(prob), shared=ids.dim() == 1)
        self.ids, self.prob = ids, prob.double()

    def sample(self, num_samples, hidden=None):
        ids = self.ids if self.ids.dim() == 1 else self.ids[: len(hidden)]
        return Candidates(ids, self.log_expected_counts(ids, num_samples, hidden))

    def log_prob(self, ids, hidden=None):
        return self.prob.log()[ids]

    def log_expected_counts(self, ids, num_samples, hidden=None):
        return (num_samples * self.prob).log()[ids]

    def log_inclusion(self, ids, num_samples, hidden=None):
        return (1 - (1 - self.prob) ** num_samples).log()[ids]


def distribution(num_classes, seed=0):
    """Some probabilities."""
    prob = torch.rand(num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return prob / prob.sum()
