"""The loops behind `kernels/factored_update.py`, compiled by numba: importing this module imports numba.

Features are divided among workers as in `factored_loops.py`; only the (N, N) matrices are divided by rows.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from lastlayer.kernels.blas import multiply
from lastlayer.kernels.cache_hints import fetch_number
from lastlayer.kernels.factored_loops import share
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.screening.threads import apart

TILE = 16  # of a matrix, so that rows and columns stay in cache
AHEAD = 16  # rows of F, of which a number each is wanted
PIECE = 1 << 17  # numbers of F that stay in cache between two products


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
def _row_matrices_share(worker, workers, pair, norm, total, either, rate, cross, system, inner, found):
    rows, zero, rate = system.shape[0], norm.dtype.type(0), norm.dtype.type(rate)
    twice = rate + rate
    first, last = share(worker, workers, rows)
    multiply(pair[first:last], False, pair, True, cross[first:last], 1.0, 0.0)
    shrinking, growing, squares = 0.0, 0.0, 0.0
    for n in range(first, last):
        c, s, o, own, square = cross[n], system[n], inner[n], twice * norm[n], zero
        for m in range(rows):
            s[m] = twice * norm[m] * c[m]
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


# workers, rows, K, d, V, rate, whether the loss reads the sum; pair, ids, target, norm, total; system, inner; what
# is found
MATRICES_KINDS = "nnnnnxnaiaaaaad"


def row_matrices(asked: Any) -> int:
    (
        workers, rows, width, d, num_classes, rate, uses_sum, pair, ids, target, norm, total, system, inner, found,
    ) = asked[0]  # fmt: skip
    pair, ids, target = carray(pair, (2 * rows, d)), carray(ids, (rows, width)), carray(target, (rows, width))
    norm, total = carray(norm, (rows,)), carray(total, (rows * uses_sum,))
    system, inner, found = carray(system, (rows, rows)), carray(inner, (rows, rows)), carray(found, (4,))
    inner[:] = 0
    _add_overlap(ids, target, inner)
    either = target.sum(1)
    probe = float(either.sum())
    if uses_sum:
        probe += float(total.sum())
        either += total.dtype.type(num_classes / 2) * total
    cross, parts = np.empty((rows, 2 * rows), pair.dtype), np.empty((workers, 3))
    given = (workers, pair, norm, total, either, rate, cross, system, inner, parts)
    apart(_row_matrices_share, workers, given)
    found[0], found[1], found[2], found[3] = parts[:, 0].sum(), parts[:, 1].sum(), parts[:, 2].sum(), probe
    return 0


@compiled
def _square_share(worker, workers, power, series, square, either, found):
    first, last = share(worker, workers, power.shape[0])
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
    first, last = share(worker, workers, power.shape[0])
    multiply(power[first:last], False, series, False, longer[first:last], 1.0, 1.0)


@compiled
def _series(workers, system, size, eps):
    """`S + S^2 + ...` of a small S."""
    found = np.empty(workers)
    power, series = system, system
    square, either = np.empty_like(system), np.empty_like(system)
    if size * size <= eps:
        return system
    apart(_square_share, workers, (workers, power, series, square, either, found))
    while found.sum() * size > eps:
        longer = either.copy()
        apart(_extend_share, workers, (workers, square, series, longer))
        power, series = square, longer
        square, either = np.empty_like(system), np.empty_like(system)
        apart(_square_share, workers, (workers, power, series, square, either, found))
    longer = either.copy()
    apart(_extend_share, workers, (workers, square, either, longer))
    return longer


@compiled
def _update_share(
    worker, workers, stacked, factor, pair, products, ids, target, norm, total, rate, inner, series, solution
):
    """`series` is empty where the solution is there already."""
    rows, d = solution.shape
    hidden, rate, num_classes = pair[:rows], norm.dtype.type(rate), norm.dtype.type(factor.shape[0])
    first, last = share(worker, workers, d)
    if series.shape[0]:
        right, into = products[:, 2 * d + 2 + first : 2 * d + 2 + last], solution[:, first:last]
        for n in range(rows):
            into[n] = right[n]
        multiply(series, False, right, False, into, 1.0, 1.0)
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


# workers, rows, K, d, V, rate, whether the loss reads the sum; pair, products, ids, target, norm, total; system and
# inner; norm of system and eps, or the solution and whether it is there; stacked, F
UPDATE_KINDS = "nnnnnxnaaiaaaaaxxanaa"


def update(asked: Any) -> int:
    (
        workers, rows, width, d, num_classes, rate, uses_sum, pair, products, ids, target, norm, total, system,
        inner, size, eps, solution, solved, stacked, factor,
    ) = asked[0]  # fmt: skip
    pair, products = carray(pair, (2 * rows, d)), carray(products, (rows, 3 * d + 2))
    ids, target = carray(ids, (rows, width)), carray(target, (rows, width))
    norm, total = carray(norm, (rows,)), carray(total, (rows * uses_sum,))
    stacked, factor = carray(stacked, (3 * d + 2, d)), carray(factor, (num_classes, d))
    system, inner = carray(system, (rows, rows)), carray(inner, (rows, rows))
    if solved:
        series, found = system[:0], carray(solution, (rows, d))
    else:
        series, found = _series(workers, system, size, eps), np.empty((rows, d), pair.dtype)
    given = (
        workers, stacked, factor, pair, products, ids, target, norm, total, rate, inner, series, found,
    )  # fmt: skip
    apart(_update_share, workers, given)
    apart(_symmetric_share, workers, (workers, stacked[:d]))
    return 0


@compiled
def _add_columns_share(worker, workers, factor, columns, change, least):
    first, last = share(worker, workers, factor.shape[0])
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
