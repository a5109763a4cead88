"""Sampled softmax: a cross-entropy over the targets and sampled candidates (Jean et al. 2015)."""

from typing import Any

from torch import Tensor

from lastlayer.functional.checks import check_choice
from lastlayer.functional.sampled_losses import below_peak, sampled_softmax_loss
from lastlayer.layers.sampled.base import Batch, SampledLayer
from lastlayer.layers.samplers.base import Sampler

CORRECTIONS = ("all", "negatives", "none")


class SampledSoftmax(SampledLayer):
    r"""`F.cross_entropy` over the target and `num_samples` candidates, corrected for how often they are drawn.

    With o the logits, y the target, j the candidates without those equal to y, c the expected counts, the loss is

        logsumexp([o_y - log c_y, o_j - log c_j, ...]) - (o_y - log c_y)          # correction="all"

    which as the samples grow tends to the full softmax's, and so do its gradients; c_y is the probability that y
    is drawn at all, as the target stands in the sum once. With `correction="negatives"` the target's own logit is
    left as it is, and the mean of the sum of exponentials is exactly that over all classes; at few samples its
    minimum is the further from the truth. With `correction="none"` frequent classes are pushed down in
    proportion to how often they are drawn: for comparison, or where all classes are equally frequent.

    Cost of a step: `6 N (K + S) d` operations and `N S` numbers; nothing depends on V with `sparse=True`, whose
    gradients `torch.optim.SGD` (no weight decay), `Adagrad` and, alone, `SparseAdam` take. Evaluation costs what
    `FullSoftmax` costs, a step at large V hundreds of times less.

    When *not* to use it: below some ten thousand classes, where the full softmax costs little more; where the
    probabilities of rare classes must be right, which few samples train.

    Args:
        in_features: d.
        num_classes: V.
        sampler: `LogUniform` or `Unigram` for words, best with `replacement=False`; `InBatch` or `Mixed` for
            items.
        num_samples: S.
        correction: "all", "negatives" or "none".
        remove_hits: whether candidates equal to a target of their row are set aside for it. With False,
            `correction="all"` and a sampler with replacement it is ranking noise-contrastive estimation, whose
            minimum is exact at any number of samples, at the price of a noisier gradient.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler`, of other classes or without so many samples; an
            argument out of range.

    Source: S. Jean et al., "On using very large target vocabulary for neural machine translation", ACL 2015;
    Y. Bengio, J.-S. Senecal, "Quick training of probabilistic neural nets by importance sampling", AISTATS 2003.

    Example:
        >>> import torch
        >>> from lastlayer import LogUniform
        >>> sampler = LogUniform(10_000, replacement=False)
        >>> layer = SampledSoftmax(16, 10_000, sampler, num_samples=100, sparse=True)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(10_000, (32,))
        >>> layer(hidden, targets).backward()
        >>> layer.target_log_prob(hidden, targets).shape  # of the full softmax
        torch.Size([32])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        correction: str = "all",
        remove_hits: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, remove_hits=remove_hits, **options)
        self.correction = check_choice("correction", correction, CORRECTIONS)
        self.target_once = remove_hits

    def _batch_loss(self, batch: Batch) -> Tensor:
        of_targets, of_candidates = below_peak(batch.target_logits, batch.candidate_logits, batch.target_weights)
        if self.correction == "all":
            of_targets = of_targets - self._target_log_counts(batch)
        if self.correction != "none":
            of_candidates = of_candidates - batch.candidate_log_counts
        return sampled_softmax_loss(of_targets, of_candidates, batch.loss_weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correction={self.correction!r}, remove_hits={self.remove_hits}"
