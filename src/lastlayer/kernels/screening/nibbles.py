"""A pass over rows in 4 bits, by AVX512-VNNI: sixteen classes beside each other, eight numbers of each at once."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.apart import apart
from lastlayer.kernels.cache_hints import prefetch
from lastlayer.kernels.screening.blocks import summarise_part
from lastlayer.kernels.screening.dots import PREFETCH, pointer_at
from lastlayer.kernels.screening.lanes import FLOATS, FREE
from lastlayer.kernels.screening.scan import TILE, share_of, split_in_two

BESIDE = 16  # classes in one vector, each with CHUNK numbers
CHUNK = 8  # numbers of a class in its four bytes: the first four in the low halves, the others in the high ones
GROUPS = 2  # vectors of classes at once, for one hidden state: their sums wait less for each other
QUERIES = 4  # hidden states at once, for one vector of classes
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I32, BESIDE)


def _scores(groups: int, queries: int) -> Any:
    """The intrinsic for so many vectors of classes and hidden states."""

    @intrinsic
    def scores(
        typingctx: Any,
        codes: Any,
        chunks: Any,
        parts: Any,
        steps: Any,
        middles: Any,
        scale: Any,
        bias: Any,
        first: Any,
        out: Any,
        row: Any,
    ) -> Any:
        """`out[row + query, first + ...] = scale * (codes . parts) + bias` for BESIDE classes a group.

        `parts (queries, 2, w)` are int8, in two `steps (queries, 2)`; `middles (queries, 2)` is what codes from 0
        to 15 add to twice the sums. The high half of a byte is multiplied where it stands, at 16 times its worth;
        the sum of such products is divided at the end. Four numbers of a hidden state serve all classes.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, chunks, parts, *_, first, _, row = args
            module = builder.module
            kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            dot = module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), kind)

            def constant(value: int) -> Any:
                return ir.Constant(_VECTOR, [value] * BESIDE)

            def load(base: Any, offset: Any, kind: Any) -> Any:
                value = builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()))
                value.align = 1
                return value

            def repeated(number: Any, kind: Any) -> Any:
                one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
                return builder.shuffle_vector(one, one, constant(0))

            group_bytes, width = (builder.mul(chunks, _I64(size)) for size in (4 * BESIDE, CHUNK))
            before = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            chunk = builder.phi(_I64)
            old = [builder.phi(_VECTOR) for _ in range(4 * groups * queries)]
            new = []
            for group in range(groups):
                place = builder.add(builder.mul(chunk, _I64(4 * BESIDE)), builder.mul(group_bytes, _I64(group)))
                prefetch(builder, builder.gep(codes, [builder.add(place, _I64(PREFETCH))]))
                both = load(codes, place, _VECTOR)
                halves = builder.and_(both, constant(0x0F0F0F0F)), builder.and_(both, constant(-0x0F0F0F10))
                for part in range(2 * queries):
                    at = builder.add(builder.mul(chunk, _I64(CHUNK)), builder.mul(width, _I64(part)))
                    for number, half in enumerate(halves):
                        numbers = load(parts, builder.add(at, _I64(4 * number)), _I32)
                        new.append(builder.call(dot, [old[len(new)], half, repeated(numbers, _VECTOR)]))
            following = builder.add(chunk, _I64(1))
            chunk.add_incoming(_I64(0), before)
            chunk.add_incoming(following, loop)
            for phi, value in zip(old, new, strict=True):
                phi.add_incoming(constant(0), before)
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, chunks), loop, done)
            builder.position_at_end(done)

            arrays = [context.make_array(signature.args[n])(context, builder, args[n]) for n in (3, 4, 5, 6, 8)]
            steps, middles, scale, bias, room = (array.data for array in arrays)
            classes = cgutils.unpack_tuple(builder, arrays[-1].shape)[1]
            for group in range(groups):
                own = builder.add(first, _I64(group * BESIDE))
                of_scale, of_bias = load(scale, own, FLOATS), load(bias, own, FLOATS)
                for query in range(queries):
                    total = None
                    for part in range(2):
                        n = 2 * (2 * (group * queries + query) + part)
                        whole = builder.add(new[n], builder.ashr(new[n + 1], constant(4)))
                        at = [_I64(2 * query + part)]
                        step, middle = (builder.load(builder.gep(array, at)) for array in (steps, middles))
                        twice = builder.sub(builder.shl(whole, constant(1)), repeated(middle, _VECTOR))
                        number = builder.sitofp(twice, FLOATS)
                        product = builder.fmul(number, repeated(step, FLOATS), flags=FREE)
                        total = product if total is None else builder.fadd(total, product, flags=FREE)
                    score = builder.fadd(builder.fmul(total, of_scale, flags=FREE), of_bias, flags=FREE)
                    place = builder.add(builder.mul(builder.add(row, _I64(query)), classes), own)
                    into = builder.bitcast(builder.gep(room, [place]), FLOATS.as_pointer())
                    builder.store(score, into).align = 4
            return context.get_dummy_value()

        pointer = types.CPointer(types.int8)
        given = pointer, types.int64, pointer, steps, middles, scale, bias, types.int64, out, types.int64
        return types.none(*given), generate

    return scores


