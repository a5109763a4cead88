"""Int8Preview: every row in 8-bit integers, at full width, with a bound that proves results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lastlayer.functional.precision import exact_dtype
from lastlayer.screening.exact import bias_and_size, rounding_share
from lastlayer.screening.preview import ErrorBound, PreparedPreview, Preview
from lastlayer.screening.quantised import Int8Rows


@dataclass(frozen=True)
class Int8Preview(Preview):
    """Scores all classes by 8-bit rows and hidden states of 14 bits: `|score - logit|` is provably small.

        |w . h - q . h'|  <=  ||w - q|| ||h||  +  ||q|| ||h - h'||        q, h': what the integers stand for

    Both norms are kept for each class. The bound leaves so few classes in play that rescoring some dozens of
    candidates proves most results, and `exact=True` the rest at little cost.

    Cost: a query reads `V d` bytes, a quarter of the float32 weight; preparing takes a few passes over the weight.
    When NOT to use it: where a small loss of agreement is accepted, a calibrated `SVDPreview` reads less.

    >>> import torch
    >>> from lastlayer import Int8Preview, ScreenedSoftmax
    >>> weight = torch.randn(1000, 64)
    >>> screened = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=32, exact=True)
    >>> bool(screened.topk(torch.randn(64), 5).certified)
    True
    """

    def prepare(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
    ) -> "PreparedInt8":
        return PreparedInt8(weight.detach(), bias)


class PreparedInt8(PreparedPreview):
    """One weight in 8 bits, and its norms."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = exact_dtype(weight.dtype)
        self.rows = Int8Rows(weight, self.dtype)
        self.bias, size = bias_and_size(weight, bias)
        # the full layer's rounding is a share of ||w|| ||h|| + |b| + ||w|| + |b| ||h||
        rounding = rounding_share(weight.shape[-1], self.dtype) * size
        integers, leftovers = self.rows.of_classes
        self.of_classes = torch.stack([integers + rounding, leftovers, rounding])
        self.bytes_read = self.rows.bytes_read

    def scores(self, hidden: Tensor) -> Tensor:
        return self.rows.scores(hidden, self.bias)

    def error(self, hidden: Tensor) -> ErrorBound:
        of_rows = self.rows.of_rows(hidden)  # (N, 2)
        of_rows = torch.cat([of_rows, torch.ones_like(of_rows[:, :1])], dim=-1)
        return ErrorBound(of_rows.to(self.dtype), self.of_classes)
