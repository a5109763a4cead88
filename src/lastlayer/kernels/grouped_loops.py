"""The loops behind `kernels/grouped.py`, compiled by numba: importing this module imports numba.

`groups` are the fields of `GroupArrays`; a "residual" is `softmax - one_hot(target)`.
"""

import numpy as np

from lastlayer.kernels.fast_math import compiled


@compiled
def row_logits(h, weight, logits):
    """`weight @ h`, four weight rows at a time: `h` is loaded once for all of them."""
    size, d = weight.shape
    zero = h.dtype.type(0)
    for i in range(0, size - 3, 4):
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        s0 = s1 = s2 = s3 = zero
        for k in range(d):
            s0 += w0[k] * h[k]
            s1 += w1[k] * h[k]
            s2 += w2[k] * h[k]
            s3 += w3[k] * h[k]
        logits[i], logits[i + 1], logits[i + 2], logits[i + 3] = s0, s1, s2, s3
    for i in range(size - size % 4, size):
        total = zero
        for k in range(d):
            total += weight[i, k] * h[k]
        logits[i] = total


@compiled
def two_rows_logits(g, h, weight, of_g, of_h):
    """`weight @ g` and `weight @ h`, two weight rows at a time: six loads serve four products."""
    size, d = weight.shape
    zero = h.dtype.type(0)
    for i in range(0, size - 1, 2):
        w0, w1 = weight[i], weight[i + 1]
        g0 = g1 = h0 = h1 = zero
        for k in range(d):
            g0 += w0[k] * g[k]
            g1 += w1[k] * g[k]
            h0 += w0[k] * h[k]
            h1 += w1[k] * h[k]
        of_g[i], of_g[i + 1], of_h[i], of_h[i + 1] = g0, g1, h0, h1
    if size % 2:
        g0 = h0 = zero
        for k in range(d):
            g0 += weight[size - 1, k] * g[k]
            h0 += weight[size - 1, k] * h[k]
        of_g[size - 1], of_h[size - 1] = g0, h0


@compiled
def add_mean_weight(factors, weight, into):
    """`into += factors @ weight`, four weight rows at a time: `into` is loaded and stored once for all of them."""
    size, d = weight.shape
    for i in range(0, size - 3, 4):
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for k in range(d):
            into[k] += f0 * w0[k] + f1 * w1[k] + f2 * w2[k] + f3 * w3[k]
    for i in range(size - size % 4, size):
        f = factors[i]
        for k in range(d):
            into[k] += f * weight[i, k]


@compiled
def forward(
    first, last, rows, counts, starts, sizes, places, outs,
    hidden, weight, bias, slots, residual, log_prob, slope,
):  # fmt: skip
    zero = hidden.dtype.type(0)
    lowest = 0.75 * np.log(np.finfo(hidden.dtype).tiny)  # nothing below: denormal numbers are slow
    for g in range(first, last):
        start, size, count = starts[g], sizes[g], counts[g]
        logits = residual[places[g] : places[g] + count * size].reshape(count, size)
        own = hidden[rows[g] : rows[g] + count]
        for n in range(0, count - 1, 2):
            two_rows_logits(own[n], own[n + 1], weight[start : start + size], logits[n], logits[n + 1])
        if count % 2:
            row_logits(own[count - 1], weight[start : start + size], logits[count - 1])
        for n in range(count):
            row = logits[n]
            if bias.shape[0]:
                for i in range(size):
                    row[i] += bias[start + i]
            target = slots[rows[g] + n] - start
            largest = row[0]
            for i in range(size):
                largest = max(largest, row[i])
            total = zero
            target_logit = row[target] - largest
            for i in range(size):
                below = row[i] - largest
                row[i] = np.exp(below) if below > lowest else zero
                total += row[i]
            log_prob[rows[g] + n] += target_logit - np.log(total)
            for i in range(size):
                row[i] /= total
            row[target] -= 1
            if slope.shape[0]:
                add_mean_weight(row, weight[start : start + size], slope[rows[g] + n])


@compiled
def backward(
    first, last, rows, counts, starts, sizes, places, outs,
    hidden, residual, scale, grad_weight, grad_bias,
):  # fmt: skip
    d = hidden.shape[1]
    for g in range(first, last):
        size, count, row = sizes[g], counts[g], rows[g]
        factors = residual[places[g] : places[g] + count * size].reshape(count, size)
        for i in range(size):
            into = grad_weight[outs[g] + i]
            f0 = scale[row] * factors[0, i]
            h0 = hidden[row]
            total = f0
            if count == 1:
                for k in range(d):
                    into[k] = f0 * h0[k]
            else:
                f1 = scale[row + 1] * factors[1, i]
                h1 = hidden[row + 1]
                total += f1
                for k in range(d):
                    into[k] = f0 * h0[k] + f1 * h1[k]
            for n in range(2, count):
                f = scale[row + n] * factors[n, i]
                h = hidden[row + n]
                total += f
                for k in range(d):
                    into[k] += f * h[k]
            if grad_bias.shape[0]:
                grad_bias[outs[g] + i] = total