_one_query = _scores(GROUPS, 1)
_some_queries = _scores(1, QUERIES)


@njit(cache=True)
def _scan_int4_part(
    worker: int,
    workers: int,
    codes: Any,
    scale: Any,
    bias: Any,
    parts: Any,
    steps: Any,
    middles: Any,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    rows, classes = scores.shape
    first, last = share_of(worker, workers, classes, size)
    width = parts.shape[2]
    chunks, together = width // CHUNK, rows // QUERIES * QUERIES
    for start in range(first, last, TILE * size):
        end = min(start + TILE * size, last)
        whole = start + (end - start) // (GROUPS * BESIDE) * (GROUPS * BESIDE)
        for row in range(0, together, QUERIES):
            own = pointer_at(parts, row * 2 * width), steps[row:], middles[row:], scale, bias  # pyright: ignore
            for i in range(start, whole, BESIDE):
                _some_queries(pointer_at(codes, i * width // 2), chunks, *own, i, scores, row)  # pyright: ignore
        for row in range(together, rows):
            own = pointer_at(parts, row * 2 * width), steps[row:], middles[row:], scale, bias  # pyright: ignore
            for i in range(start, whole, GROUPS * BESIDE):
                _one_query(pointer_at(codes, i * width // 2), chunks, *own, i, scores, row)  # pyright: ignore
        if whole < end:
            _scan_last(codes, scale, bias, parts, steps, middles, whole, scores)
        for row in range(rows):
            summarise_part(scores[row], start, end, size, block_max[row], block_sum[row])


@njit(cache=True)
def _scan_last(
    codes: Any, scale: Any, bias: Any, parts: Any, steps: Any, middles: Any, first: int, scores: Any
) -> None:
    """Scores of the classes from `first` on, too few for a whole step: in room that is long enough."""
    left, width = len(scale) - first, parts.shape[2]
    of_scale, of_bias = np.zeros(GROUPS * BESIDE, dtype=np.float32), np.zeros(GROUPS * BESIDE, dtype=np.float32)
    of_scale[:left], of_bias[:left] = scale[first:], bias[first:]
    room = np.empty((1, GROUPS * BESIDE), dtype=np.float32)
    for row in range(len(scores)):
        own = pointer_at(parts, row * 2 * width), steps[row:], middles[row:], of_scale, of_bias  # pyright: ignore
        at = pointer_at(codes, first * width // 2)  # pyright: ignore
        _one_query(at, width // CHUNK, *own, 0, room, 0)  # pyright: ignore
        scores[row, first:] = room[0, :left]


@njit(cache=True)
def scan_int4(
    vectors: Any,  # (N, w) float32: hidden states as the codes are multiplied
    codes: Any,  # int8, (groups, chunks, BESIDE, 4); groups a multiple of GROUPS
    scale: Any,  # (V,) float32, of half a step
    bias: Any,  # (V,) float32
    parts: Any,  # (N, 2, CHUNK * chunks) int8, scratch that ends in zeros
    size: int,
    workers: int,
    left_over: Any,  # (N,), out: norm of what the two int8 parts of a vector do not hold
    scores: Any,  # (N, V) float32, out
    block_max: Any,  # (N, ceil(V / size)) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `scale * vectors' @ (2 codes - 15) + bias`, vectors in two int8 parts, and their summary.

    Reads `codes` once: for many hidden states, a few classes stay in the cache.
    """
    steps, middles = np.empty((len(vectors), 2), dtype=np.float32), np.empty((len(vectors), 2), dtype=np.int32)
    for row in range(len(vectors)):
        steps[row, 0], steps[row, 1], left_over[row] = split_in_two(vectors[row], parts[row, 0], parts[row, 1])
        for part in range(2):
            middles[row, part] = 15 * np.sum(parts[row, part].astype(np.int64))
    given = workers, codes, scale, bias, parts, steps, middles, size, scores, block_max, block_sum
    if workers == 1:
        _scan_int4_part(0, *given)
    else:
        apart(_scan_int4_part, workers, given)  # pyright: ignore[reportCallIssue]
