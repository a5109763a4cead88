"""BlackOut: a discriminative sampled softmax (Ji et al. 2016)."""

from typing import Any

from torch import Tensor

from lastlayer.functional.sampled_losses import below_peak, black_out_loss
from lastlayer.layers.sampled.base import Batch, SampledLayer
from lastlayer.layers.samplers.base import Sampler


class BlackOut(SampledLayer):
    r"""`-log p_y - sum over j of log(1 - p_j)`, with p a softmax of `o - log q` over target and candidates.

    With weights `rho = 1 / q` of the sampling distribution q, o the logits, j the candidates without the target,

        p_i = rho_i exp(o_i) / (rho_y exp(o_y) + sum over j of rho_j exp(o_j))

    In addition to the sampled softmax's term for the target it has one that lowers each candidate, which gives
    more signal from few samples. A flatter q than the counts' works best: `Unigram(counts, power=0.4)`, or 0.1 for
    a million classes.

    Cost of a step: `6 N (K + S) d` operations; nothing depends on V with `sparse=True`.

    When *not* to use it: it is not consistent: more samples do not bring it to the full softmax's loss.

    Args:
        in_features: d.
        num_classes: V.
        sampler: of the candidates.
        num_samples: S; 400 for 64,000 classes, 2,000 for a million in the paper.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler` or of other classes; an argument out of range.

    Source: S. Ji et al., "BlackOut: speeding up recurrent neural network language models with very large
    vocabularies", ICLR 2016.

    Example:
        >>> import torch
        >>> from lastlayer import Unigram
        >>> counts = 1 / torch.arange(1, 1001)
        >>> layer = BlackOut(16, 1000, Unigram(counts, power=0.4), num_samples=50, sparse=True)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(1000, (32,))
        >>> layer(hidden, targets).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    def __init__(
        self, in_features: int, num_classes: int, sampler: Sampler, num_samples: int, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, remove_hits=True, **options)

    def _batch_loss(self, batch: Batch) -> Tensor:
        of_targets, of_candidates = below_peak(batch.target_logits, batch.candidate_logits, batch.target_weights)
        of_targets = of_targets - self._target_log_counts(batch)
        of_candidates = of_candidates - batch.candidate_log_counts
        return black_out_loss(of_targets, of_candidates, batch.loss_weights, batch.noise_weights)
