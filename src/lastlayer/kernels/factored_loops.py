"""The loops behind `kernels/factored.py`, compiled by numba: importing this module imports numba.

The features are divided among workers: each reads, multiplies and updates the same rows of Q, U and R and the
same columns of F in every call, so that they stay in its own core's cache. Arguments are those of the functions
there; `factored_step_loops.py` has the step.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from lastlayer.kernels.blas import multiply
from lastlayer.kernels.cache_hints import LINE_BYTES, fetch_number
from lastlayer.kernels.factored_losses import row_derivatives
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.screening.threads import apart


@compiled
def share(worker, workers, count):
    """Which of `count` are a worker's: from the first to before the last."""
    return count * worker // workers, count * (worker + 1) // workers


@compiled
def _answer_share(worker, workers, hidden, stacked, factor, ids, pair, products, parts):
    (rows, d), zero = hidden.shape, products.dtype.type(0)
    first, last = share(worker, workers, d)
    for n in range(rows):
        for k in range(ids.shape[1]):
            for i in range(first, last, LINE_BYTES // factor.itemsize):
                fetch_number(factor, ids[n, k], i)
    for at in (0, d, 2 * d + 2):
        if at + d <= stacked.shape[0]:
            own = slice(at + first, at + last)
            multiply(hidden, False, stacked[own], True, products[:, own], 1.0, 0.0)
    if worker == 0:
        multiply(hidden, False, stacked[2 * d : 2 * d + 2], True, products[:, 2 * d : 2 * d + 2], 1.0, 0.0)
    for n in range(rows):
        h, copy = hidden[n, first:last], pair[n, first:last]
        p, mapped = products[n, first:last], products[n, d + first : d + last]
        found = zero
        for i in range(len(h)):
            found += h[i] * p[i]
            copy[i] = h[i]
        parts[worker, n, 0] = found
        for k in range(ids.shape[1]):
            row = factor[ids[n, k], first:last]
            found = zero
            for i in range(len(row)):
                found += mapped[i] * row[i]
            parts[worker, n, 1 + k] = found


@compiled
def answer(workers, hidden, stacked, factor, ids, pair, products, squared_norm, scores, total):
    (rows, d), width = hidden.shape, ids.shape[1]
    parts = np.empty((workers, rows, 1 + width), hidden.dtype)
    apart(_answer_share, workers, (workers, hidden, stacked, factor, ids, pair, products, parts))
    for n in range(rows):
        total[n] = products[n, 2 * d + 1]
        found = parts[:, n, 0].sum()
        squared_norm[n] = 0.0 if found < 0 else found  # nan stays nan
        for k in range(width):
            scores[n, k] = products[n, 2 * d] + parts[:, n, 1 + k].sum()


@compiled
def _sparse_share(worker, workers, stacked, factor, ids, target, sums, parts):
    rows, d = sums.shape
    first, last = share(worker, workers, d)
    zero = sums.dtype.type(0)
    for n in range(rows):
        into = sums[n, first:last]
        into[:] = zero
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k], first:last], target[n, k]
            for i in range(len(into)):
                into[i] += value * row[i]
    multiply(sums[:, first:last], False, stacked[d + first : d + last], False, parts[worker], 1.0, 0.0)


@compiled
def _gradient_share(worker, workers, pair, products, stacked, target, norm, total, parts, gradient, records):
    rows, d = gradient.shape
    first, last = share(worker, workers, d)
    offset, whole = stacked[2 * d, first:last], stacked[2 * d + 1, first:last]
    for n in range(rows):
        s, p, g = parts[0, n, first:last], products[n, first:last], gradient[n, first:last]
        for other in range(1, workers):
            more = parts[other, n, first:last]
            for i in range(len(s)):
                s[i] += more[i]
        if total.shape[0]:
            by_score, by_total = target[n].sum(), total[n]
            for i in range(len(s)):
                s[i] += by_score * offset[i] + by_total * whole[i]
        scale = norm[n] + norm[n]
        for i in range(len(s)):
            g[i] = scale * p[i] + s[i]
        if records:
            both = pair[rows + n, first:last]
            for i in range(len(s)):
                both[i] = g[i] + s[i]


@compiled
def hidden_gradient(workers, pair, products, stacked, factor, ids, target, norm, total, gradient, records):
    sums, parts = np.empty_like(gradient), np.empty((workers, *gradient.shape), gradient.dtype)
    apart(_sparse_share, workers, (workers, stacked, factor, ids, target, sums, parts))
    given = (workers, pair, products, stacked, target, norm, total, parts, gradient, records)
    apart(_gradient_share, workers, given)


@compiled
def _take_classes(targets, num_classes, ids):
    """Whether all targets are classes, which are copied."""
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            ids[n, k] = targets[n, k]
            if not 0 <= ids[n, k] < num_classes:
                return False
    return True


@compiled
def _derive(loss, part, weights, squared_norm, scores, sums, num_classes, target, norm, total):
    """The sum of the rows' losses, each times `part` as are its derivatives."""
    kind, one, two = loss
    whole = 0.0
    for n in range(len(norm)):
        own, by_norm, by_total = row_derivatives(
            kind, one, two, scores[n], weights[n], squared_norm[n], sums[n], num_classes
        )
        whole += own
        norm[n] = part * by_norm
        if total.shape[0]:
            total[n] = part * by_total
        for k in range(target.shape[1]):
            target[n, k] = part * scores[n, k]
    return part * whole


# workers, rows, K, d, columns of products, V; which loss and its settings, what a row counts, whether it reads the
# sum; stacked, F, hidden, targets; weights and whether there are any; ids, pair, products, target, norm, total, the
# gradient of hidden, the loss
PASS_KINDS = "nnnnnnnxxxnaaaidniaaaaaaa"


def whole_pass(asked: Any) -> int:
    """Forward and backward of a built-in loss; 0 where a target is no class: then nothing was done."""
    (
        workers, rows, width, d, columns, num_classes, kind, one, two, part, uses_sum, stacked, factor, hidden,
        targets, weights, weighted, ids, pair, products, target, norm, total, gradient, loss,
    ) = asked[0]  # fmt: skip
    shape = (rows, width)
    ids = carray(ids, shape)
    if not _take_classes(carray(targets, shape), num_classes, ids):
        return 0
    stacked, factor = carray(stacked, (columns, d)), carray(factor, (num_classes, d))
    pair, products = carray(pair, (2 * rows, d)), carray(products, (rows, columns))
    target, norm, total = carray(target, shape), carray(norm, (rows,)), carray(total, (rows * uses_sum,))
    counts = carray(weights, shape) if weighted else np.ones(shape)
    squared_norm, scores, sums = np.empty(rows), np.empty(shape), np.empty(rows)
    answer(workers, carray(hidden, (rows, d)), stacked, factor, ids, pair, products, squared_norm, scores, sums)
    settings = (kind, one, two)
    found = _derive(settings, part, counts, squared_norm, scores, sums, num_classes, target, norm, total)
    carray(loss, (1,))[0] = found
    gradient = carray(gradient, (rows, d))
    hidden_gradient(workers, pair, products, stacked, factor, ids, target, norm, total, gradient, True)
    return 1
