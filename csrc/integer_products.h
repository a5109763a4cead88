// Products of quantised rows with quantised hidden states, exact in 32-bit integers.
//
// A hidden state is `step * n` with whole n, |n| <= 8128: 14 bits. Processors multiply 16-bit integers by pairs, or 8-bit
// ones by fours: there n is kept in two bytes, n = 128 high + low. `pack_*` arranges n as the primitives below read it,
// two bytes a coordinate either way.
//
// Rows of 8 bits lie one after another: `Sums` then holds partial sums of one row. Rows of 4 bits are interleaved,
// GROUP classes with four bytes each: `CodeSums` then holds the sums of as many classes as it has lanes. No lane
// overflows up to MOST_WIDTH coordinates (see `screening/backend.py`).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cache_hints.h"

namespace lastlayer {

constexpr int64_t GROUP = 16;       // classes whose 4-bit rows are interleaved
constexpr int64_t CHUNK = 8;        // coordinates in the four bytes of a class
constexpr int64_t CHUNK_BYTES = 64; // of a group

// Coordinates of a chunk in the order in which a class's four bytes hold them: in their low nibbles, in their high ones.
constexpr int NIBBLE_ORDER[CHUNK] = {0, 4, 1, 5, 2, 6, 3, 7};

inline int8_t high_byte(int16_t n) { return static_cast<int8_t>((n + 64) >> 7); }
inline int8_t low_byte(int16_t n) { return static_cast<int8_t>(n - 128 * high_byte(n)); }

// Of each chunk the high bytes in the order of the nibbles, then the low bytes.
inline void pack_bytes_of_chunks(const int16_t* n, int64_t width, int16_t* packed) {
    int8_t* bytes = reinterpret_cast<int8_t*>(packed);
    for (int64_t j = 0; j < width; j += CHUNK)
        for (int place = 0; place < CHUNK; ++place) {
            const int16_t number = n[j + NIBBLE_ORDER[place]];
            bytes[2 * j + place] = high_byte(number);
            bytes[2 * j + CHUNK + place] = low_byte(number);
        }
}

}  // namespace lastlayer

#if defined(__AVX2__)
#include "integer_products_x86.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "integer_products_arm.h"
#else
#include "integer_products_portable.h"
#endif

namespace lastlayer {

// totals[stride * h + r] of four rows and several hidden states.
#if !defined(__ARM_FEATURE_MATMUL_INT8)  // integer_products_arm.h has its own
template <int HIDDEN>
void multiply_rows(
    const int8_t* rows, int64_t width, const int16_t* const (&hidden)[HIDDEN], float* totals, int64_t stride) {
    Sums sums[HIDDEN][4];
    for (auto& own : sums)
        for (Sums& one : own) one = no_sums();
    for (int64_t j = 0; j < width; j += PIECE) {
        decltype(load_hidden(hidden[0])) numbers[HIDDEN];
        for (int h = 0; h < HIDDEN; ++h) numbers[h] = load_hidden(hidden[h] + j);
        for (int r = 0; r < 4; ++r) {  // one row at a time: the sums alone take half of the registers
            const auto row = load_row(rows + r * width + j);
            if (j % LINE_BYTES == 0) prefetch(rows + r * width + j + PREFETCH_BYTES, 1);
            for (int h = 0; h < HIDDEN; ++h) sums[h][r] = multiply_add(sums[h][r], row, numbers[h]);
        }
    }
    for (int h = 0; h < HIDDEN; ++h) totals_of_four(sums[h], totals + stride * h);
}
#endif

// sums[h][i] of GROUPS groups of classes and several hidden states.
template <int GROUPS, int HIDDEN>
void multiply_codes(
    const uint8_t* codes, int64_t chunks, const int16_t* const (&hidden)[HIDDEN], int32_t (&sums)[HIDDEN][GROUPS * GROUP]) {
    constexpr int VECTORS = GROUP / LANES;
    CodeSums own[GROUPS * VECTORS][HIDDEN] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int16_t* at[HIDDEN];
        for (int h = 0; h < HIDDEN; ++h) at[h] = hidden[h] + CHUNK * chunk;
        for (int group = 0; group < GROUPS; ++group)
            for (int vector = 0; vector < VECTORS; ++vector) {
                const uint8_t* place = codes + (group * chunks + chunk) * CHUNK_BYTES + vector * 4 * LANES;
                if (vector == 0) prefetch(place + GROUPS * chunks * CHUNK_BYTES, 1);  // of the next GROUPS groups
                add_chunk<HIDDEN>(load_codes(place), at, own[group * VECTORS + vector]);
            }
    }
    for (int h = 0; h < HIDDEN; ++h)
        for (int vector = 0; vector < GROUPS * VECTORS; ++vector)
            store_sums(own[vector][h], &sums[h][vector * LANES]);
}

}  // namespace lastlayer
