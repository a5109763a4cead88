"""The built-in losses of `functional/spherical.py`, row by row: loss and derivatives, compiled by numba.

Each is the `derivatives` of the class of its name, in float64. Imports numba.
"""

import numpy as np

from lastlayer.kernels.factored import SPHERICAL_SOFTMAX, SQUARED_ERROR, TAYLOR_SOFTMAX
from lastlayer.kernels.fast_math import compiled


@compiled
def _squared_error(scores, weights, squared_norm):
    loss = squared_norm
    for k in range(len(scores)):
        loss += weights[k] * (weights[k] - 2 * scores[k])
        scores[k] = -2 * weights[k]
    return loss, 1.0, 0.0


@compiled
def _spherical_softmax(epsilon, scores, weights, squared_norm, num_classes):
    normalizer, every, loss = squared_norm + num_classes * epsilon, 0.0, 0.0
    for k in range(len(scores)):
        numerator = scores[k] * scores[k] + epsilon
        every += weights[k]
        loss -= weights[k] * np.log(numerator)
        scores[k] = -2 * weights[k] * scores[k] / numerator
    return loss + every * np.log(normalizer), every / normalizer, 0.0


@compiled
def _taylor_softmax(scores, weights, squared_norm, total, num_classes):
    normalizer, every, loss = num_classes + total + squared_norm / 2, 0.0, 0.0
    for k in range(len(scores)):
        slope = 1 + scores[k]
        numerator = slope + scores[k] * scores[k] / 2
        every += weights[k]
        loss -= weights[k] * np.log(numerator)
        scores[k] = -weights[k] * slope / numerator
    by_total = every / normalizer
    return loss + every * np.log(normalizer), by_total / 2, by_total


@compiled
def _z_loss(alpha, beta, scores, weights, squared_norm, total, num_classes):
    mean, mean_square = total / num_classes, squared_norm / num_classes
    variance, floor = mean_square - mean * mean, 1e-6 * mean_square + 1e-30
    deviation = np.sqrt(floor if variance <= floor else variance)  # nan stays nan
    loss, every, weighted = 0.0, 0.0, 0.0
    for k in range(len(scores)):
        z = (scores[k] - mean) / deviation
        margin = alpha * (z - beta)
        small = np.exp(-abs(margin))
        loss += weights[k] * (np.log1p(small) - min(margin, 0.0))
        sigmoid = (small if margin > 0 else 1.0) / (1 + small)  # of -margin
        scores[k] = -weights[k] * sigmoid / deviation
        every += scores[k]
        weighted += scores[k] * z
    by_variance = -weighted / (2 * deviation) * (variance > floor)
    return loss / alpha, by_variance / num_classes, -(every + 2 * mean * by_variance) / num_classes


@compiled
def row_derivatives(kind, one, two, scores, weights, squared_norm, total, num_classes):
    """Loss of a row, and its derivatives by squared norm and total; those by the scores take their place.

    `one` and `two` are the loss's own settings.
    """
    if kind == SQUARED_ERROR:
        return _squared_error(scores, weights, squared_norm)
    if kind == SPHERICAL_SOFTMAX:
        return _spherical_softmax(one, scores, weights, squared_norm, num_classes)
    if kind == TAYLOR_SOFTMAX:
        return _taylor_softmax(scores, weights, squared_norm, total, num_classes)
    return _z_loss(one, two, scores, weights, squared_norm, total, num_classes)
