"""Fast queries of a weight that is already trained: SVD-softmax and its descendants."""

from lastlayer.screening.choose import choose_screen
from lastlayer.screening.int4_preview import Int4Preview
from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.mixture_screen import ScreenedMixture
from lastlayer.screening.screened import ScreenedSoftmax, SVDSoftmax
from lastlayer.screening.svd_preview import SVDPreview

__all__ = [
    "choose_screen",
    "Int4Preview",
    "Int8Preview",
    "ScreenedMixture",
    "ScreenedSoftmax",
    "SVDPreview",
    "SVDSoftmax",
]
