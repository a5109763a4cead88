"""Partial selection: the best classes from summarised scores, never by a sort."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.fast_math import larger
from lastlayer.kernels.screening.blocks import FAST, MINUS_INFINITY

SAMPLED = 16  # one score of so many says where a threshold lies
LEAST_STEP = np.float32(1e-6)  # downwards, from where there is nothing to go by: the largest score is 0, and alone
AT_ONCE = 16  # scores compared by one instruction


@intrinsic
def _append_reaching(typingctx: Any, scores: Any, first: Any, least: Any, found: Any, count: Any) -> Any:
    """Which of AT_ONCE scores from `first` on reach `least`: put into `found` from `count` on; the new count.

    A loop with a condition moves numbers one by one; one instruction packs those that are wanted.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, first, least, found, count = args
        i32, lane = ir.IntType(32), ir.VectorType(ir.IntType(32), AT_ONCE)
        floats, mask = ir.VectorType(ir.FloatType(), AT_ONCE), ir.VectorType(ir.IntType(1), AT_ONCE)

        def address(array: Any, kind: Any, offset: Any) -> Any:
            return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])

        def repeated(value: Any, vector: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, i32(0))
            return builder.shuffle_vector(one, one, ir.Constant(lane, [0] * AT_ONCE))

        loaded = builder.load(builder.bitcast(address(scores, signature.args[0], first), floats.as_pointer()))
        loaded.align = 4
        wanted = builder.fcmp_ordered(">=", loaded, repeated(least, floats))
        ids = builder.add(repeated(builder.trunc(first, i32), lane), ir.Constant(lane, list(range(AT_ONCE))))
        target = address(found, signature.args[3], count)
        kind = ir.FunctionType(ir.VoidType(), [lane, target.type, mask])
        pack = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.compressstore.v{AT_ONCE}i32")
        builder.call(pack, [ids, target, wanted])
        bits = builder.bitcast(wanted, ir.IntType(AT_ONCE))
        return builder.add(count, builder.zext(builder.ctpop(bits), ir.IntType(64)))

    return types.int64(scores, types.int64, types.float32, found, types.int64), generate


@njit(cache=True)
def _append_all(scores: Any, first: int, last: int, least: Any, found: Any, count: Any) -> Any:
    """Which of `scores[first:last]` reach `least`, put into `found` from `count` on; the new count."""
    while last - first >= AT_ONCE:
        count = _append_reaching(scores, first, least, found, count)  # pyright: ignore[reportCallIssue]
        first += AT_ONCE
    for i in range(first, last):
        if scores[i] >= least:
            found[count] = i
            count += 1
    return count


@njit(cache=True, fastmath=FAST)
def _count_above(values: Any, least: Any) -> Any:
    n = np.int32(0)
    for i in range(values.size):
        n += np.int32(values[i] >= least)
    return n


@njit(cache=True, fastmath=FAST)
def _ends(values: Any) -> tuple[Any, Any]:
    """The smallest and the largest; `min` and `max` move one number at a time."""
    low, high = MINUS_INFINITY, MINUS_INFINITY
    for i in range(values.size):
        low, high = larger(low, -values[i]), larger(high, values[i])  # pyright: ignore[reportCallIssue]
    return -low, high


@njit(cache=True)
def _threshold(values: Any, count: int, spare: Any, low: Any, high: Any) -> Any:
    """A number that from `count` to `count + spare` values reach (more, where they tie); near [low, high].

    By bisection: counting runs through vectors of numbers, where any sort or selection moves them one by one.
    """
    if count >= values.size:
        return MINUS_INFINITY
    if _count_above(values, high) >= count:
        return high
    while _count_above(values, low) < count:
        low -= max(high - low, abs(low) * np.float32(1e-3), LEAST_STEP)
    while True:
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        if middle <= low or middle >= high:
            return low
        above = _count_above(values, middle)
        if above < count:
            high = middle
        else:
            low = middle
            if above <= count + spare:
                return low


@njit(cache=True)
def _sampled_threshold(scores: Any, count: int, low: Any, high: Any) -> Any:
    """A number that about `count` scores reach, and nearly always at least so many, from one in SAMPLED."""
    wanted = count // SAMPLED + count // (4 * SAMPLED) + 4
    if 2 * wanted >= scores.size // SAMPLED:
        return _threshold(scores, count, count // 8, low, high)
    return _threshold(scores[::SAMPLED].copy(), wanted, wanted // 8, low, high)


@njit(cache=True)
def _append_blocks(scores: Any, block_max: Any, size: int, least: Any, found: Any) -> Any:
    """Which scores reach `least`, put into `found`; their number. Reads no block that has none."""
    n = np.int64(0)
    for block in range(block_max.size):
        if block_max[block] >= least:
            n = _append_all(scores, block * size, min((block + 1) * size, scores.size), least, found, n)
    return n


@njit(cache=True)
def choose(
    scores: Any,  # (V,) float32
    block_max: Any,  # (blocks,) float32
    size: int,
    count: int,
) -> Any:  # (count,) int32
    """The `count` best classes by partial selection: those that reach a threshold, then the best of these.

    For few of them the threshold is about the count-th largest block maximum, which at least `count` scores reach,
    all in few blocks.
    """
    few, none = 2 * count <= block_max.size, np.int64(0)
    low, high = _ends(block_max)
    least = _threshold(block_max, count, none, low, high) if few else _sampled_threshold(scores, count, low, high)
    found = np.empty(size * _count_above(block_max, least) if few else scores.size, dtype=np.int32)
    n = _append_blocks(scores, block_max, size, least, found)
    if not few and n < count:  # the sample was not like the rest
        least = _threshold(scores, count, count // 8, low, high)
        n = _append_blocks(scores, block_max, size, least, found)
    if n <= count:
        return found[:n]
    values = np.empty(n, dtype=np.float32)
    for j in range(n):
        values[j] = scores[found[j]]
    least = _threshold(values, count, none, least, high)
    ties = count - _count_above(values, np.nextafter(least, np.float32(np.inf)))  # room that is left for them
    kept = 0
    for j in range(n):
        if values[j] > least:
            found[kept] = found[j]
            kept += 1
        elif values[j] == least and ties > 0:
            found[kept] = found[j]
            kept += 1
            ties -= 1
    return found[:kept]
