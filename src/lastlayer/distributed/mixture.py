"""`MixtureOfSoftmaxes` with its classes divided among ranks."""

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied, same_random_numbers
from lastlayer.distributed.linear import DividedHead, divided_score
from lastlayer.distributed.queries import log_softmax_of_ranks
from lastlayer.distributed.row_scores import Part, RowScoredLayer
from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.logit_map import barred_classes
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.mixture import MixtureOfSoftmaxes


class ShardedMixtureOfSoftmaxes(RowScoredLayer, MixtureOfSoftmaxes):
    """`MixtureOfSoftmaxes` over all ranks: each holds the latents of all components, and its own classes.

    Of N rows and K components a training step sends, by the counts of results: forward 3 N K numbers and
    backward N K d, d the width of the latents; all by all-reduce. With dropout every rank drops the same
    numbers, and the state of the first rank's random numbers is sent, some kB. Cost of a rank: `8 N K V d /
    ranks` operations, as the backward pass forms the logits again, and all of the latents'.
    """

    DIVIDED = ("weight", "bias")
    PARTIAL = ("logit_map.",)

    def latents(self, hidden: Tensor) -> Tensor:
        """The hidden state of each component, the same on all ranks."""
        return self._run("latents", lambda: self._same_latents(hidden), hidden=hidden)

    def log_prior(self, hidden: Tensor) -> Tensor:
        """The log of each component's share."""
        return self._run("log_prior", lambda: MixtureOfSoftmaxes.log_prior(self, hidden), hidden=hidden)

    def _same_latents(self, hidden: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return MixtureOfSoftmaxes.latents(self, hidden)
        with same_random_numbers(self.ranks, hidden.device):
            return MixtureOfSoftmaxes.latents(self, hidden)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return OutputLayer._loss(self, hidden, targets)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._score(hidden, targets[:, None])[:, 0]

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        K = self.num_components
        head = DividedHead(self.weight, self.bias, self.logit_map, self.num_classes, self.ranks)
        latents = self._same_latents(hidden).flatten(0, 1)
        inside = divided_score(head, copied(latents, self.ranks), ids.repeat_interleave(K, 0))
        joint = inside.unflatten(0, (hidden.shape[0], K)) + MixtureOfSoftmaxes.log_prior(self, hidden)[:, :, None]
        absent = joint.detach().amax(1) == -torch.inf  # of -inf alone, logsumexp has no gradient
        return joint.masked_fill(absent[:, None], 0).logsumexp(1).masked_fill(absent, -torch.inf)

    def _own_scores(self, hidden: Tensor) -> list[Part]:
        log_prior = copied(MixtureOfSoftmaxes.log_prior(self, hidden), self.ranks)
        latents = copied(self._same_latents(hidden), self.ranks)
        barred, total = barred_classes(self.bias), None
        for latent, share in zip(latents.unbind(1), log_prior.unbind(1), strict=True):
            logits = mapped_logits(latent, self.weight, self.bias, self.logit_map)
            part = log_softmax_of_ranks(logits, self.ranks) + share[:, None]
            if barred is not None:
                part = part.masked_fill(barred, 0)  # of two -inf, logaddexp has no gradient
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None  # there is at least one component
        total = total if barred is None else total.masked_fill(barred, -torch.inf)
        return [(total, self.ranks.span(self.num_classes))]
