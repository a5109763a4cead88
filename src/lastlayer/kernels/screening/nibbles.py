"""A pass over rows in 4 bits, by AVX512-VNNI: sixteen classes beside each other, eight numbers of each at once."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lastlayer.kernels.cache_hints import prefetch
from lastlayer.kernels.screening.blocks import FAST, summarise_part
from lastlayer.kernels.screening.dots import PREFETCH, pointer_at
from lastlayer.kernels.screening.scan import TILE, share_of, split_in_two
from lastlayer.kernels.screening.threads import apart

BESIDE = 16  # classes in one vector, each with CHUNK numbers
CHUNK = 8  # numbers of a class in its four bytes: the first four in the low halves, the others in the high ones
GROUPS = 2  # vectors of classes at once, for one hidden state: their sums wait less for each other
QUERIES = 4  # hidden states at once, for one vector of classes
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I32, BESIDE)


def _dots(groups: int, queries: int) -> Any:
    """The intrinsic for so many vectors of classes and hidden states."""

    @intrinsic
    def dots(typingctx: Any, codes: Any, chunks: Any, parts: Any, sums: Any) -> Any:
        """`sums (groups, queries, 2, BESIDE)`, int32, of products of codes with `parts (queries, 2, w)`, int8.

        The high half of a byte is multiplied where it stands, at 16 times its worth; the sum of such products is
        divided at the end. Four numbers of a hidden state are the same for all classes of a vector.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, chunks, parts, sums = args
            module = builder.module
            kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            dot = module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), kind)

            def constant(value: int) -> Any:
                return ir.Constant(_VECTOR, [value] * BESIDE)

            def load(base: Any, offset: Any, kind: Any) -> Any:
                value = builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()))
                value.align = 1
                return value

            def repeated(offset: Any) -> Any:
                number = load(parts, offset, _I32)
                one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
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
                        numbers = repeated(builder.add(at, _I64(4 * number)))
                        new.append(builder.call(dot, [old[len(new)], half, numbers]))
            following = builder.add(chunk, _I64(1))
            chunk.add_incoming(_I64(0), before)
            chunk.add_incoming(following, loop)
            for phi, value in zip(old, new, strict=True):
                phi.add_incoming(constant(0), before)
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, chunks), loop, done)
            builder.position_at_end(done)
            room = context.make_array(signature.args[3])(context, builder, sums).data
            out = builder.bitcast(room, _VECTOR.as_pointer())
            for n in range(len(new) // 2):
                whole = builder.add(new[2 * n], builder.ashr(new[2 * n + 1], constant(4)))
                builder.store(whole, builder.gep(out, [_I64(n)])).align = 4
            return context.get_dummy_value()

        pointer = types.CPointer(types.int8)
        return types.none(pointer, types.int64, pointer, sums), generate

    return dots


_one_query = _dots(GROUPS, 1)
_some_queries = _dots(1, QUERIES)


@njit(cache=True, fastmath=FAST)
def _put(sums: Any, steps: Any, middles: Any, scale: Any, bias: Any, scores: Any) -> None:
    """Scores of up to BESIDE classes from their sums `(2, BESIDE)`."""
    of_high, of_low = sums[0], sums[1]
    for n in range(scores.size):
        both = steps[0] * np.float32(np.int32(2 * of_high[n] - middles[0]))
        both += steps[1] * np.float32(np.int32(2 * of_low[n] - middles[1]))
        scores[n] = scale[n] * both + bias[n]


@njit(cache=True)
def _scan_int4_part(
    worker: int,
    workers: int,
    codes: Any,
    scale: Any,
    bias: Any,
    parts: Any,
    steps: Any,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    rows, classes = scores.shape
    first, last = share_of(worker, workers, classes, size)
    width = parts.shape[2]
    chunks, together = width // CHUNK, rows // QUERIES * QUERIES
    middles = np.empty((rows, 2), dtype=np.int32)
    for row in range(rows):
        for part in range(2):
            middles[row, part] = 15 * np.sum(parts[row, part].astype(np.int64))
    of_one = np.empty((GROUPS, 2, BESIDE), dtype=np.int32)
    of_some = np.empty((QUERIES, 2, BESIDE), dtype=np.int32)
    for start in range(first, last, TILE * size):
        end = min(start + TILE * size, last)
        for row in range(0, together, QUERIES):
            own = pointer_at(parts, row * 2 * width)  # pyright: ignore
            for i in range(start, end, BESIDE):
                stop = min(i + BESIDE, end)
                _some_queries(pointer_at(codes, i * width // 2), chunks, own, of_some)  # pyright: ignore
                for n in range(row, row + QUERIES):
                    _put(of_some[n - row], steps[n], middles[n], scale[i:stop], bias[i:stop], scores[n, i:stop])
        for row in range(together, rows):
            own = pointer_at(parts, row * 2 * width)  # pyright: ignore
            for i in range(start, end, GROUPS * BESIDE):
                _one_query(pointer_at(codes, i * width // 2), chunks, own, of_one)  # pyright: ignore
                for group in range(GROUPS):
                    begin = min(i + group * BESIDE, end)
                    stop = min(begin + BESIDE, end)
                    of_scale, of_bias = scale[begin:stop], bias[begin:stop]
                    _put(of_one[group], steps[row], middles[row], of_scale, of_bias, scores[row, begin:stop])
        for row in range(rows):
            summarise_part(scores[row], start, end, size, block_max[row], block_sum[row])


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
    steps = np.empty((len(vectors), 2), dtype=np.float32)
    for row in range(len(vectors)):
        steps[row, 0], steps[row, 1], left_over[row] = split_in_two(vectors[row], parts[row, 0], parts[row, 1])
    given = workers, codes, scale, bias, parts, steps, size, scores, block_max, block_sum
    if workers == 1:
        _scan_int4_part(0, *given)
    else:
        apart(_scan_int4_part, workers, given)  # pyright: ignore[reportCallIssue]
