"""The loops behind `kernels/factored.py`, compiled by numba: importing this module imports numba.

The features are divided among workers: each reads, multiplies and updates the same rows of Q, U and R and the
same columns of F in every call, so that they stay in its own core's cache. Only the (N, N) matrices are divided by
rows. Arguments are those of the functions there.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import numpy as np

from lastlayer.kernels.blas import multiply
from lastlayer.kernels.cache_hints import fetch_number
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.screening.threads import apart

TILE = 16  # of a matrix, so that rows and columns stay in cache
AHEAD = 16  # rows of F, of which a number each is wanted
PIECE = 1 << 17  # numbers of F that stay in cache between two products


@compiled
def _share(worker, workers, count):
    return count * worker // workers, count * (worker + 1) // workers


@compiled
def _answer_share(worker, workers, hidden, stacked, factor, ids, pair, products, parts):
    (rows, d), zero = hidden.shape, products.dtype.type(0)
    first, last = _share(worker, workers, rows)
    pair[first:last] = hidden[first:last]
    first, last = _share(worker, workers, d)
    for at in (0, d, 2 * d + 2):
        if at + d <= stacked.shape[0]:
            own = slice(at + first, at + last)
            multiply(hidden, False, stacked[own], True, products[:, own], 1.0, 0.0)
    if worker == 0:
        multiply(hidden, False, stacked[2 * d : 2 * d + 2], True, products[:, 2 * d : 2 * d + 2], 1.0, 0.0)
    for n in range(rows):
        h, p, mapped = hidden[n, first:last], products[n, first:last], products[n, d + first : d + last]
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
    first, last = _share(worker, workers, d)
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
    first, last = _share(worker, workers, d)
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
    apart(_row_matrices_share, workers, (workers, pair, pull, total, either, rate, cross, system, inner, found))
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
def _extend_share(worker, workers, power, series, longer):
    first, last = _share(worker, workers, power.shape[0])
    multiply(power[first:last], False, series, False, longer[first:last], 1.0, 1.0)


@compiled
def _solve_share(worker, workers, series, products, solution):
    rows, d = solution.shape
    first, last = _share(worker, workers, d)
    right, into = products[:, 2 * d + 2 + first : 2 * d + 2 + last], solution[:, first:last]
    for n in range(rows):
        into[n] = right[n]
    multiply(series, False, right, False, into, 1.0, 1.0)


@compiled
def solve_by_series(workers, system, products, solution, size, eps):
    found = np.empty(workers)
    power, series = system, system
    square, either = np.empty_like(system), np.empty_like(system)
    apart(_square_share, workers, (workers, power, series, square, either, found))
    while found.sum() * size > eps:
        longer = either.copy()
        apart(_extend_share, workers, (workers, square, series, longer))
        power, series = square, longer
        square, either = np.empty_like(system), np.empty_like(system)
        apart(_square_share, workers, (workers, power, series, square, either, found))
    longer = either.copy()
    apart(_extend_share, workers, (workers, square, either, longer))
    apart(_solve_share, workers, (workers, longer, products, solution))


@compiled
def _update_share(
    worker, workers, stacked, factor, pair, products, ids, target, norm, total, rate, inner, solution
):
    rows, d = solution.shape
    hidden, rate, num_classes = pair[:rows], norm.dtype.type(rate), norm.dtype.type(factor.shape[0])
    first, last = _share(worker, workers, d)
    for n in range(rows):
        p, mapped = products[n, first:last], products[n, d + first : d + last]
        both, x, y = pair[rows + n, first:last], solution[n, first:last], products[n, 2 * d + 2 + first :]
        own = rate * (norm[n] + norm[n])
        for i in range(len(p)):
            p[i] = -own * p[i] - rate * both[i]
        for i in range(len(p)):
            mapped[i] *= -own
        for i in range(len(x)):
            y[i] = own * x[i]
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k], first:last], -rate * target[n, k]
            for i in range(len(x)):
                row[i] += value * x[i]
        if worker == 0:
            more = total[n] if total.shape[0] else norm.dtype.type(0)
            products[n, 2 * d] = -own * products[n, 2 * d] - rate * more
            more = num_classes * more + target[n].sum()
            products[n, 2 * d + 1] = -own * products[n, 2 * d + 1] - rate * more
    multiply(inner, False, hidden[:, first:last], False, products[:, first:last], rate, 1.0)
    for at in (0, d, 2 * d + 2):
        own_rows = slice(at + first, at + last)
        multiply(products[:, own_rows], True, hidden, False, stacked[own_rows], 1.0, 1.0)
    if worker == 0:
        shared = slice(2 * d, 2 * d + 2)
        multiply(products[:, shared], True, hidden, False, stacked[shared], 1.0, 1.0)


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
    given = (workers, stacked, factor, pair, products, ids, target, norm, total, rate, inner, solution)
    apart(_update_share, workers, given)
    apart(_symmetric_share, workers, (workers, stacked[: solution.shape[1]]))


@compiled
def _add_columns_share(worker, workers, factor, columns, change, least):
    first, last = _share(worker, workers, factor.shape[0])
    most, width = max(1, PIECE // factor.shape[1]), len(columns)
    places = np.empty(most, np.int64)
    values, sums = np.empty((most, width), factor.dtype), np.empty((most, factor.shape[1]), factor.dtype)
    start = first
    while start < last:
        count = 0
        while start < last and count < most:
            some, above = values[count], False
            for k in range(width):
                fetch_number(factor, start + AHEAD, columns[k])
                some[k] = factor[start, columns[k]]
                above |= abs(some[k]) > least[k]
            places[count] = start
            count += above
            start += 1
        multiply(values[:count], False, change, False, sums[:count], 1.0, 0.0)
        for n in range(count):
            row, more = factor[places[n]], sums[n]
            for i in range(len(row)):
                row[i] += more[i]


@compiled
def add_columns(workers, factor, columns, change, least):
    apart(_add_columns_share, workers, (workers, factor, columns, change, least))
