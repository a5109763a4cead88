"""The loops behind `kernels/grouped.py`, compiled by numba: importing this module imports numba.

`groups` are a `GroupArrays`, or a plain tuple of its fields; a "residual" is `softmax - one_hot(target)`.

A number written out where a kernel is called, such as 0, has a type of its own, for which the kernel is compiled
once more: hence `start`. Rows are copied by loops, as `a[n] = b[m]` takes numba seconds to compile.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import numpy as np

from lastlayer.kernels.cache_hints import (
    STORE_BYTES,
    exceeds_cache,
    fence,
    fetch_row,
    goes_past_cache,
    rows_ahead,
    store_past_cache,
)
from lastlayer.kernels.fast_math import compiled, difference


@compiled
def one_rows_logits(hidden, n, weight, start, size, logits, place, fresh):
    """`weight[start : start + size] @ hidden[n]`, to `logits` from `place` on; `fresh` weight is not in cache."""
    ahead = rows_ahead(weight)
    for i in range(start, start + size):
        if fresh:
            fetch_row(weight, i + ahead)
        total = hidden.dtype.type(0)
        for k in range(hidden.shape[1]):
            total += weight[i, k] * hidden[n, k]
        logits[place + i - start] = total


@compiled
def two_rows_logits(hidden, n, weight, start, size, logits, place, fresh):
    """The same of rows n and n + 1, one after the other, two weight rows at a time: four loads, four products."""
    zero = hidden.dtype.type(0)
    ahead = rows_ahead(weight)
    for i in range(start, start + size - 1, 2):
        if fresh:
            fetch_row(weight, i + ahead)
            fetch_row(weight, i + 1 + ahead)
        s0 = s1 = t0 = t1 = zero
        for k in range(hidden.shape[1]):
            s0 += weight[i, k] * hidden[n, k]
            s1 += weight[i + 1, k] * hidden[n, k]
            t0 += weight[i, k] * hidden[n + 1, k]
            t1 += weight[i + 1, k] * hidden[n + 1, k]
        at = place + i - start
        logits[at], logits[at + 1], logits[at + size], logits[at + size + 1] = s0, s1, t0, t1
    if size % 2:
        for m in range(2):
            last = place + m * size + size - 1
            one_rows_logits(hidden, n + m, weight, start + size - 1, 1, logits, last, False)


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
def forward(first, last, groups, hidden, weight, bias, slots, residual, log_prob, slope):
    rows, counts, starts, sizes, places, _ = groups
    fresh = exceeds_cache(weight)
    zero = hidden.dtype.type(0)
    lowest = 0.75 * np.log(np.finfo(hidden.dtype).tiny)  # nothing below: denormal numbers are slow
    for g in range(first, last):
        start, size, count = starts[g], sizes[g], counts[g]
        logits = residual[places[g] : places[g] + count * size].reshape(count, size)
        for n in range(0, count - 1, 2):
            of_pair, place = rows[g] + n, places[g] + n * size
            two_rows_logits(hidden, of_pair, weight, start, size, residual, place, fresh and n == 0)
        if count % 2:
            last_row, place = rows[g] + count - 1, places[g] + (count - 1) * size
            one_rows_logits(hidden, last_row, weight, start, size, residual, place, fresh and count == 1)
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
            target_logit = difference(row[target], largest)  # else `largest + log(total)` may be formed
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
def backward(first, last, groups, hidden, residual, scale, grad_weight, grad_bias):
    rows, counts, _, sizes, places, outs = groups
    d = hidden.shape[1]
    past_cache = goes_past_cache(grad_weight)
    own = np.empty(d, dtype=hidden.dtype)
    for g in range(first, last):
        size, count, row = sizes[g], counts[g], rows[g]
        for i in range(size):
            # Indices, not views: handing these on would count references, which empties the stores' buffers.
            place = places[g] + i
            f0 = scale[row] * residual[place]
            total = f0
            if count == 1:
                for k in range(d):
                    own[k] = f0 * hidden[row, k]
            else:
                f1 = scale[row + 1] * residual[place + size]
                total += f1
                for k in range(d):
                    own[k] = f0 * hidden[row, k] + f1 * hidden[row + 1, k]
            for n in range(2, count):
                f = scale[row + n] * residual[place + n * size]
                total += f
                for k in range(d):
                    own[k] += f * hidden[row + n, k]
            out = outs[g] + i
            if past_cache:
                for k in range(0, d, STORE_BYTES // own.itemsize):
                    store_past_cache(own, k, grad_weight, out * d + k)
            else:
                for k in range(d):
                    grad_weight[out, k] = own[k]
            if grad_bias.shape[0]:
                grad_bias[out] = total
    if past_cache:
        fence()


@compiled
def whole_batch(num_rows, num_classes):
    """One group: all rows over all classes."""
    none = np.zeros(1, dtype=np.int64)
    return (none, np.full(1, num_rows), none, np.full(1, num_classes), none, none)


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
        own_slots[n], own_clusters[n] = slots[order[n]], clusters[order[n]]
        for k in range(hidden.shape[1]):
            own[n, k] = hidden[order[n], k]
    log_prob = np.zeros(len(order), dtype=hidden.dtype)
    slope = np.zeros((len(order) if with_slope else 0, hidden.shape[1]), dtype=hidden.dtype)
    head_residual = np.empty(len(order) * len(head_weight), dtype=hidden.dtype)
    residual = np.empty(numbers.sum(), dtype=hidden.dtype)
    head, inner = whole_batch(len(order), len(head_weight)), (rows, counts, starts, sizes, places, outs)
    start = np.int64(0)
    forward(start, len(head[0]), head, own, head_weight, head_bias, own_clusters, head_residual, log_prob, slope)
    forward(start, len(rows), inner, own, weight, bias, own_slots, residual, log_prob, slope)
    answer = np.empty_like(log_prob)
    for n in range(len(order)):
        answer[order[n]] = log_prob[n]
    touched = np.empty(ends[-1], dtype=np.int64)
    for g in range(len(rows)):
        for i in range(sizes[g]):
            touched[ends[g] - sizes[g] + i] = starts[g] + i
    return answer, touched, (order, own, slope, head_residual, residual, inner)


@compiled
def small_backward(state, grad, of_hidden, of_head_weight, of_head_bias, of_weight, of_bias):
    """All gradients of a small batch; those of length 0 are not wanted."""
    order, own, slope, head_residual, residual, inner = state
    start = np.int64(0)
    scale = np.empty_like(grad)
    for n in range(len(order)):
        scale[n] = -grad[order[n]]
    if len(of_hidden):
        for n in range(len(order)):
            for k in range(slope.shape[1]):
                of_hidden[order[n], k] = scale[n] * slope[n, k]
    if len(of_head_weight):
        head = whole_batch(len(order), len(of_head_weight))
        backward(start, len(head[0]), head, own, head_residual, scale, of_head_weight, of_head_bias)
    if len(of_weight):
        backward(start, len(inner[0]), inner, own, residual, scale, of_weight, of_bias)
