"""Fast queries of a weight that is already trained: SVD-softmax and its descendants."""

from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import SVDPreview
from lastlayer.screening.svd_softmax import SVDSoftmax

__all__ = ["Int8Preview", "ScreenedSoftmax", "SVDPreview", "SVDSoftmax"]
