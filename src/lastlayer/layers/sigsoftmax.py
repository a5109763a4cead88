"""Sigsoftmax (Kanai et al. 2018): a softmax of higher rank at the price of one more division a logit."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.functional.logit_map import GraphBuilder, LogitMap
from lastlayer.kernels.softmax_rows import KernelMap


class Sigsoftmax(LogitMap):
    """`f(x) = x + log sigmoid(x)`, so that `P(c) ∝ exp(x_c) sigmoid(x_c)`; no parameters.

    Its slope is `2 - sigmoid(x)`, between 1 and 2. Unlike the softmax it is not invariant to a constant added to
    all logits, so keep the layer's bias.

    Useful where the width is far below the rank that the data need; it costs next to nothing. In the
    replication of Parthiban, Mao and Inkpen (AAAI 2021) its gain on Penn Treebank was within the noise.

    Source: Kanai, Fujiwara, Yamanaka, Adachi, "Sigsoftmax: Reanalysis of the Softmax Bottleneck", NeurIPS 2018.

    >>> import torch
    >>> Sigsoftmax()(torch.tensor([-200.0, 0.0, 200.0]))
    tensor([-400.0000,   -0.6931,  200.0000])
    """

    def forward(self, logits: Tensor) -> Tensor:
        return logits + F.logsigmoid(logits)

    def inverse(self, values: Tensor) -> Tensor:
        """`values / 2 + asinh(exp(values / 2) / 2)`: the positive root of `e^2x = e^y (1 + e^x)`."""
        half = values / 2
        # asinh(e^z) is z + log 2 once e^z is large; the exponential must not overflow.
        large = half > 15
        small = torch.asinh(torch.exp(half.masked_fill(large, 0.0) - math.log(2)))
        return half + torch.where(large, half, small)

    def vjp(self, logits: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return torch.sigmoid(logits).sub_(2).neg_().mul_(gradient), ()

    def kernel_map(self) -> KernelMap:
        return KernelMap("sigsoftmax")

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        return graph.add("Sub", logits, graph.add("Softplus", graph.add("Neg", logits)))

    def settings(self) -> dict[str, Any]:
        return {}
