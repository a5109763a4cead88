"""The mathematics: stateless, differentiable functions, one file a family."""

from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.linear_kl_div import linear_kl_div
from lastlayer.functional.linear_statistics import LinearStatistics, linear_statistics
from lastlayer.functional.mixture_cross_entropy import mixture_cross_entropy
from lastlayer.functional.reference_head import ReferenceHead
from lastlayer.functional.spherical import spherical_loss

__all__ = [
    "LinearStatistics",
    "ReferenceHead",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_statistics",
    "mixture_cross_entropy",
    "spherical_loss",
]
