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
from lastlayer.kernels.lookups import count, look_up

ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)
BLOCK = 1024  # logits whose segments exist at once, in the first-level cache


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
def loss_of(normalizer, at_target, hard, square):
    """A row's loss, and its derivative by the normaliser."""
    return hard * (normalizer - at_target) + square * normalizer**2, hard + 2 * square * normalizer


@compiled
def plain_rows(rows, bias, ids, hard, square, form, scratch, loss):
    """No map: f(x) = x."""
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        peak = add_bias(row, bias, scratch)
        at_target = scratch[target]
        mass = exponentiate(scratch, peak)
        normalizer = np.float64(peak) + math.log(np.float64(mass))
        loss[i], of_normalizer = loss_of(normalizer, at_target, hard[i], square[i])
        if form:
            share = np.float32(of_normalizer / mass)
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
        loss[i], of_normalizer = loss_of(normalizer, value, hard[i], square[i])
        if form:
            share = np.float32(of_normalizer / mass)
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
        loss[i], of_normalizer = loss_of(normalizer, at_target, hard[i], square[i])
        if form:
            share = np.float32(of_normalizer / mass)
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
def largest(values):
    """The maximum, but a finite number, so that `values - maximum` is not nan where all are minus infinity."""
    peak = np.float32(-3e38)
    for j in range(values.shape[0]):
        peak = larger(peak, values[j])
    return peak


@compiled
def plif_rows(rows, bias, ids, hard, square, form, scratch, loss, lines, bound, width, sums, counted):
    """`f(x) = slope_k x + offset_k` on segment k; `lines (K, 2)` holds slopes and offsets.

    With g the gradient of f(x) and l_k the left end of segment k, `sums (K, 2)` gather, if `counted`, the sums of
    g (x - l_k) / width and of g over the logits of each segment. A row is taken in blocks that stay in the
    first-level cache: forward, each has exponentials and a sum relative to its own peak; backward, the segments
    are found again, which costs less than keeping them.
    """
    num_classes = rows.shape[1]
    rate, last = ONE / width, np.float32(lines.shape[0] - 1)
    slopes = np.empty(num_classes, np.float32)
    logits, inside, segments = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    num_blocks = (num_classes + BLOCK - 1) // BLOCK
    peaks, masses = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    one, slope, segment, place = np.empty(1, np.float32), slopes[:1].copy(), segments[:1].copy(), inside[:1].copy()
    for i in range(rows.shape[0]):
        row, target = rows[i], ids[i]
        one[0] = load(row[target]) + bias[target]
        find_segments(one, bound, rate, last, segment, place)
        look_up(lines, segment, one, slope)
        for b in range(num_blocks):
            of_block = slice(b * BLOCK, (b + 1) * BLOCK)
            part = scratch[of_block]
            add_bias(row[of_block], bias[of_block], part)
            find_segments(part, bound, rate, last, segments, inside)
            look_up(lines, segments, part, slopes[of_block])
            peaks[b] = largest(part)
            masses[b] = exponentiate(part, peaks[b])
        peak, mass = largest(peaks), 0.0
        for b in range(num_blocks):
            mass += masses[b] * math.exp(peaks[b] - peak)
        normalizer = np.float64(peak) + math.log(mass)
        loss[i], of_normalizer = loss_of(normalizer, one[0], hard[i], square[i])
        if form:
            share = of_normalizer / mass
            for b in range(num_blocks):
                of_block = slice(b * BLOCK, (b + 1) * BLOCK)
                part, own, steep = scratch[of_block], row[of_block], slopes[of_block]
                if counted:
                    add_bias(own, bias[of_block], logits)
                    find_segments(logits[: own.shape[0]], bound, rate, last, segments, inside)
                scale = np.float32(share * math.exp(peaks[b] - peak))
                for j in range(own.shape[0]):
                    part[j] *= scale
                    own[j] = store(part[j] * steep[j], own[j])
                if counted:
                    for j in range(own.shape[0]):
                        inside[j] *= part[j]
                    count(sums, segments, inside[: own.shape[0]], part)
            row[target] = store((scratch[target] - hard[i]) * slope[0], row[target])
            if counted:
                sums[segment[0], 0] -= hard[i] * place[0]
                sums[segment[0], 1] -= hard[i]
