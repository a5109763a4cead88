"""The loops behind `kernels/factored.py`, compiled by numba: importing this module imports numba.

Rows of the batch are divided among workers, and each multiplies, gathers and adds its own without waiting for the
others; a function ends where all must have finished. Arguments are those of the functions there.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import numpy as np

from lastlayer.kernels.blas import multiply
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.screening.threads import apart

TILE = 16  # of a matrix, so that rows and columns stay in cache


@compiled
def _share(worker, workers, count):
    return count * worker // workers, count * (worker + 1) // workers


@compiled
def _answer_share(worker, workers, hidden, stacked, factor, ids, pair, products, squared_norm, scores, total):
    d = hidden.shape[1]
    first, last = _share(worker, workers, ids.shape[0])
    own = pair[first:last]
    own[:] = hidden[first:last]
    multiply(own, False, stacked[: products.shape[1]], True, products[first:last], 1.0, 0.0)
    zero = products.dtype.type(0)
    for n in range(first, last):
        h, p, mapped = pair[n], products[n], products[n, d : 2 * d]
        found = zero
        for i in range(d):
            found += h[i] * p[i]
        squared_norm[n] = zero if found < zero else found  # nan stays nan
        total[n] = products[n, 2 * d + 1]
        for k in range(ids.shape[1]):
            row = factor[ids[n, k]]
            found = products[n, 2 * d]
            for i in range(d):
                found += mapped[i] * row[i]
            scores[n, k] = found


@compiled
def answer(workers, hidden, stacked, factor, ids, pair, products, squared_norm, scores, total):
    given = (workers, hidden, stacked, factor, ids, pair, products, squared_norm, scores, total)
    apart(_answer_share, workers, given)


@compiled
def _gradient_share(
    worker, workers, pair, products, stacked, factor, ids, target, norm, total, gradient, sums, sparse, records
):
    (rows, d), zero = sums.shape, sums.dtype.type(0)
    first, last = _share(worker, workers, rows)
    for n in range(first, last):
        into = sums[n]
        into[:] = zero
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k]], target[n, k]
            for i in range(d):
                into[i] += value * row[i]
    multiply(sums[first:last], False, stacked[d : 2 * d], False, sparse[first:last], 1.0, 0.0)
    for n in range(first, last):
        p, s, g, b, scale = products[n], sparse[n], gradient[n], pair[rows + n], norm[n] + norm[n]
        if total.shape[0]:
            offset, whole, by_total, by_score = stacked[2 * d], stacked[2 * d + 1], total[n], zero
            for k in range(ids.shape[1]):
                by_score += target[n, k]
            for i in range(d):
                s[i] += by_score * offset[i] + by_total * whole[i]
        for i in range(d):
            g[i] = scale * p[i] + s[i]
        if records:
            for i in range(d):
                b[i] = g[i] + s[i]


@compiled
def hidden_gradient(workers, pair, products, stacked, factor, ids, target, norm, total, gradient, records):
    sums, sparse = np.empty_like(gradient), np.empty_like(gradient)
    given = (workers, pair, products, stacked, factor, ids, target, norm, total, gradient, sums, sparse, records)
    apart(_gradient_share, workers, given)


@compiled
def _add_overlap(ids, target, overlap):
    """Every pair of equal ids, found by sorting them."""
    width = ids.shape[1]
    flat = ids.ravel()
    order = np.argsort(flat)
    first = 0
    for last in range(1, len(order) + 1):
        if last == len(order) or flat[order[last]] != flat[order[first]]:
            for a in order[first:last]:
                for b in order[first:last]:
                    overlap[a // width, b // width] += (
                        target[a // width, a % width] * target[b // width, b % width]
                    )
            first = last


@compiled
def _row_matrices_share(worker, workers, pair, pull, total, either, rate, cross, system, inner, found):
    rows, rate, zero = system.shape[0], pull.dtype.type(rate), pull.dtype.type(0)
    first, last = _share(worker, workers, rows)
    multiply(pair[first:last], False, pair, True, cross[first:last], 1.0, 0.0)
    shrinking, growing, squares = 0.0, 0.0, 0.0
    for n in range(first, last):
        c, s, o, own, square = cross[n], system[n], inner[n], pull[n], zero
        for m in range(rows):
            s[m] = pull[m] * c[m]
            square += s[m] * s[m]
        for m in range(rows):
            o[m] = rate * o[m] + own * c[rows + m]
        if total.shape[0]:
            left, right = rate * total[n], rate * either[n]
            for m in range(rows):
                o[m] += left * either[m] + right * total[m]
        squares += square
        if s[n] > 0:
            shrinking += s[n]
        else:
            growing -= s[n]
    found[worker, 0], found[worker, 1], found[worker, 2] = shrinking, growing, squares


@compiled
def row_matrices(workers, pair, ids, target, total, pull, rate, num_classes, system, inner):
    rows, found = system.shape[0], np.empty((workers, 3))
    inner[:] = 0
    _add_overlap(ids, target, inner)
    either = target.sum(1)
    probe = float(either.sum())
    if total.shape[0]:
        probe += float(total.sum())
        either += total.dtype.type(num_classes / 2) * total
    cross = np.empty((rows, 2 * rows), pair.dtype)
    apart(
        _row_matrices_share, workers, (workers, pair, pull, total, either, rate, cross, system, inner, found)
    )
    return found[:, 0].sum(), found[:, 1].sum(), found[:, 2].sum(), probe


@compiled
def _square_share(worker, workers, power, series, square, either, found):
    first, last = _share(worker, workers, power.shape[0])
    multiply(power[first:last], False, power, False, square[first:last], 1.0, 0.0)
    total = 0.0
    for n in range(first, last):
        p, s, e, part = square[n], series[n], either[n], square.dtype.type(0)
        for m in range(len(p)):
            e[m] = s[m] + p[m]
            part += p[m] * p[m]
        total += part
    found[worker] = total


@compiled
def _solve_share(worker, workers, power, either, products, solution):
    first, last = _share(worker, workers, power.shape[0])
    right = products[:, products.shape[1] - solution.shape[1] :]
    series = either[first:last].copy()
    multiply(power[first:last], False, either, False, series, 1.0, 1.0)
    solution[first:last] = right[first:last]
    multiply(series, False, right, False, solution[first:last], 1.0, 1.0)


@compiled
def solve_by_series(workers, system, products, solution, size, eps):
    found = np.empty(workers)
    power, series = system, system
    square, either = np.empty_like(system), np.empty_like(system)
    apart(_square_share, workers, (workers, power, series, square, either, found))
    while found.sum() * size > eps:
        longer = either.copy()
        multiply(square, False, series, False, longer, 1.0, 1.0)
        power, series = square, longer
        square, either = np.empty_like(system), np.empty_like(system)
        apart(_square_share, workers, (workers, power, series, square, either, found))
    apart(_solve_share, workers, (workers, square, either, products, solution))


@compiled
def _left_share(worker, workers, factor, pair, products, ids, target, norm, total, rate, inner, solution):
    (rows, d), num_classes = solution.shape, norm.dtype.type(factor.shape[0])
    rate = norm.dtype.type(rate)
    first, last = _share(worker, workers, rows)
    for n in range(first, last):
        p, b, x, own = products[n], pair[rows + n], solution[n], rate * (norm[n] + norm[n])
        for i in range(d):
            p[i] = -own * p[i] - rate * b[i]
        for i in range(d, 2 * d + 2):
            p[i] *= -own
        mine = products[n, 2 * d + 2 :]
        for i in range(d):
            mine[i] = own * x[i]
        for k in range(ids.shape[1]):
            p[2 * d + 1] -= rate * target[n, k]
        if total.shape[0]:
            p[2 * d] -= rate * total[n]
            p[2 * d + 1] -= rate * num_classes * total[n]
    multiply(inner[first:last], False, pair[:rows], False, products[first:last, :d], rate, 1.0)
    first, last = _share(worker, workers, d)  # of columns: a class may be the target of several rows
    for n in range(rows):
        x = solution[n, first:last]
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k], first:last], -rate * target[n, k]
            for i in range(len(x)):
                row[i] += value * x[i]


@compiled
def _stacked_share(worker, workers, stacked, products, hidden):
    first, last = _share(worker, workers, stacked.shape[0])
    multiply(products[:, first:last], True, hidden, False, stacked[first:last], 1.0, 1.0)


@compiled
def _symmetric_share(worker, workers, matrix):
    size, half = matrix.shape[0], matrix.dtype.type(0.5)
    for i0 in range(worker * TILE, size, workers * TILE):
        for j0 in range(0, i0 + 1, TILE):
            for i in range(i0, min(i0 + TILE, size)):
                for j in range(j0, min(j0 + TILE, i)):
                    mean = half * (matrix[i, j] + matrix[j, i])
                    matrix[i, j] = mean
                    matrix[j, i] = mean


@compiled
def update(workers, stacked, factor, pair, products, ids, target, norm, total, rate, inner, solution):
    rows, d = solution.shape
    apart(
        _left_share,
        workers,
        (workers, factor, pair, products, ids, target, norm, total, rate, inner, solution),
    )
    apart(_stacked_share, workers, (workers, stacked, products, pair[:rows]))
    apart(_symmetric_share, workers, (workers, stacked[:d]))
