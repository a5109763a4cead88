"""Screening of float32 logits on a CPU, fused: numba kernels that read each number once or twice.

Arrays in, arrays out; imported when one first runs, as importing numba takes a second. The plain twins are
`screening.screen` (candidates, certificate, normaliser) and the previews' own `scores`.

Scores are summarised by blocks of classes, while they are still in the cache: a block's maximum, and the sum of
its exponentials relative to it. Candidates, certificate and normaliser then come from the summaries, and scan only
the few blocks that matter.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.fast_math import load

UNCERTIFIED, CERTIFIED, DENSE = 0, 1, 2  # what became of a row; DENSE: too much is in play, ask the full layer
MINUS_INFINITY = np.float32(-np.inf)
LANES = 64  # int8 numbers that one instruction multiplies
ROWS_AT_ONCE = 4
SAMPLED = 16  # one score of so many says where a threshold lies
STRIP = 16  # classes whose products stay in the first cache while they are transposed
PREFETCH = 9216  # bytes ahead; the processor's own prefetcher stops at every page
HAS_VNNI = all(binding.get_host_cpu_features().get(name, False) for name in ("avx512f", "avx512vnni"))

# What may be reordered or assumed: sums in any order, no NaN (callers check); infinities are as they are.
FAST = {"reassoc", "contract", "nsz", "nnan", "arcp"}


@intrinsic
def _pointer_at(typingctx: Any, array: Any, offset: Any) -> Any:
    """The address of a byte of a contiguous int8 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(builder.bitcast(data, cgutils.voidptr_t), [args[1]])

    return types.CPointer(types.int8)(array, types.int64), generate


@intrinsic
def _dot_four_rows(typingctx: Any, rows: Any, width: Any, high: Any, low: Any) -> Any:
    """Dot products of four consecutive int8 rows with two int8 vectors, by AVX512-VNNI; `width` a multiple of 64.

    The instruction wants one factor unsigned: flipping the sign bit adds 128 to every number of the rows, so every
    product comes out larger by 128 times the sum of its vector.
    """
    answer = types.UniTuple(types.int32, 2 * ROWS_AT_ONCE)
    pointer = types.CPointer(types.int8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, width, high, low = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(i32, 16)
        module = builder.module
        dot = module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(vector, [vector] * 3))
        total = module.declare_intrinsic("llvm.vector.reduce.add.v16i32", (), ir.FunctionType(i32, [vector]))
        fetch = module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        )

        def load(base: Any, offset: Any) -> Any:
            value = builder.load(builder.bitcast(builder.gep(base, [offset]), vector.as_pointer()))
            value.align = 1
            return value

        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        offset = builder.phi(i64)
        offset.add_incoming(i64(0), before)
        sums = [builder.phi(vector) for _ in range(2 * ROWS_AT_ONCE)]
        parts, flip, grown = (load(high, offset), load(low, offset)), vector([-2139062144] * 16), []
        for row in range(ROWS_AT_ONCE):
            at = builder.add(offset, builder.mul(width, i64(row)))
            ahead = builder.gep(rows, [builder.add(at, i64(PREFETCH))])
            builder.call(fetch, [ahead, i32(0), i32(2), i32(1)])
            unsigned = builder.xor(load(rows, at), flip)
            grown += [builder.call(dot, [sums[len(grown) + part], unsigned, parts[part]]) for part in range(2)]
        following = builder.add(offset, i64(LANES))
        for phi, value, start in [
            (offset, following, None),
            *((s, g, vector([0] * 16)) for s, g in zip(sums, grown, strict=True)),
        ]:
            phi.add_incoming(value, loop)
            if start is not None:
                phi.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", following, width), loop, done)
        builder.position_at_end(done)
        return context.make_tuple(builder, answer, [builder.call(total, [value]) for value in grown])

    return answer(pointer, types.int64, pointer, pointer), generate