@compiled
def group(clusters, offsets):
    """The rows of a batch sorted by cluster, stably: `(order, rows, counts, starts, sizes)`."""
    num_clusters = len(offsets) - 1
    begins = np.zeros(num_clusters + 1, dtype=np.int64)
    for n in range(len(clusters)):
        begins[clusters[n] + 1] += 1
    num_groups = 0
    for c in range(num_clusters):
        num_groups += begins[c + 1] > 0
        begins[c + 1] += begins[c]
    rows, counts = np.empty(num_groups, dtype=np.int64), np.empty(num_groups, dtype=np.int64)
    starts, sizes = np.empty(num_groups, dtype=np.int64), np.empty(num_groups, dtype=np.int64)
    g = 0
    for c in range(num_clusters):
        if begins[c + 1] > begins[c]:
            rows[g], counts[g] = begins[c], begins[c + 1] - begins[c]
            starts[g], sizes[g] = offsets[c], offsets[c + 1] - offsets[c]
            g += 1
    order = np.empty(len(clusters), dtype=np.int64)
    for n in range(len(clusters)):
        order[begins[clusters[n]]] = n
        begins[clusters[n]] += 1
    return order, rows, counts, starts, sizes


@compiled
def small_forward(
    hidden, head_weight, head_bias, weight, bias, clusters, slots, offsets, compact, with_slope
):  # fmt: skip
    """Both levels for a small batch: log-probabilities `(N,)`, touched weight rows, and what backward needs."""
    order, rows, counts, starts, sizes = group(clusters, offsets)
    ends = sizes.cumsum()
    outs = ends - sizes if compact else starts
    numbers = counts * sizes
    places = numbers.cumsum() - numbers
    own, own_slots, own_clusters = np.empty_like(hidden), np.empty_like(slots), np.empty_like(clusters)
    for n in range(len(order)):
        own[n], own_slots[n], own_clusters[n] = hidden[order[n]], slots[order[n]], clusters[order[n]]
    log_prob = np.zeros(len(order), dtype=hidden.dtype)
    slope = np.zeros((len(order) if with_slope else 0, hidden.shape[1]), dtype=hidden.dtype)
    head_residual = np.empty(len(order) * len(head_weight), dtype=hidden.dtype)
    residual = np.empty(numbers.sum(), dtype=hidden.dtype)
    none, all_rows, all_clusters = np.array([0]), np.array([len(order)]), np.array([len(head_weight)])
    forward(
        0, 1, none, all_rows, none, all_clusters, none, none,
        own, head_weight, head_bias, own_clusters, head_residual, log_prob, slope,
    )  # fmt: skip
    forward(
        0, len(rows), rows, counts, starts, sizes, places, outs,
        own, weight, bias, own_slots, residual, log_prob, slope,
    )  # fmt: skip
    answer = np.empty_like(log_prob)
    for n in range(len(order)):
        answer[order[n]] = log_prob[n]
    touched = np.empty(ends[-1], dtype=np.int64)
    for g in range(len(rows)):
        for i in range(sizes[g]):
            touched[ends[g] - sizes[g] + i] = starts[g] + i
    return answer, touched, (order, own, slope, head_residual, residual, rows, counts, starts, sizes, places, outs)


@compiled
def small_backward(state, grad, of_hidden, of_head_weight, of_head_bias, of_weight, of_bias):
    """All gradients of a small batch; those of length 0 are not wanted."""
    order, own, slope, head_residual, residual, rows, counts, starts, sizes, places, outs = state
    scale = np.empty_like(grad)
    for n in range(len(order)):
        scale[n] = -grad[order[n]]
    if len(of_hidden):
        for n in range(len(order)):
            of_hidden[order[n]] = scale[n] * slope[n]
    if len(of_head_weight):
        none, all_rows, all_clusters = np.array([0]), np.array([len(order)]), np.array([len(of_head_weight)])
        backward(
            0, 1, none, all_rows, none, all_clusters, none, none,
            own, head_residual, scale, of_head_weight, of_head_bias,
        )  # fmt: skip
    if len(of_weight):
        backward(
            0, len(rows), rows, counts, starts, sizes, places, outs, own, residual, scale, of_weight, of_bias
        )  # fmt: skip
