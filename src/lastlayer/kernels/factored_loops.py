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

from lastlayer.kernels.apart import apart
from lastlayer.kernels.blas import multiply
from lastlayer.kernels.cache_hints import LINE_BYTES, fetch_number
from lastlayer.kernels.factored_gradient import ALIGNED
from lastlayer.kernels.factored_losses import row_derivatives
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.tiles import share


@compiled
def columns_of(d):
    """As `Columns.of`: where U, offset and total, and R begin in `stacked`."""
    width = -(-d // ALIGNED) * ALIGNED
    return width, 2 * width, 2 * width + ALIGNED


@compiled
def fetch_targets(worker, workers, factor, ids):
    """Has a worker's features of all target rows brought into the cache."""
    first, last = share(worker, workers, factor.shape[1])
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            for i in range(first, last, LINE_BYTES // factor.itemsize):
                fetch_number(factor, ids[n, k], i)
            fetch_number(factor, ids[n, k], last - 1)


@compiled
def _copy_share(worker, workers, hidden, factor, ids, pair):
    (rows, d) = hidden.shape
    fetch_targets(worker, workers, factor, ids)
    for n in range(rows * worker // workers, rows * (worker + 1) // workers):
        pair[n, :d] = hidden[n]


@compiled
def _answer_share(worker, workers, stacked, factor, ids, pair, products, parts):
    rows, d, zero = ids.shape[0], factor.shape[1], products.dtype.type(0)
    hidden = pair[:rows, :d]
    first, last = share(worker, workers, d)
    at_map, at_shared, at_inverse = columns_of(d)
    for at in (0, at_map, at_inverse):
        if at < products.shape[1]:
            own = slice(at + first, at + last)
            multiply(hidden, False, stacked[own], True, products[:, own], 1.0, 0.0)
    if worker == 0:
        shared = slice(at_shared, at_shared + 2)
        multiply(hidden, False, stacked[shared], True, products[:, shared], 1.0, 0.0)
    for n in range(rows):
        h, p, mapped = pair[n, first:last], products[n, first:last], products[n, at_map + first : at_map + last]
        found = zero
        for i in range(len(h)):
            found += h[i] * p[i]
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
    apart(_copy_share, workers, (workers, hidden, factor, ids, pair))
    apart(_answer_share, workers, (workers, stacked, factor, ids, pair, products, parts))
    _, shared, _ = columns_of(d)
    for n in range(rows):
        total[n], found = products[n, shared + 1], parts[0, n, 0]
        for worker in range(1, workers):
            found += parts[worker, n, 0]
        squared_norm[n] = 0.0 if found < 0 else found  # nan stays nan
        for k in range(width):
            found = products[n, shared]
            for worker in range(workers):
                found += parts[worker, n, 1 + k]
            scores[n, k] = found


@compiled
def _sums_share(worker, workers, factor, ids, target, sums):
    """`Y F`."""
    first, last = share(worker, workers, factor.shape[1])
    zero = sums.dtype.type(0)
    for n in range(ids.shape[0]):
        into = sums[n, first:last]
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k], first:last], target[n, k]
            if k == 0:
                for i in range(len(into)):
                    into[i] = value * row[i]
            else:
                for i in range(len(into)):
                    into[i] += value * row[i]
        if ids.shape[1] == 0:
            into[:] = zero


@compiled
def _gradient_share(worker, workers, sums, pair, products, stacked, target, norm, total, gradient, records):
    rows, d = gradient.shape
    first, last = share(worker, workers, d)
    at_map, shared, _ = columns_of(d)
    into = pair[rows:, first:last] if records else gradient[:, first:last]
    multiply(sums[:, :d], False, stacked[at_map : at_map + d, first:last], False, into, 1.0, 0.0)
    offset, whole = stacked[shared, first:last], stacked[shared + 1, first:last]
    for n in range(rows):
        p, g = products[n, first:last], gradient[n, first:last]
        s = pair[rows + n, first:last] if records else g
        if total.shape[0]:
            by_score, by_total = target[n].sum(), total[n]
            for i in range(len(s)):
                s[i] += by_score * offset[i] + by_total * whole[i]
        scale = norm[n] + norm[n]
        if records:
            for i in range(len(p)):
                own = scale * p[i] + s[i]
                g[i] = own
                p[i] = own
                s[i] += own
        else:
            for i in range(len(p)):
                g[i] += scale * p[i]


@compiled
def hidden_gradient(workers, pair, products, stacked, factor, ids, target, norm, total, gradient, records):
    sums = np.empty((gradient.shape[0], pair.shape[1]), gradient.dtype)
    apart(_sums_share, workers, (workers, factor, ids, target, sums))
    given = (workers, sums, pair, products, stacked, target, norm, total, gradient, records)
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


# workers, rows, K, d, columns of products, V; which loss and its settings, what a row counts, whether it reads
# the sum; stacked, F, hidden, targets; weights and whether there are any; ids, pair, products, target, norm,
# total, the gradient of hidden, the loss
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
    pair, products = carray(pair, (2 * rows, columns_of(d)[0])), carray(products, (rows, columns))
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
