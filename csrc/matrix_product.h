// Products of matrices, small ones on the calling thread alone: `C = alpha A B + beta C`, any strides of A and B.
//
// A shared product waits for the last of its threads, on a busy machine for milliseconds, so small ones are not shared.
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
constexpr int64_t SHARED_WORK = int64_t{1} << 27;  // multiply-adds from which a product is shared: some milliseconds
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

// `count` lines of `depth` numbers, of which number k of line i is from[i * line + k * step], as panels of `width`
// lines, number k of all of them together; lines that are missing in the last panel are zeros.
template <class Real>
void pack(Real* to, const Real* from, int64_t count, int64_t depth, int64_t line, int64_t step, int64_t width, Real factor) {
    for (int64_t begin = 0; begin < count; begin += width, to += width * depth) {
        const int64_t lines = std::min(width, count - begin);
        const Real* first = from + begin * line;
        if (lines < width) std::memset(to, 0, sizeof(Real) * width * depth);
        if (line == 1) {
            for (int64_t k = 0; k < depth; ++k) {
                for (int64_t i = 0; i < lines; ++i) to[k * width + i] = factor * first[k * step + i];
            }
        } else {
            for (int64_t i = 0; i < lines; ++i) {
                const Real* source = first + i * line;
                for (int64_t k = 0; k < depth; ++k) to[k * width + i] = factor * source[k * step];
            }
        }
    }
}

// The product of a panel of A with one of B, added to `rows` times `columns` numbers of C.
template <class Real>
void multiply_tile(const Real* a, const Real* b, int64_t depth, Real* c, int64_t stride, int64_t rows, int64_t columns) {
    using Vector = typename Tiled<Real>::Vector;
    constexpr int64_t LANES = Tiled<Real>::LANES, COLUMNS = Tiled<Real>::COLUMNS;
    Vector sums[TILE_ROWS][TILE_VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k, a += TILE_ROWS, b += COLUMNS) {
        const Vector left = *reinterpret_cast<const Vector*>(b), right = *reinterpret_cast<const Vector*>(b + LANES);
#pragma GCC unroll 16
        for (int64_t i = 0; i < TILE_ROWS; ++i) {
            sums[i][0] += a[i] * left;
            sums[i][1] += a[i] * right;
        }
    }
    Real block[TILE_ROWS][COLUMNS];
    std::memcpy(block, sums, sizeof(block));
    if (columns == COLUMNS) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < COLUMNS; ++j) c[i * stride + j] += block[i][j];
        }
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) c[i * stride + j] += block[i][j];
        }
    }
}

// C (rows, columns) = alpha A B + beta C, where A is (rows, depth), B (depth, columns), and C's rows are `stride` apart.
template <class Real>
void multiply_alone(int64_t rows, int64_t columns, int64_t depth, Real alpha, Matrix<Real> a, Matrix<Real> b, Real beta,
                    Real* c, int64_t stride) {
    constexpr int64_t COLUMNS = Tiled<Real>::COLUMNS;
    for (int64_t i = 0; i < rows && beta != 1; ++i) {
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
            pack<Real>(packed_b, b.data + k * b.row + j * b.column, across, deep, b.column, b.row, COLUMNS, 1);
            for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
                const int64_t down = std::min(BLOCK_ROWS, rows - i);
                pack<Real>(packed_a, a.data + i * a.row + k * a.column, down, deep, a.row, a.column, TILE_ROWS, alpha);
                for (int64_t q = 0; q < across; q += COLUMNS) {
                    for (int64_t p = 0; p < down; p += TILE_ROWS) {
                        multiply_tile<Real>(packed_a + p * deep, packed_b + q * deep, deep, c + (i + p) * stride + j + q,
                                            stride, std::min(TILE_ROWS, down - p), std::min(COLUMNS, across - q));
                    }
                }
            }
        }
    }
}

// The same; the columns of a large C are shared among threads.
template <class Real>
void multiply(int64_t rows, int64_t columns, int64_t depth, Real alpha, Matrix<Real> a, Matrix<Real> b, Real beta, Real* c,
              int64_t stride) {
    constexpr int64_t COLUMNS = Tiled<Real>::COLUMNS;
    const int64_t tiles = (columns + COLUMNS - 1) / COLUMNS, parts = 2 * num_threads();
    const bool shared = rows * columns * depth >= SHARED_WORK;
    parallel_for(columns, COLUMNS * (shared ? (tiles + parts - 1) / parts : tiles), [&](int64_t begin, int64_t end) {
        multiply_alone<Real>(rows, end - begin, depth, alpha, a, {b.data + begin * b.column, b.row, b.column}, beta,
                             c + begin, stride);
    });
}

}  // namespace lastlayer
