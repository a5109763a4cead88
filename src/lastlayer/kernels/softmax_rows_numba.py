"""The loss of rows of logits and, in their place, its gradient: each row in one visit, while it is in cache.

Imports numba: `softmax_rows.fused` imports this module when a kernel first runs.

Every kernel takes, for n rows over V classes,

    rows     (n, V)  logits without the bias, float32 or the bits of bfloat16; their gradient afterwards
    bias     (V,)    float32
    ids      (n,)    the target of each row
    hard     (n,)    float32; the loss is `hard (lse - f_y) + square lse²`, f the mapped logits
    square   (n,)    float32
    form     bool    whether to form the gradient; if not, rows are left as they are
    scratch  (V,)    float32
    loss     (n,)    float32; written

and then what its logit map needs. Three passes over a row: the logits and their peak; the exponentials and
their sum; the gradient.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import math

import numpy as np

from lastlayer.kernels.fast_math import compiled, exp, larger, load, store

ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)


@compiled
def add_bias(row, bias, scratch):
    """The logits, in `scratch`; returns the largest."""
    peak = np.float32(-np.inf)
    for j in range(row.shape[0]):
        logit = load(row[j]) + bias[j]
        scratch[j] = logit
        peak = larger(peak, logit)
    return peak


@compiled
def exponentiate(scratch, peak):
    """`exp(value - peak)` in place; returns the sum."""
    mass = np.float32(0)
    for j in range(scratch.shape[0]):
        part = exp(scratch[j] - peak)
        scratch[j] = part
        mass += part
    return mass


@compiled
def plain_rows(rows, bias, ids, hard, square, form, scratch, loss):
    """No map: f(x) = x."""
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        peak = add_bias(row, bias, scratch)
        at_target = scratch[target]
        mass = exponentiate(scratch, peak)
        normalizer = np.float64(peak) + math.log(np.float64(mass))
        loss[i] = hard[i] * (normalizer - at_target) + square[i] * normalizer**2
        if form:
            share = np.float32((hard[i] + 2 * square[i] * normalizer) / mass)
            of_target = scratch[target] * share - hard[i]
            for j in range(row.shape[0]):
                row[j] = store(scratch[j] * share, row[j])
            row[target] = store(of_target, row[target])


@compiled
def sigsoftmax_rows(rows, bias, ids, hard, square, form, scratch, loss):
    """`f(x) = x + log sigmoid(x)`, with one exponential a logit.

    With m the largest logit and E = exp(x - m):

        exp f(x) = exp(m) E² / (E + exp(-m))              f'(x) = 2 - E / (E + exp(-m))          m >= 0
                 = exp(2m) E² / (E exp(m) + 1)                  = 2 - E exp(m) / (E exp(m) + 1)  m < 0

    so both are E² / (a E + b) and (a E + 2b) / (a E + b), with a and b at most 1.
    """
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        peak = add_bias(row, bias, scratch)
        at_target = np.float64(scratch[target])
        a, b = (ONE, max(exp(-peak), np.float32(1e-37))) if peak >= 0 else (exp(peak), ONE)
        mass = np.float32(0)
        for j in range(row.shape[0]):
            part = exp(scratch[j] - peak)
            scratch[j] = part
            mass += part * (part / (a * part + b))
        normalizer = np.float64(peak) + min(np.float64(peak), 0.0) + math.log(np.float64(mass))
        value = at_target + min(at_target, 0.0) - math.log1p(math.exp(-abs(at_target)))
        loss[i] = hard[i] * (normalizer - value) + square[i] * normalizer**2
        if form:
            share = np.float32((hard[i] + 2 * square[i] * normalizer) / mass)
            part = scratch[target]
            of_target = part * (part / (a * part + b)) * share - hard[i]
            slope_of_target = 1.0 + 1.0 / (1.0 + math.exp(at_target))
            for j in range(row.shape[0]):
                part = scratch[j]
                inverse = ONE / (a * part + b)
                slope = (a * part + TWO * b) * inverse
                row[j] = store(part * (part * inverse) * share * slope, row[j])
            row[target] = store(of_target * slope_of_target, row[target])


@compiled
def soft_cap_rows(rows, bias, ids, hard, square, form, scratch, loss, cap):
    """`f(x) = cap tanh(x / cap)`; with t = exp(-2 |y|), tanh |y| = (1 - t) / (1 + t), of slope 4t / (1 + t)²."""
    rate = -TWO / cap
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        add_bias(row, bias, scratch)
        peak = np.float32(-np.inf)
        for j in range(row.shape[0]):
            t = exp(rate * abs(scratch[j]))
            size = cap * (ONE - t) / (ONE + t)
            value = size if scratch[j] > 0 else -size
            scratch[j] = value
            peak = larger(peak, value)
        at_target = scratch[target]
        mass = exponentiate(scratch, peak)
        normalizer = np.float64(peak) + math.log(np.float64(mass))
        loss[i] = hard[i] * (normalizer - at_target) + square[i] * normalizer**2
        if form:
            share = np.float32((hard[i] + 2 * square[i] * normalizer) / mass)
            t = exp(rate * abs(load(row[target]) + bias[target]))
            of_target = (scratch[target] * share - hard[i]) * (np.float32(4) * t / ((ONE + t) * (ONE + t)))
            for j in range(row.shape[0]):
                t = exp(rate * abs(load(row[j]) + bias[j]))
                row[j] = store(scratch[j] * share * np.float32(4) * t / ((ONE + t) * (ONE + t)), row[j])
            row[target] = store(of_target, row[target])


@compiled
def find_segments(logits, bound, rate, last, segments, inside):
    """The segment of each logit, `clamp(floor((x + bound) * rate), 0, last)`, 0 for nan; and where inside."""
    for j in range(logits.shape[0]):
        at = (logits[j] + bound) * rate
        kept = at if at > 0 else np.float32(0)
        segment = np.int32(kept if kept < last else last)
        segments[j] = segment
        inside[j] = at - np.float32(segment)


@compiled
def plif_rows(rows, bias, ids, hard, square, form, scratch, loss, lines, bound, width, sums, counted):
    """`f(x) = slope_k x + offset_k` on segment k; `lines (K, 2)` holds slopes and offsets.

    With g the gradient of f(x) and l_k the left end of segment k, `sums (K, 2)` gather, if `counted`, the sums of
    g (x - l_k) / width and of g over the logits of each segment. The lookups are loops of their own, as they keep
    what is around them from being vectorised.
    """
    num_classes = rows.shape[1]
    segments = np.empty(num_classes, np.uint32)
    inside, slopes = np.empty(num_classes, np.float32), np.empty(num_classes, np.float32)
    rate, last = ONE / width, np.float32(lines.shape[0] - 1)
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        add_bias(row, bias, scratch)
        find_segments(scratch, bound, rate, last, segments, inside)
        for j in range(num_classes):
            k = np.uint64(segments[j])
            slopes[j] = lines[k, 0]
            scratch[j] = lines[k, 0] * scratch[j] + lines[k, 1]
        peak = np.float32(-np.inf)
        for j in range(num_classes):
            peak = larger(peak, scratch[j])
        at_target = scratch[target]
        mass = exponentiate(scratch, peak)
        normalizer = np.float64(peak) + math.log(np.float64(mass))
        loss[i] = hard[i] * (normalizer - at_target) + square[i] * normalizer**2
        if form:
            share = np.float32((hard[i] + 2 * square[i] * normalizer) / mass)
            of_target = scratch[target] * share - hard[i]
            of_target_inside = of_target * inside[target]
            for j in range(num_classes):
                gradient = scratch[j] * share
                row[j] = store(gradient * slopes[j], row[j])
                scratch[j] = gradient
                inside[j] *= gradient
            row[target] = store(of_target * slopes[target], row[target])
            if counted:
                scratch[target], inside[target] = of_target, of_target_inside
                for j in range(num_classes):
                    k = np.uint64(segments[j])
                    sums[k, 0] += inside[j]
                    sums[k, 1] += scratch[j]
