"""The loss of rows of logits and, in their place, its gradient: each row in one visit, while it is in cache.

Imports numba: `softmax_rows.fused` imports this module when a kernel first runs.

Every kernel takes, for n rows over V classes,

    rows     (n, V)  logits without the bias, float32 or the bits of bfloat16; their gradient afterwards
    bias     (V,)    float32
    ids      (n,)    the target of each row
    hard     (n,)    float32; the loss is `hard (lse - f_y) + square lse²`
    square   (n,)    float32
    form     bool    whether to form the gradient; if not, rows are left as they are
    scratch  (V,)    float32
    loss     (n,)    float32; written
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import math

import numpy as np

from lastlayer.kernels.fast_math import compiled, exp, larger, load, store


@compiled
def plain_rows(rows, bias, ids, hard, square, form, scratch, loss):
    """No map: f is the logit."""
    num_classes = rows.shape[1]
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        peak = np.float32(-np.inf)
        for j in range(num_classes):
            logit = load(row[j]) + bias[j]
            scratch[j] = logit
            peak = larger(peak, logit)
        at_target = scratch[target]
        mass = np.float32(0)
        for j in range(num_classes):
            part = exp(scratch[j] - peak)
            scratch[j] = part
            mass += part
        normalizer = np.float64(peak) + math.log(np.float64(mass))
        loss[i] = hard[i] * (normalizer - at_target) + square[i] * normalizer**2
        if form:
            share = np.float32((hard[i] + 2 * square[i] * normalizer) / mass)
            of_target = scratch[target] * share - hard[i]
            for j in range(num_classes):
                row[j] = store(scratch[j] * share, row[j])
            row[target] = store(of_target, row[target])