@intrinsic
def _max_of_lanes(typingctx: Any, values: Any, first: Any) -> Any:
    """The largest of the LANES float32 numbers from `first` on; numba leaves a loop over `max` one by one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        lanes = ir.VectorType(ir.FloatType(), LANES)
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), lanes.as_pointer()))
        loaded.align = 4
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        return builder.call(
            builder.module.declare_intrinsic(name, (), ir.FunctionType(ir.FloatType(), [lanes])),
            [loaded],
            fastmath=("nnan",),
        )

    return types.float32(values, types.int64), generate


@njit(cache=True)
def _max_of(values: Any, first: int, last: int) -> Any:
    most = values[first]
    while last - first >= LANES:
        most = max(most, _max_of_lanes(values, first))  # pyright: ignore[reportCallIssue]
        first += LANES
    for i in range(first, last):
        most = max(most, values[i])
    return most


@njit(cache=True, inline="always")
def _exp(x: Any) -> Any:
    """e^x for x <= 0 in float32, to 2 units in the last place (Cephes' polynomial); vectorises."""
    x = max(x, np.float32(-87.0))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    x = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.float32(1.9875691500e-4)
    p = p * x + np.float32(1.3981999507e-3)
    p = p * x + np.float32(8.3334519073e-3)
    p = p * x + np.float32(4.1665795894e-2)
    p = p * x + np.float32(1.6666665459e-1)
    p = p * x + np.float32(5.0000001201e-1)
    p = p * x * x + x + np.float32(1.0)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@njit(cache=True, fastmath=FAST)
def _summarise(scores: Any, first: int, last: int, size: int, block_max: Any, block_sum: Any) -> None:
    """Maximum, and sum of exponentials relative to it, of the blocks of `size` that begin in [first, last)."""
    for start in range(first, last, size):
        end = min(start + size, last)
        most = _max_of(scores, start, end)
        total = np.float32(0.0)
        if most > MINUS_INFINITY:
            for i in range(start, end):
                total += _exp(scores[i] - most)
        block_max[start // size] = most
        block_sum[start // size] = total


@njit(cache=True)
def split_in_two(hidden: Any, high: Any, low: Any) -> Any:
    """`hidden (d,)` as two int8 vectors: their steps, the norm of `hidden`, and that of what is left over."""
    most, norm = 0.0, 0.0
    for j in range(hidden.size):
        most = max(most, abs(float(hidden[j])))
        norm += float(hidden[j]) ** 2
    step_high = np.float32(most / 127) if most > 0 else np.float32(1.0)
    most = 0.0
    for j in range(hidden.size):
        high[j] = np.int8(np.rint(float(hidden[j]) / step_high))
        most = max(most, abs(float(hidden[j]) - float(step_high) * high[j]))
    step_low = np.float32(most / 127) if most > 0 else np.float32(1.0)
    left = 0.0
    for j in range(hidden.size):
        rest = float(hidden[j]) - float(step_high) * high[j]
        low[j] = np.int8(np.rint(rest / step_low))
        left += (rest - float(step_low) * low[j]) ** 2
    return step_high, step_low, np.sqrt(norm), np.sqrt(left)


@njit(cache=True, parallel=True, fastmath=FAST)
def scan_int8(
    rows: Any,  # (V, w) int8, w a multiple of LANES, zero beyond the vectors' own width
    scale: Any,  # (V,) float32
    bias: Any,  # (V,) float32
    high: Any,  # (w,) int8
    low: Any,  # (w,) int8
    step_high: float,
    step_low: float,
    size: int,
    workers: int,
    scores: Any,  # (V,) float32, out
    block_max: Any,  # (ceil(V / size),) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `scale * rows @ (step_high * high + step_low * low) + bias` and their summary; reads `rows` once."""
    classes, width = rows.shape
    extra_high = 128 * np.sum(high.astype(np.int64))
    extra_low = 128 * np.sum(low.astype(np.int64))
    tile = 4 * size
    per_worker = ((classes + tile - 1) // tile + workers - 1) // workers * tile
    for worker in prange(workers):
        high_at, low_at = _pointer_at(high, 0), _pointer_at(low, 0)  # pyright: ignore
        for first in range(worker * per_worker, min((worker + 1) * per_worker, classes), tile):
            last = min(first + tile, (worker + 1) * per_worker, classes)
            whole = first + (last - first) // ROWS_AT_ONCE * ROWS_AT_ONCE
            for i in range(first, whole, ROWS_AT_ONCE):
                # fmt: off
                sums: Any = _dot_four_rows(_pointer_at(rows, i * width), width, high_at, low_at)  # pyright: ignore
                # fmt: on
                for row in range(ROWS_AT_ONCE):
                    of_high = np.float32(sums[2 * row] - extra_high)
                    of_low = np.float32(sums[2 * row + 1] - extra_low)
                    scores[i + row] = scale[i + row] * (step_high * of_high + step_low * of_low) + bias[i + row]
            for i in range(whole, last):
                of_high, of_low = np.int32(0), np.int32(0)
                for j in range(width):
                    of_high = np.int32(of_high + np.int32(rows[i, j]) * np.int32(high[j]))
                    of_low = np.int32(of_low + np.int32(rows[i, j]) * np.int32(low[j]))
                scores[i] = scale[i] * (step_high * np.float32(of_high) + step_low * np.float32(of_low)) + bias[i]
            _summarise(scores, first, last, size, block_max, block_sum)


@njit(cache=True, parallel=True, fastmath=FAST)
def scan_float(
    rows: Any,  # (V, w) float32, or the bits of bfloat16 as int16
    hidden: Any,  # (w,) float32
    bias: Any,  # (V,) float32
    size: int,
    workers: int,
    scores: Any,  # (V,) float32, out
    block_max: Any,  # (ceil(V / size),) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `rows @ hidden + bias` and their summary; reads `rows` once."""
    classes, width = rows.shape
    tile = 4 * size
    per_worker = ((classes + tile - 1) // tile + workers - 1) // workers * tile
    for worker in prange(workers):
        for first in range(worker * per_worker, min((worker + 1) * per_worker, classes), tile):
            last = min(first + tile, (worker + 1) * per_worker, classes)
            for i in range(first, last):
                total = np.float32(0.0)
                for j in range(width):
                    total += load(rows[i, j]) * hidden[j]
                scores[i] = total + bias[i]
            _summarise(scores, first, last, size, block_max, block_sum)


@njit(cache=True, fastmath=FAST)
def rotate(
    hidden: Any,  # (d,) float32
    to_head: Any,  # (w, d) float64
    to_tail: Any,  # (d - w, d) float32
    head: Any,  # (w,) float32, out
) -> Any:
    """`to_head @ hidden` by float64 sums; returns the norms of `hidden`, of that, and of `to_tail @ hidden`."""
    norm, of_head, tail = 0.0, 0.0, 0.0
    exact = hidden.astype(np.float64)
    for j in range(exact.size):
        norm += exact[j] * exact[j]
    for i in range(head.size):
        total = 0.0
        for j in range(exact.size):
            total += to_head[i, j] * exact[j]
        head[i] = total
        of_head += total * total
    for i in range(len(to_tail)):
        of_tail = np.float32(0.0)
        for j in range(hidden.size):
            of_tail += to_tail[i, j] * hidden[j]
        tail += float(of_tail) * float(of_tail)
    return np.sqrt(norm), np.sqrt(of_head), np.sqrt(tail)


@njit(cache=True, parallel=True)
def summarise(scores: Any, size: int, block_max: Any, block_sum: Any) -> None:
    """The summary of scores made elsewhere, `(N, V)`."""
    for row in prange(len(scores)):
        _summarise(scores[row], 0, scores.shape[1], size, block_max[row], block_sum[row])


@njit(cache=True, fastmath=FAST)
def _count_above(values: Any, least: Any) -> Any:
    n = np.int32(0)
    for i in range(values.size):
        n += np.int32(values[i] >= least)
    return n


@njit(cache=True)
def _threshold(values: Any, count: int, spare: int, low: Any, high: Any) -> Any:
    """A number that from `count` to `count + spare` values reach (more, where they tie); near [low, high].

    By bisection: counting runs through vectors of numbers, where any sort or selection moves them one by one.
    """
    if count >= values.size:
        return MINUS_INFINITY
    if _count_above(values, high) >= count:
        return high
    while _count_above(values, low) < count:
        low -= max(high - low, abs(low) * np.float32(1e-3))
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
    """A number that at least `count` scores reach, from a sample where that serves: it costs one count of all."""
    wanted = count // SAMPLED + count // (4 * SAMPLED) + 4
    if 2 * wanted < scores.size // SAMPLED:
        least = _threshold(scores[::SAMPLED].copy(), wanted, wanted // 8, low, high)
        if count <= _count_above(scores, least) <= 2 * count:
            return least
    return _threshold(scores, count, count // 8, low, high)


@njit(cache=True)
def _choose(scores: Any, block_max: Any, size: int, count: int) -> Any:
    """The `count` best classes by partial selection: those that reach a threshold, then the best of these.

    For few of them the threshold is about the count-th largest block maximum, which at least `count` scores reach,
    all in few blocks.
    """
    few = 4 * count <= block_max.size
    low, high = block_max.min(), block_max.max()
    least = _threshold(block_max, count, 0, low, high) if few else _sampled_threshold(scores, count, low, high)
    found = np.empty(scores.size + 1, dtype=np.int64)
    n = 0
    for block in range(block_max.size):
        if block_max[block] >= least:
            for i in range(block * size, min((block + 1) * size, scores.size)):
                found[n] = i  # overwritten unless it counts: no branch to mispredict
                n += scores[i] >= least
    if n <= count:
        return found[:n]
    values = scores[found[:n]]
    least = _threshold(values, count, 0, least, high)
    chosen = np.empty(n + 1, dtype=np.int64)
    kept = 0
    for j in range(n):
        chosen[kept] = found[j]
        kept += values[j] > least
    for j in range(n):  # as many of those that tie as there is room for
        if values[j] == least and kept < count:
            chosen[kept] = found[j]
            kept += 1
    return chosen[:kept]


@njit(cache=True, fastmath=FAST)
def _rescore(weight: Any, bias: Any, hidden: Any, classes: Any, logits: Any, first: int, last: int) -> None:
    for n in range(first, last):
        row = weight[classes[n]]
        total = np.float32(0.0)
        for j in range(hidden.size):
            total += row[j] * hidden[j]
        logits[n] = total + bias[classes[n]]


@njit(cache=True, parallel=True)
def _rescore_apart(weight: Any, bias: Any, hidden: Any, classes: Any, logits: Any, workers: int) -> None:
    share = (classes.size + workers - 1) // workers
    for worker in prange(workers):
        _rescore(weight, bias, hidden, classes, logits, worker * share, min((worker + 1) * share, classes.size))


@njit(cache=True)
def _insert(logits: Any, classes: Any, values: Any, indices: Any, filled: int) -> Any:
    """Keeps the best of `logits` in `values`, sorted, of which `filled` are in use already."""
    k = values.size
    for n in range(logits.size):
        z = logits[n]
        if filled == k and not z > values[k - 1]:
            continue
        at = min(filled, k - 1)
        while at > 0 and values[at - 1] < z:
            values[at], indices[at] = values[at - 1], indices[at - 1]
            at -= 1
        values[at], indices[at] = z, classes[n]
        filled = min(filled + 1, k)
    return filled


@njit(cache=True)
def _set_aside(scores: Any, classes: Any, size: int, block_max: Any, block_sum: Any, keep_max: bool) -> None:
    """Takes rescored classes out of the scores and of their blocks' sums; of their maxima unless `keep_max`."""
    left = block_sum.copy()
    touched = np.zeros(block_max.size, dtype=np.uint8)
    for i in classes:
        block = i // size
        left[block] -= _exp(scores[i] - block_max[block])
        touched[block] = 1
        scores[i] = MINUS_INFINITY
    for block in range(block_max.size):
        if not touched[block]:
            continue
        first, last = block * size, min((block + 1) * size, scores.size)
        if left[block] < np.float32(0.05) * block_sum[block]:  # what cancelled leaves too few digits
            _summarise(scores, first, last, size, block_max, block_sum)
        elif keep_max:  # not the largest any more, but no smaller than it
            block_sum[block] = left[block]
        else:
            most = _max_of(scores, first, last)
            block_sum[block] = left[block] * np.exp(block_max[block] - most)
            block_max[block] = most


@njit(cache=True)
def _in_play(
    scores: Any,
    of_row: Any,
    of_classes: Any,
    of_blocks: Any,
    size: int,
    block_max: Any,
    kth: Any,
    only_whether: bool,
) -> Any:
    """The classes not set aside whose logit could reach `kth` (or one of them): blocks first, by their bounds."""
    found = np.empty(1 if only_whether else scores.size, dtype=np.int64)
    n = 0
    for block in range(block_max.size):
        upper = block_max[block]
        for m in range(of_row.size):
            upper += of_row[m] * of_blocks[m, block]
        if upper < kth:
            continue
        for i in range(block * size, min((block + 1) * size, scores.size)):
            upper = scores[i]
            for m in range(of_row.size):
                upper += of_row[m] * of_classes[m, i]
            if not upper < kth and scores[i] > MINUS_INFINITY:
                found[n] = i
                n += 1
                if only_whether:
                    return found
    return found[:n]


@njit(cache=True, fastmath=FAST)
def _log_sum_exp(block_max: Any, block_sum: Any, best: float, rescored_sum: float) -> Any:
    """Of all classes: the blocks' summaries and the rescored logits' exponentials relative to `best`."""
    most = best
    for block in range(block_max.size):
        most = max(most, block_max[block])
    total = rescored_sum * np.exp(float(best - most))
    for block in range(block_max.size):
        total += float(block_sum[block] * _exp(block_max[block] - most))
    return most + np.log(total)


@njit(cache=True, fastmath=FAST)
def _sum_exp(logits: Any, most: float) -> Any:
    total = np.float32(0.0)
    for n in range(logits.size):
        total += _exp(logits[n] - most)
    return float(total)


@njit(cache=True)
def _put(final: Any, classes: Any, logits: Any) -> None:
    if final.size:
        for n in range(classes.size):
            final[classes[n]] = logits[n]


@njit(cache=True)
def answer(
    scores: Any,  # (V,) float32; overwritten
    block_max: Any,  # (blocks,) float32; overwritten
    block_sum: Any,  # (blocks,) float32; overwritten
    size: int,
    of_row: Any,  # (m,) float32
    of_classes: Any,  # (m, V) float32
    of_blocks: Any,  # (m, blocks) float32: the largest of each block
    weight: Any,  # (V, d) float32
    bias: Any,  # (V,) float32
    hidden: Any,  # (d,) float32
    candidates: int,
    exact: bool,
    workers: int,  # for the rescoring of one row; 1 where rows are spread over workers already
    values: Any,  # (k,) float32, out: best raw logits
    indices: Any,  # (k,) int64, out
    final: Any,  # (V,) float32: the scores again, where exact logits are put; or (0,)
) -> Any:
    """Top-k of one row from its summarised scores: `(log-normaliser, UNCERTIFIED | CERTIFIED | DENSE)`."""
    chosen = _choose(scores, block_max, size, candidates)
    logits = np.empty(chosen.size, dtype=np.float32)
    if workers > 1 and logits.size * hidden.size > 1 << 17:
        _rescore_apart(weight, bias, hidden, chosen, logits, workers)
    else:
        _rescore(weight, bias, hidden, chosen, logits, 0, chosen.size)
    _put(final, chosen, logits)
    filled = _insert(logits, chosen, values, indices, 0)
    best = values[0]
    total = _sum_exp(logits, best)
    _set_aside(scores, chosen, size, block_max, block_sum, not exact)
    open_classes = _in_play(scores, of_row, of_classes, of_blocks, size, block_max, values[-1], not exact)
    certified = open_classes.size == 0
    if exact and not certified:
        if 4 * open_classes.size > scores.size:
            return 0.0, DENSE
        logits = np.empty(open_classes.size, dtype=np.float32)
        _rescore(weight, bias, hidden, open_classes, logits, 0, open_classes.size)
        _put(final, open_classes, logits)
        _insert(logits, open_classes, values, indices, filled)
        total = total * np.exp(float(best - values[0]))
        best = values[0]
        total += _sum_exp(logits, best)
        _set_aside(scores, open_classes, size, block_max, block_sum, True)
        certified = True
    return _log_sum_exp(block_max, block_sum, best, total), CERTIFIED if certified else UNCERTIFIED


@njit(cache=True, parallel=True)
def answer_rows(
    scores: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    of_rows: Any,
    of_classes: Any,
    of_blocks: Any,
    weight: Any,
    bias: Any,
    hidden: Any,
    candidates: int,
    exact: bool,
    values: Any,
    indices: Any,
    final: Any,
    log_normalizer: Any,  # (N,) float32, out
    status: Any,  # (N,) int64, out
) -> None:
    """`answer` of every row, shapes with a leading N, rows spread over workers."""
    for row in prange(len(scores)):
        log_normalizer[row], status[row] = answer(
            scores[row],
            block_max[row],
            block_sum[row],
            size,
            of_rows[row],
            of_classes,
            of_blocks,
            weight,
            bias,
            hidden[row],
            candidates,
            exact,
            1,
            values[row],
            indices[row],
            final[row],
        )


@njit(cache=True, parallel=True, fastmath=FAST)
def combine_int8(
    products: Any,  # (V, M) int32: columns of high parts, then of low parts
    scale: Any,  # (V,) float32
    bias: Any,  # (V,) float32
    step_high: Any,  # (N,) float32
    step_low: Any,  # (N,) float32
    size: int,
    workers: int,
    scores: Any,  # (N, V) float32, out
    block_max: Any,  # (N, blocks) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores and their summary from integer products, by tiles that stay in the cache."""
    classes, rows = len(products), len(scores)
    tile = 4 * size
    per_worker = ((classes + tile - 1) // tile + workers - 1) // workers * tile
    for worker in prange(workers):
        for first in range(worker * per_worker, min((worker + 1) * per_worker, classes), tile):
            last = min(first + tile, (worker + 1) * per_worker, classes)
            for start in range(first, last, STRIP):
                for n in range(rows):
                    for i in range(start, min(start + STRIP, last)):
                        of_high, of_low = np.float32(products[i, n]), np.float32(products[i, rows + n])
                        scores[n, i] = scale[i] * (step_high[n] * of_high + step_low[n] * of_low) + bias[i]
            for n in range(rows):
                _summarise(scores[n], first, last, size, block_max[n], block_sum[n])


@njit(cache=True, parallel=True)
def answer_dense(
    logits: Any,  # (N, V) float32
    block_max: Any,  # (N, blocks) float32
    block_sum: Any,  # (N, blocks) float32
    size: int,
    values: Any,  # (N, k) float32, out
    indices: Any,  # (N, k) int64, out
    log_normalizer: Any,  # (N,) float32, out
) -> None:
    """Top-k and normaliser of summarised logits that are exact already."""
    for row in prange(len(logits)):
        chosen = _choose(logits[row], block_max[row], size, values.shape[1])
        _insert(logits[row][chosen], chosen, values[row], indices[row], 0)
        log_normalizer[row] = _log_sum_exp(block_max[row], block_sum[row], values[row, 0], 0.0)
