"""SVDSoftmax: the paper's method under its own name (Shim et al., NIPS 2017)."""

from typing import Any

from torch import Tensor

from lastlayer.screening.calibration import Calibration
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import SVDPreview


class SVDSoftmax(ScreenedSoftmax):
    """`ScreenedSoftmax` with `SVDPreview(window, calibration=calibration)`: SVD-softmax.

    The first `window` coordinates of the rotated weight score all classes, the `candidates` best get exact logits,
    and the softmax is taken over both.

    Args:
        weight, bias: the trained layer, `(V, d)` and `(V,)`.
        window: rotated coordinates in the preview; the paper recommends d/8.
        candidates: classes a row with exact logits; a few per cent of V.
        calibration: hidden states to weight the rotation by; without them the plain method.
        logit_map, exact, use, gram: as for `ScreenedSoftmax`.

    Cost: `(V * window + candidates * d) / (V * d)` of the full layer's multiply-adds. When NOT to use it: without
    calibration on a modern language model's head, whose weight's directions say little about its logits.

    Source: Shim, Lee, Choi, Boo and Sung, "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
    Networks", NIPS 2017.

    >>> import torch
    >>> from lastlayer import SVDSoftmax
    >>> layer = SVDSoftmax(torch.randn(1000, 64), window=8, candidates=100)
    >>> layer.topk(torch.randn(64), 3).indices.shape
    torch.Size([3])
    """

    def __init__(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
        *,
        window: int,
        candidates: int,
        calibration: Calibration | None = None,
        **settings: Any,
    ) -> None:
        preview = SVDPreview(window, calibration=calibration)
        super().__init__(weight, bias, preview=preview, candidates=candidates, **settings)
