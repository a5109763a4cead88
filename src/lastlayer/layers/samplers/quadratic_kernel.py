"""Classes by the square of their logits (Blanc and Rendle 2018)."""

import torch
from torch import Tensor

from lastlayer.functional.checks import check_not_negative
from lastlayer.layers.samplers.kernel_tree import KernelTree


class QuadraticKernel(KernelTree):
    """`q_i` proportional to `alpha * logit_i ** 2 + 1`, with `logit_i = h . weight_i + bias_i` less their mean.

    The mean is that of the class vectors when the whole tree was last recomputed. Subtracting it changes no
    softmax, but it changes the kernel: a trained layer's many unlikely classes have logits below 0, and would
    otherwise be drawn as often as likely ones. `centred=False` is the paper's kernel, of the logits as they are.

    The nearer q is to the softmax itself, the fewer samples a gradient of small bias needs; this one follows the
    logits of each row, at `O(d^2 log V)` a draw. The kernel is even, so a class of a very negative logit is drawn
    as often as one of a very positive logit. Memory is about `V d` numbers with leaves of d classes.

    Not for hidden states of many hundred features (d² of them are kept for each leaf), nor where a step has to be
    cheap: one shared set of `LogUniform` or `Unigram` with many more samples often costs less.

    Args:
        num_classes: V.
        in_features: d.
        alpha: the weight of the squared logits relative to the constant.
        centred: whether the mean is subtracted.
        leaf_size: classes that are scored one by one at the end of a descent; None: d, at least 16.

    Source: G. Blanc, S. Rendle, "Adaptive sampled softmax with kernel based sampling", ICML 2018.

    >>> weight, hidden = torch.randn(100, 4), torch.randn(2, 4)
    >>> sampler = QuadraticKernel(100, 4)
    >>> sampler.update(weight)
    >>> ids, log_expected_counts = sampler.sample(6, hidden)
    >>> ids.shape
    torch.Size([2, 6])
    """

    floor = 1.0
    first: Tensor  # (d + 1)(d + 2) / 2 pairs of coordinates
    second: Tensor
    factor: Tensor

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        alpha: float = 100.0,
        centred: bool = True,
        leaf_size: int | None = None,
    ) -> None:
        leaf_size = max(16, in_features) if leaf_size is None else leaf_size
        super().__init__(num_classes, in_features, leaf_size=leaf_size)
        self.alpha, self.centred = check_not_negative("alpha", alpha), centred
        # h h^T and w w^T are symmetric: each pair once, those off the diagonal counting twice in the product.
        first, second = torch.triu_indices(in_features + 1, in_features + 1, device="cpu")
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.register_buffer("factor", torch.where(first == second, 1.0, 2.0), persistent=False)

    def _centre(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        centre = weight.new_zeros(self.in_features + 1)
        if self.centred:
            centre[:-1] = weight.mean(0)
            if bias is not None and bool((alive := bias > -torch.inf).any()):
                centre[-1] = bias[alive].mean()
        return centre

    def _features(self, rows: Tensor) -> Tensor:
        products = rows[:, self.first] * rows[:, self.second] * (self.alpha * self.factor).to(rows.dtype)
        return torch.cat([products, products.new_ones(len(rows), 1)], 1)

    def _feature_sums(self, rows: Tensor, alive: Tensor) -> Tensor:
        rows = rows * alive[..., None]
        grams = torch.bmm(rows.transpose(1, 2), rows)
        return torch.cat([grams[:, self.first, self.second], alive.sum(1, keepdim=True)], 1)

    def _kernel(self, hidden: Tensor, classes: Tensor) -> Tensor:
        return self.alpha * (hidden @ classes.T).square() + 1
