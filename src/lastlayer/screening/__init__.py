"""Fast queries of a weight that is already trained: SVD-softmax and its descendants."""

from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import SVDPreview
from lastlayer.screening.svd_softmax import SVDSoftmax

__all__ = ["ScreenedSoftmax", "SVDPreview", "SVDSoftmax"]
