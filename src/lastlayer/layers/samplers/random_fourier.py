"""Classes by an estimate of their softmax (Rawat et al. 2019)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import check_above_zero, check_positive
from lastlayer.layers.samplers.kernel_tree import KernelTree


class RandomFourier(KernelTree):
    """`q_i` about proportional to `exp(temperature * cos(h, weight_i))`: the softmax of normalised embeddings.

    For unit vectors `exp(t h.w)` is `exp(t)` times the Gaussian kernel `exp(-t |h - w|^2 / 2)`, of which D random
    frequencies give 2 D features: a draw costs `O(D log V)`. The features' estimates are noisy, and can be
    negative for far pairs: the mass below a node is taken to be no less than the kernel's least value for each of
    its classes, and `log_prob` is of what was drawn from. In a leaf the kernel itself is used. The bias of a class
    is ignored, unless it is -inf.

    For layers whose logits are cosines times a temperature. A temperature above about 8 needs very many
    features; `QuadraticKernel` follows logits of any size.

    Args:
        num_classes: V.
        in_features: d.
        temperature: t.
        num_frequencies: D.
        leaf_size: classes that are scored one by one at the end of a descent.

    Source: A. S. Rawat et al., "Sampled softmax with random Fourier features", NeurIPS 2019.

    >>> weight, hidden = torch.randn(100, 4), torch.randn(2, 4)
    >>> sampler = RandomFourier(100, 4)
    >>> sampler.update(weight)
    >>> sampler.sample(6, hidden).ids.shape
    torch.Size([2, 6])
    """

    frequencies: Tensor  # (d, D)

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        temperature: float = 2.0,
        num_frequencies: int = 256,
        leaf_size: int = 64,
    ) -> None:
        super().__init__(num_classes, in_features, leaf_size=leaf_size)
        self.temperature = check_above_zero("temperature", temperature)
        self.num_frequencies = check_positive("num_frequencies", num_frequencies)
        drawn = torch.randn(in_features, self.num_frequencies, dtype=torch.float64)
        self.register_buffer("frequencies", drawn * math.sqrt(temperature))
        self.floor = math.exp(-2 * temperature)  # at opposite vectors

    def _features(self, rows: Tensor) -> Tensor:
        angles = F.normalize(rows[:, :-1], dim=1) @ self.frequencies.to(rows.dtype)
        return torch.cat([angles.cos(), angles.sin()], 1) * self.num_frequencies**-0.5

    def _feature_sums(self, rows: Tensor, alive: Tensor) -> Tensor:
        features = self._features(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return (features * alive[..., None]).sum(1)

    def _kernel(self, hidden: Tensor, classes: Tensor) -> Tensor:
        cosines = F.normalize(hidden[:, :-1], dim=1) @ F.normalize(classes[:, :-1], dim=1).T
        return (self.temperature * (cosines - 1)).exp()
