// Products of matrices: `C = alpha A B + beta C`, any strides of A and B.
//
// A shared product waits for the last of its threads, so small ones stay on the calling thread; and so do all for a while
// after a thread came too late, as on a busy machine (parallel.h).
//
// As every fast matrix product: both factors are packed into panels as wide as a tile of C, which is summed up in
// registers. `Vector` is what a register holds; the compiler makes its instructions from the operators.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "engine.h"
#include "parallel.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LASTLAYER_SHUFFLES
#endif
#endif

namespace lastlayer {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64, TILE_ROWS = 8;  // 16 sums, in 32 registers
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32, TILE_ROWS = 6;  // 12 sums, in 16 registers
#elif defined(__aarch64__)
constexpr int64_t VECTOR_BYTES = 16, TILE_ROWS = 12;
#else
constexpr int64_t VECTOR_BYTES = 16, TILE_ROWS = 6;
#endif

constexpr int64_t TILE_VECTORS = 2;      // in a row of a tile
constexpr int64_t PANEL_BYTES = 24576;   // of a panel of B, which stays in the first-level cache
constexpr int64_t BLOCK_ROWS = 192, BLOCK_COLUMNS = 1536;  // of A and B that are packed at once
constexpr int64_t ALIGNMENT = 64;
constexpr int64_t SHARED_WORK = int64_t{1} << 22;  // multiply-adds from which a product is shared: a tenth of a millisecond
static_assert(BLOCK_ROWS % TILE_ROWS == 0);

template <class Real>
struct Tiled {
    typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int64_t LANES = VECTOR_BYTES / sizeof(Real), COLUMNS = TILE_VECTORS * LANES;
};

// A matrix anywhere in memory: the number at (i, j) is data[i * row + j * column].
template <class Real>
struct Matrix {
    const Real* data;
    int64_t row, column;

