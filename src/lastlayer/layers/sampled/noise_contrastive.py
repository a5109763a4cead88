"""Noise-contrastive estimation: distinguish data from noise (Gutmann and Hyvarinen 2010; Mnih and Teh 2012)."""

import math
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.linear_statistics import linear_statistics
from lastlayer.functional.sampled_losses import noise_contrastive_loss
from lastlayer.layers.sampled.base import Batch, SampledLayer
from lastlayer.layers.samplers.base import Sampler


class NoiseContrastive(SampledLayer):
    r"""Logistic regression of the target against k noise classes, with `log(k q)` subtracted from every logit.

    With s the logits less `log_normalizer`, y the target, j the noise, q the noise distribution, the loss is

        -F.logsigmoid(s_y - log(k q_y)) - sum over j of F.logsigmoid(-(s_j - log(k q_j)))

    Its minimum is `s = log P`: the logits normalise themselves, so that a score needs no sum over the classes.
    `log_normalizers(hidden)` returns how nearly they do. Noise may be the target itself, as the derivation has it.

    Cost of a step: `6 N (K + S) d` operations; nothing depends on V with `sparse=True`.

    When *not* to use it: where only perplexity counts, `SampledSoftmax` learns more from the same samples.

    Args:
        in_features: d.
        num_classes: V.
        sampler: the noise, with replacement; `Unigram(counts)` is usual.
        num_samples: k.
        log_normalizer: subtracted from every logit; None: `log V` without a bias, and 0 with one, which then
            starts at `-log V`, so that a fresh layer is about normalised.
        remove_hits: whether noise that is the target is set aside.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler` or of other classes; an argument out of range.

    Source: M. Gutmann, A. Hyvarinen, "Noise-contrastive estimation", AISTATS 2010; A. Mnih, Y. W. Teh, "A fast and
    simple algorithm for training neural probabilistic language models", ICML 2012.

    Example:
        >>> from lastlayer import Unigram
        >>> counts = 1 / torch.arange(1, 1001)
        >>> layer = NoiseContrastive(16, 1000, Unigram(counts), num_samples=50, sparse=True)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(1000, (32,))
        >>> layer(hidden, targets).backward()
        >>> layer.log_normalizers(hidden).shape
        torch.Size([32])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        log_normalizer: float | None = None,
        remove_hits: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, remove_hits=remove_hits, **options)
        if log_normalizer is None:
            self._start_bias(-math.log(self.num_classes))
            log_normalizer = math.log(self.num_classes) if self.bias is None else 0.0
        if not math.isfinite(log_normalizer):
            raise ValueError(f"log_normalizer must be finite, got {log_normalizer!r}")
        self.log_normalizer = log_normalizer

    @torch.no_grad()
    def log_normalizers(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (...)
        """`log sum exp(s)` over all classes, 0 where the logits are log-probabilities as they stand."""
        rows = self._rows(hidden)
        found = linear_statistics(rows, self.weight, bias=self.bias).log_normalizer - self.log_normalizer
        return found.reshape(hidden.shape[:-1])

    def _batch_loss(self, batch: Batch) -> Tensor:
        of_targets = batch.target_logits - self.log_normalizer - self._target_log_counts(batch)
        of_noise = batch.candidate_logits - self.log_normalizer - batch.candidate_log_counts
        return noise_contrastive_loss(of_targets, of_noise, batch.loss_weights, batch.noise_weights)
