"""Negative sampling: push the target up, sampled classes down (Mikolov et al. 2013)."""

import math
from typing import Any

from torch import Tensor

from lastlayer.functional.checks import check_fraction
from lastlayer.functional.sampled_losses import noise_contrastive_loss, positive_power
from lastlayer.layers.sampled.base import Batch, SampledLayer
from lastlayer.layers.samplers.base import Sampler


class NegativeSampling(SampledLayer):
    r"""`-beta F.logsigmoid(o_y) - sum over j of F.logsigmoid(-o_j)`: word2vec's loss, with k negatives j.

    Noise-contrastive estimation without its correction: the minimum is `o = log P - log(k q)`, which ranks classes
    by how much likelier they are than under the sampler, not by their probability. Useful for embeddings; and with
    uniform negatives for ranking, since q is then the same for all.

    With `calibration` t above 0 it is the generalised binary cross-entropy, whose positive term has the power
    `beta = t (alpha - 1) + 1`, `alpha = k / (V - 1)`: it corrects the overconfidence that comes from seeing a
    share alpha of the negatives only. At t = 1 the sigmoids are those of training on all negatives.

    A fresh bias is `-log k`: each class is as rare as the target is among its negatives. From 0 on, the gradients
    of k negatives a row would first move every class down, which takes Adagrad and its like hundreds of steps.

    `log_prob` is the softmax of the logits, which is *not* what they were trained to be; `topk` ranks by them.

    Cost of a step: `6 N (K + S) d` operations; nothing depends on V with `sparse=True`.

    When *not* to use it: where probabilities are needed, use `SampledSoftmax` or `NoiseContrastive`.

    Args:
        in_features: d.
        num_classes: V.
        sampler: of the negatives; word2vec's is `Unigram(counts, power=0.75)`.
        num_samples: k.
        calibration: t, from 0 to 1; about 0.75 in gSASRec.
        remove_hits: whether negatives that are a target of their row are set aside for it, as word2vec does.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler` or of other classes; an argument out of range.

    Source: T. Mikolov et al., "Distributed representations of words and phrases and their compositionality", 2013;
    A. Petrov, C. Macdonald, "gSASRec", RecSys 2023.

    Example:
        >>> import torch
        >>> from lastlayer import Uniform
        >>> layer = NegativeSampling(16, 1000, Uniform(1000), num_samples=64, calibration=0.75, sparse=True)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(1000, (32,))
        >>> layer(hidden, targets).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        calibration: float = 0.0,
        remove_hits: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, remove_hits=remove_hits, **options)
        self.calibration = check_fraction("calibration", calibration)
        self._start_bias(-math.log(self.num_samples))

    def _batch_loss(self, batch: Batch) -> Tensor:
        power = positive_power(self.num_samples, self.num_classes, self.calibration)
        weights = batch.loss_weights * power
        return noise_contrastive_loss(batch.target_logits, batch.candidate_logits, weights, batch.noise_weights)