    Matrix transposed() const { return {data, column, row}; }
};

template <class Real>
Matrix<Real> rows_of(const Real* data, int64_t width) {
    return {data, width, 1};
}

// Aligned memory for the length of a call.
template <class Real>
class Scratch {
   public:
    explicit Scratch(int64_t count)
        : memory(static_cast<Real*>(::operator new(sizeof(Real) * std::max<int64_t>(count, 1), std::align_val_t{ALIGNMENT}))) {}
    ~Scratch() { ::operator delete(memory, std::align_val_t{ALIGNMENT}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator Real*() const { return memory; }
    Real* memory;
};

// Four lines of four numbers each, transposed: number k of line i is from[i * line + k], and goes to to[k * WIDTH + i].
template <class Real, int64_t WIDTH>
inline void transpose_4x4(Real* to, const Real* from, int64_t line, Real factor) {
#if defined(LASTLAYER_SHUFFLES)
    typedef Real Four __attribute__((vector_size(4 * sizeof(Real))));
    Four rows[4], columns[4];
    for (int64_t i = 0; i < 4; ++i) std::memcpy(&rows[i], from + i * line, sizeof(Four));
    const Four low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
    const Four high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
    const Four other_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    const Four other_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    columns[0] = __builtin_shufflevector(low, other_low, 0, 1, 4, 5);
    columns[1] = __builtin_shufflevector(low, other_low, 2, 3, 6, 7);
    columns[2] = __builtin_shufflevector(high, other_high, 0, 1, 4, 5);
    columns[3] = __builtin_shufflevector(high, other_high, 2, 3, 6, 7);
    for (int64_t k = 0; k < 4; ++k) {
        columns[k] *= factor;
        std::memcpy(to + k * WIDTH, &columns[k], sizeof(Four));
    }
#else
    for (int64_t k = 0; k < 4; ++k) {
        for (int64_t i = 0; i < 4; ++i) to[k * WIDTH + i] = factor * from[i * line + k];
    }
#endif
}

// `lines` (at most `WIDTH`) lines of `depth` numbers, number k of all of them together: to[k * WIDTH + i].
template <class Real, int64_t WIDTH>
void pack_panel(Real* to, const Real* from, int64_t lines, int64_t depth, int64_t line, int64_t step, Real factor) {
    if (line == 1) {
        const auto copy = [&](int64_t count) {
            for (int64_t k = 0; k < depth; ++k) {
                for (int64_t i = 0; i < count; ++i) to[k * WIDTH + i] = factor * from[k * step + i];
            }
        };
        lines == WIDTH ? copy(WIDTH) : copy(lines);  // of a number known to the compiler: whole vectors
        return;
    }
    const bool contiguous = step == 1;
    const int64_t whole_lines = contiguous ? lines / 4 * 4 : 0, whole_depth = contiguous ? depth / 4 * 4 : 0;
    for (int64_t i = 0; i < whole_lines; i += 4) {
        for (int64_t k = 0; k < whole_depth; k += 4) {
            transpose_4x4<Real, WIDTH>(to + k * WIDTH + i, from + i * line + k, line, factor);
        }
    }
    for (int64_t i = 0; i < lines; ++i) {
        for (int64_t k = i < whole_lines ? whole_depth : 0; k < depth; ++k) {
            to[k * WIDTH + i] = factor * from[i * line + k * step];
        }
    }
}

// `count` lines of `depth` numbers, of which number k of line i is from[i * line + k * step], as panels of `WIDTH`
// lines; lines that are missing in the last panel are zeros.
template <class Real, int64_t WIDTH>
void pack(Real* to, const Real* from, int64_t count, int64_t depth, int64_t line, int64_t step, Real factor) {
    for (int64_t begin = 0; begin < count; begin += WIDTH, to += WIDTH * depth) {
        const int64_t lines = std::min(WIDTH, count - begin);
        if (lines < WIDTH) std::memset(to, 0, sizeof(Real) * WIDTH * depth);
        pack_panel<Real, WIDTH>(to, from + begin * line, lines, depth, line, step, factor);
    }
}

// The product of a panel of A with the first `VECTORS` vectors of one of B, and `rows` times `columns` numbers of C.
template <class Real, int64_t VECTORS>
void multiply_tile(const Real* a, const Real* b, int64_t depth, Real beta, Real* c, int64_t stride, int64_t rows,
                   int64_t columns) {
    using Vector = typename Tiled<Real>::Vector;
    constexpr int64_t LANES = Tiled<Real>::LANES, COLUMNS = VECTORS * LANES;
    Vector sums[TILE_ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k, a += TILE_ROWS, b += Tiled<Real>::COLUMNS) {
        Vector right[VECTORS];
#pragma GCC unroll 2
        for (int64_t j = 0; j < VECTORS; ++j) right[j] = *reinterpret_cast<const Vector*>(b + j * LANES);
#pragma GCC unroll 16
        for (int64_t i = 0; i < TILE_ROWS; ++i) {
#pragma GCC unroll 2
            for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] += a[i] * right[j];
        }
    }
    Real block[TILE_ROWS][COLUMNS];
    std::memcpy(block, sums, sizeof(block));
    const bool whole = columns == COLUMNS;
    for (int64_t i = 0; i < rows; ++i) {
        Real* row = c + i * stride;
        if (beta == 0) {  // whatever was there, NaN as well
            for (int64_t j = 0; j < (whole ? COLUMNS : columns); ++j) row[j] = block[i][j];
        } else {
            for (int64_t j = 0; j < (whole ? COLUMNS : columns); ++j) row[j] = beta * row[j] + block[i][j];
        }
    }
}

// C (rows, columns) = alpha A B + beta C, where A is (rows, depth), B (depth, columns), and C's rows are `stride` apart.
template <class Real>
void multiply_alone(int64_t rows, int64_t columns, int64_t depth, Real alpha, Matrix<Real> a, Matrix<Real> b, Real beta,
                    Real* c, int64_t stride) {
    constexpr int64_t COLUMNS = Tiled<Real>::COLUMNS;
    for (int64_t i = 0; i < rows && depth == 0; ++i) {
        for (int64_t j = 0; j < columns; ++j) c[i * stride + j] = beta == 0 ? Real{0} : beta * c[i * stride + j];
    }
    const int64_t most = PANEL_BYTES / static_cast<int64_t>(sizeof(Real)) / COLUMNS;
    const int64_t parts = (depth + most - 1) / most, part = parts ? (depth + parts - 1) / parts : 0;
    const int64_t wide = std::min((columns + COLUMNS - 1) / COLUMNS * COLUMNS, BLOCK_COLUMNS);
    const Scratch<Real> packed_a(BLOCK_ROWS * part), packed_b(wide * part);
    for (int64_t k = 0; k < depth; k += part) {
        const int64_t deep = std::min(part, depth - k);
        for (int64_t j = 0; j < columns; j += wide) {
            const int64_t across = std::min(wide, columns - j);
            pack<Real, COLUMNS>(packed_b, b.data + k * b.row + j * b.column, across, deep, b.column, b.row, 1);
            for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
                const int64_t down = std::min(BLOCK_ROWS, rows - i);
                pack<Real, TILE_ROWS>(packed_a, a.data + i * a.row + k * a.column, down, deep, a.row, a.column, alpha);
                for (int64_t q = 0; q < across; q += COLUMNS) {
                    const int64_t last = std::min(COLUMNS, across - q);
                    const auto tile = last <= Tiled<Real>::LANES ? multiply_tile<Real, 1> : multiply_tile<Real, TILE_VECTORS>;
                    for (int64_t p = 0; p < down; p += TILE_ROWS) {
                        tile(packed_a + p * deep, packed_b + q * deep, deep, k == 0 ? beta : Real{1},
                             c + (i + p) * stride + j + q, stride, std::min(TILE_ROWS, down - p), last);
                    }
                }
            }
        }
    }
}

// The same; a large C is shared among threads, by its longer side, so that what every thread packs is the shorter factor.
template <class Real>
void multiply(int64_t rows, int64_t columns, int64_t depth, Real alpha, Matrix<Real> a, Matrix<Real> b, Real beta, Real* c,
              int64_t stride) {
    const bool by_rows = rows > columns;
    const int64_t length = by_rows ? rows : columns, tile = by_rows ? TILE_ROWS : Tiled<Real>::COLUMNS;
    const int64_t tiles = (length + tile - 1) / tile, threads = num_threads();
    const bool shared = rows * columns * depth >= SHARED_WORK;
    parallel_for(length, tile * (shared ? (tiles + threads - 1) / threads : tiles), [&](int64_t begin, int64_t end) {
        if (by_rows) {
            multiply_alone<Real>(end - begin, columns, depth, alpha, {a.data + begin * a.row, a.row, a.column}, b, beta,
                                 c + begin * stride, stride);
        } else {
            multiply_alone<Real>(rows, end - begin, depth, alpha, a, {b.data + begin * b.column, b.row, b.column}, beta,
                                 c + begin, stride);
        }
    });
}

}  // namespace lastlayer
