"""The mathematics: stateless, differentiable functions, one file a family."""

from lastlayer.functional.dense_spherical import spherical_loss
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.linear_statistics import LinearStatistics, linear_statistics

__all__ = ["LinearStatistics", "linear_cross_entropy", "linear_statistics", "spherical_loss"]
