"""The loops behind `kernels/factored_update.py`, compiled by numba: importing this module imports numba.

Features are divided among workers as in `factored_loops.py`; only the (N, N) matrices are divided by rows.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from lastlayer.kernels.apart import apart
from lastlayer.kernels.blas import multiply
from lastlayer.kernels.cache_hints import fetch_number
from lastlayer.kernels.factored_loops import columns_of, fetch_targets
from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.tiles import share, symmetric_share

AHEAD = 16  # rows of F, of which a number each is wanted
PIECE = 1 << 17  # numbers of F that stay in cache between two products


@compiled
def _rows_of(worker, workers, rows):
    return rows * worker // workers, rows * (worker + 1) // workers


@compiled
def _add_overlap(ids, target, rate, overlap):
    """`lr Y Y^T`: every pair of equal ids, found by sorting them."""
    width = ids.shape[1]
    flat = ids.ravel()
    order = np.argsort(flat)
    first = 0
    for last in range(1, len(order) + 1):
        if last == len(order) or flat[order[last]] != flat[order[first]]:
            for a in order[first:last]:
                own = rate * target[a // width, a % width]
                for b in order[first:last]:
                    overlap[a // width, b // width] += own * target[b // width, b % width]
            first = last


@compiled
def _row_matrices_share(worker, workers, d, pair, ids, target, norm, total, either, rate, system, inner, found):
    rows, zero = system.shape[0], norm.dtype.type(0)
    twice = rate + rate
    first, last = _rows_of(worker, workers, rows)
    own_rows = pair[first:last, :d]
    multiply(own_rows, False, pair[:rows, :d], True, system[first:last], 1.0, 0.0)
    multiply(own_rows, False, pair[rows:, :d], True, inner[first:last], 1.0, 0.0)
    shrinking, growing, squares = 0.0, 0.0, 0.0
    for n in range(first, last):
        s, o, own, square = system[n], inner[n], twice * norm[n], zero
        for m in range(rows):
            s[m] *= twice * norm[m]
            square += s[m] * s[m]
        for m in range(rows):
            o[m] *= own
        if ids.shape[1] == 1:
            one, value, same, values = ids[n, 0], rate * target[n, 0], ids.ravel(), target.ravel()
            for m in range(rows):
                o[m] += value * values[m] if same[m] == one else zero
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
def _row_matrices(workers, d, pair, ids, target, norm, total, num_classes, rate, system, inner):
    """Positive and negative part of the trace of S, its norm, and what is not finite where a derivative is not."""
    either = target.sum(1)
    probe = float(either.sum())
    if total.shape[0]:
        probe += float(total.sum())
        either += total.dtype.type(num_classes / 2) * total
    parts = np.empty((workers, 3))
    given = (workers, d, pair, ids, target, norm, total, either, rate, system, inner, parts)
    apart(_row_matrices_share, workers, given)
    if ids.shape[1] != 1:
        _add_overlap(ids, target, rate, inner)
    return parts[:, 0].sum(), parts[:, 1].sum(), np.sqrt(parts[:, 2].sum()), probe


@compiled
def _square_share(worker, workers, power, series, square, either, longer, found):
    first, last = _rows_of(worker, workers, power.shape[0])
    multiply(power[first:last], False, power, False, square[first:last], 1.0, 0.0)
    total = 0.0
    for n in range(first, last):
        p, s, e, l, part = square[n], series[n], either[n], longer[n], square.dtype.type(0)
        for m in range(len(p)):
            e[m] = s[m] + p[m]
            l[m] = s[m] + p[m]
            part += p[m] * p[m]
        total += part
    found[worker] = total


@compiled
def _extend_share(worker, workers, power, series, longer, one):
    """`longer + power series`, and `one` along the diagonal."""
    first, last = _rows_of(worker, workers, power.shape[0])
    multiply(power[first:last], False, series, False, longer[first:last], 1.0, 1.0)
    for n in range(first, last):
        longer[n, n] += one


@compiled
def _series(workers, system, size, eps):
    """`I + S + S^2 + ...` of a small S."""
    one, zero = system.dtype.type(1), system.dtype.type(0)
    if size * size <= eps:
        series = system.copy()
        for n in range(len(series)):
            series[n, n] += one
        return series
    found, power, series = np.empty(workers), system, system
    while True:
        square, either, longer = np.empty_like(system), np.empty_like(system), np.empty_like(system)
        apart(_square_share, workers, (workers, power, series, square, either, longer, found))
        if not found.sum() * size > eps:
            apart(_extend_share, workers, (workers, square, either, longer, one))
            return longer
        apart(_extend_share, workers, (workers, square, series, longer, zero))
        power, series = square, longer


@compiled
def _update_share(
    worker,
    workers,
    stacked,
    factor,
    pair,
    products,
    ids,
    target,
    norm,
    total,
    rate,
    scaled,
    inner,
    series,
    solution,
):
    """`series` is empty where the solution is there already; it is used up."""
    rows, d, num_classes = ids.shape[0], factor.shape[1], norm.dtype.type(factor.shape[0])
    hidden, zero = pair[:rows, :d], norm.dtype.type(0)
    first, last = share(worker, workers, d)
    at_map, at_shared, at_inverse = columns_of(d)
    fetch_targets(worker, workers, factor, ids)
    if series.shape[0]:
        right = products[:, at_inverse + first : at_inverse + last]
        multiply(series, False, right, False, solution[:, first:last], 1.0, 0.0)
    for n in range(rows):
        x, mapped, own = (
            solution[n, first:last],
            products[n, at_map + first : at_map + last],
            rate * (norm[n] + norm[n]),
        )
        for k in range(ids.shape[1]):
            row, value = factor[ids[n, k], first:last], -rate * target[n, k]
            for i in range(len(x)):
                row[i] += value * x[i]
        for i in range(len(x)):
            x[i] *= own
        for i in range(len(mapped)):
            mapped[i] *= -own
        if worker == 0:
            p, more = products[n, at_shared : at_shared + 2], total[n] if total.shape[0] else zero
            p[0] = -own * p[0] - rate * more
            p[1] = -own * p[1] - rate * (num_classes * more + target[n].sum())
    by_gram, by_map = products[:, first:last], products[:, at_map + first : at_map + last]
    multiply(inner, False, hidden[:, first:last], False, by_gram, rate, -(rate + rate) * scaled)
    multiply(by_gram, True, hidden, False, stacked[first:last], 1.0, 1.0)
    multiply(by_map, True, hidden, False, stacked[at_map + first : at_map + last], 1.0, 1.0)
    multiply(
        solution[:, first:last], True, hidden, False, stacked[at_inverse + first : at_inverse + last], 1.0, 1.0
    )
    if worker == 0:
        shared = slice(at_shared, at_shared + 2)
        multiply(products[:, shared], True, hidden, False, stacked[shared], 1.0, 1.0)


@compiled
def _arrays(sizes, place):
    """The parts of a gradient."""
    rows, width, d, columns, uses_sum = sizes
    pair, products, ids, target, norm, total = place
    pair, products = carray(pair, (2 * rows, columns_of(d)[0])), carray(products, (rows, columns))
    ids, target = carray(ids, (rows, width)), carray(target, (rows, width))
    return pair, products, ids, target, carray(norm, (rows,)), carray(total, (rows * uses_sum,))


@compiled
def _update(workers, stacked, factor, given, rate, scaled, inner, series, solution):
    rate = inner.dtype.type(rate)
    given = (workers, stacked, factor, *given, rate, scaled, inner, series, solution)
    apart(_update_share, workers, given)
    apart(symmetric_share, workers, (workers, stacked[: factor.shape[1]]))


# workers; N, K, d, columns of products, whether the loss reads the sum; pair, products, ids, target, norm, total;
# V, rate, what Z is still to be multiplied by; stacked, F, system and inner one after the other, what is found;
# whether to make an easy step at once, up to what trace and norm it is one, eps
EASY_KINDS = "nnnnnnaaiaaanxxaaadnxxx"


def easy_step(asked: Any) -> int:
    (
        workers, rows, width, d, columns, uses_sum, pair, products, ids, target, norm, total, num_classes, rate,
        scaled, stacked, factor, both, found, at_once, most, short, eps,
    ) = asked[0]  # fmt: skip
    given = _arrays((rows, width, d, columns, uses_sum), (pair, products, ids, target, norm, total))
    pair, products, ids, target, norm, total = given
    both, found, step = carray(both, (2, rows, rows)), carray(found, (4,)), pair.dtype.type(rate)
    stacked, factor = carray(stacked, (columns, d)), carray(factor, (num_classes, d))
    system, inner = both[0], both[1]
    traces: Any = _row_matrices(workers, d, pair, ids, target, norm, total, num_classes, step, system, inner)
    shrinking, growing, size, probe = traces
    found[0], found[1], found[2], found[3] = shrinking, growing, size, probe
    if at_once and shrinking <= most and growing == 0 and size <= short and np.isfinite(probe):  # none with nan
        series, solution = _series(workers, system, size, eps), np.empty((rows, pair.shape[1]), pair.dtype)
        _update(workers, stacked, factor, given, rate, scaled, inner, series, solution)
        return 1
    return 0


# as above up to F; system and inner; the norm of system and eps, or the solution and whether it is there
UPDATE_KINDS = "nnnnnnaaiaaanxxaaaxxan"


def update(asked: Any) -> int:
    (
        workers, rows, width, d, columns, uses_sum, pair, products, ids, target, norm, total, num_classes, rate,
        scaled, stacked, factor, both, size, eps, solution, solved,
    ) = asked[0]  # fmt: skip
    given = _arrays((rows, width, d, columns, uses_sum), (pair, products, ids, target, norm, total))
    both, found = carray(both, (2, rows, rows)), np.empty((rows, given[0].shape[1]), given[0].dtype)
    if solved:
        series = np.empty((0, rows), found.dtype)
        found[:, :d] = carray(solution, (rows, d))
    else:
        series = _series(workers, both[0], size, eps)
    stacked, factor = carray(stacked, (columns, d)), carray(factor, (num_classes, d))
    _update(workers, stacked, factor, given, rate, scaled, both[1], series, found)
    return 0


@compiled
def _add_columns_share(worker, workers, factor, columns, change, least):
    first, last = _rows_of(worker, workers, factor.shape[0])
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
