// Products of quantised rows with quantised hidden states, exact in 32-bit integers.
//
// A hidden state is `step * n` with whole n, |n| <= 8128: 14 bits. x86 multiplies 16-bit integers by pairs
// (vpmaddwd; vpdpwssd where there is VNNI). Arm multiplies 8-bit ones by fours (sdot), so there n is kept in two
// bytes, n = 128 high + low. `pack_*` arranges n as the primitives below read it, two bytes a coordinate either way.
//
// Rows of 8 bits lie one after another: `Sums` then holds partial sums of one row. Rows of 4 bits are interleaved,
// GROUP classes with four bytes each: `Sums` then holds the sums of as many classes as it has lanes. No lane
// overflows up to MOST_WIDTH coordinates (see `screening/backend.py`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace lastlayer {

constexpr int64_t GROUP = 16;       // classes whose 4-bit rows are interleaved
constexpr int64_t CHUNK = 8;        // coordinates in the four bytes of a class
constexpr int64_t CHUNK_BYTES = 64; // of a group

#if defined(__AVX512BW__) || defined(__AVX2__)

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }

#if defined(__AVX512BW__)

using Sums = __m512i;
using Row = __m512i;
constexpr int64_t PIECE = 32, LANES = 16;  // coordinates of a row in one step; lanes of 32 bits

inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Row load_row(const int8_t* at) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline Row load_hidden(const int16_t* at) { return _mm512_loadu_si512(at); }
inline Sums multiply_add(Sums sums, Row a, Row b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}
inline __m256 halves(Sums sums) {
    const __m512 numbers = _mm512_cvtepi32_ps(sums);
    return _mm256_add_ps(_mm512_castps512_ps256(numbers), _mm512_extractf32x8_ps(numbers, 1));
}
inline Row load_codes(const uint8_t* at) { return _mm512_loadu_si512(at); }
template <int PLACE>
Row nibbles(Row codes) {
    if (PLACE == 3) return _mm512_srli_epi16(codes, 12);
    return _mm512_and_si512(_mm512_srli_epi16(codes, 4 * PLACE), _mm512_set1_epi16(15));
}
inline Row repeated(const int16_t* pair) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
}
inline void store_sums(Sums sums, int32_t* at) { _mm512_storeu_si512(at, sums); }

#else

using Sums = __m256i;
using Row = __m256i;
constexpr int64_t PIECE = 16, LANES = 8;

inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Row load_row(const int8_t* at) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
inline Row load_hidden(const int16_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline Sums multiply_add(Sums sums, Row a, Row b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}
inline __m256 halves(Sums sums) { return _mm256_cvtepi32_ps(sums); }
inline Row load_codes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
template <int PLACE>
Row nibbles(Row codes) {
    if (PLACE == 3) return _mm256_srli_epi16(codes, 12);
    return _mm256_and_si256(_mm256_srli_epi16(codes, 4 * PLACE), _mm256_set1_epi16(15));
}
inline Row repeated(const int16_t* pair) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm256_set1_epi32(both);
}
inline void store_sums(Sums sums, int32_t* at) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), sums); }

#endif

inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    const __m256 pairs = _mm256_hadd_ps(halves(sums[0]), halves(sums[1]));
    const __m256 others = _mm256_hadd_ps(halves(sums[2]), halves(sums[3]));
    const __m256 fours = _mm256_hadd_ps(pairs, others);
    _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}

// Adds the products of LANES classes in a chunk with each of several hidden states.
template <int HIDDEN>
void add_chunk(Row codes, const int16_t* const (&hidden)[HIDDEN], Sums (&sums)[HIDDEN]) {
    const Row parts[4] = {nibbles<0>(codes), nibbles<1>(codes), nibbles<2>(codes), nibbles<3>(codes)};
    for (int h = 0; h < HIDDEN; ++h)
        for (int place = 0; place < 4; ++place)
            sums[h] = multiply_add(sums[h], parts[place], repeated(hidden[h] + 2 * place));
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct Sums {
    int32x4_t high, low;
};
using Row = int8x16_t;
struct Both {
    int8x16_t high, low;
};
constexpr int64_t PIECE = 16, LANES = 4;

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) {  // 16 high bytes, 16 low ones
    int8_t* bytes = reinterpret_cast<int8_t*>(packed);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t place = j / PIECE * 2 * PIECE + j % PIECE;
        const int high = (n[j] + 64) >> 7;
        bytes[place] = static_cast<int8_t>(high);
        bytes[place + PIECE] = static_cast<int8_t>(n[j] - 128 * high);
    }
}
// Of each chunk the high bytes in the order of the low nibbles, then of the high ones; then the low bytes.
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) {
    constexpr int ORDER[CHUNK] = {0, 4, 1, 5, 2, 6, 3, 7};
    int8_t* bytes = reinterpret_cast<int8_t*>(packed);
    for (int64_t j = 0; j < width; j += CHUNK)
        for (int place = 0; place < CHUNK; ++place) {
            const int number = n[j + ORDER[place]], high = (number + 64) >> 7;
            bytes[2 * j + place] = static_cast<int8_t>(high);
            bytes[2 * j + CHUNK + place] = static_cast<int8_t>(number - 128 * high);
        }
}

inline Sums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Row load_row(const int8_t* at) { return vld1q_s8(at); }
inline Both load_hidden(const int16_t* at) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(at);
    return {vld1q_s8(bytes), vld1q_s8(bytes + 16)};
}
inline Sums multiply_add(Sums sums, Row row, Both hidden) {
    return {vdotq_s32(sums.high, row, hidden.high), vdotq_s32(sums.low, row, hidden.low)};
}
inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    for (int r = 0; r < 4; ++r)
        totals[r] = 128.0f * vaddvq_f32(vcvtq_f32_s32(sums[r].high)) + vaddvq_f32(vcvtq_f32_s32(sums[r].low));
}
inline Row load_codes(const uint8_t* at) { return vreinterpretq_s8_u8(vld1q_u8(at)); }
inline void store_sums(Sums sums, int32_t* at) { vst1q_s32(at, vaddq_s32(vshlq_n_s32(sums.high, 7), sums.low)); }

template <int HIDDEN>
void add_chunk(Row codes, const int16_t* const (&hidden)[HIDDEN], Sums (&sums)[HIDDEN]) {
    const uint8x16_t bytes = vreinterpretq_u8_s8(codes);
    const Row first = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    const Row second = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    for (int h = 0; h < HIDDEN; ++h) {
        const int8x16_t parts = vld1q_s8(reinterpret_cast<const int8_t*>(hidden[h]));
        sums[h].high = vdotq_laneq_s32(vdotq_laneq_s32(sums[h].high, first, parts, 0), second, parts, 1);
        sums[h].low = vdotq_laneq_s32(vdotq_laneq_s32(sums[h].low, first, parts, 2), second, parts, 3);
    }
}

#else

constexpr int64_t PIECE = 8, LANES = 16;
struct Sums {
    int32_t lane[LANES];
};
struct Row {
    int16_t number[2 * LANES];
};

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }

inline Sums no_sums() { return {}; }
inline Row load_row(const int8_t* at) {
    Row row;
    for (int j = 0; j < PIECE; ++j) row.number[j] = at[j];
    return row;
}
inline Row load_hidden(const int16_t* at) {
    Row row;
    for (int j = 0; j < PIECE; ++j) row.number[j] = at[j];
    return row;
}
inline Sums multiply_add(Sums sums, const Row& a, const Row& b) {
    for (int j = 0; j < PIECE; ++j) sums.lane[j] += int32_t{a.number[j]} * b.number[j];
    return sums;
}
inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    for (int r = 0; r < 4; ++r) {
        totals[r] = 0;
        for (int j = 0; j < PIECE; ++j) totals[r] += static_cast<float>(sums[r].lane[j]);
    }
}
inline Row load_codes(const uint8_t* at) {
    Row codes;
    for (int j = 0; j < 2 * LANES; ++j) codes.number[j] = static_cast<int16_t>(at[2 * j] | at[2 * j + 1] << 8);
    return codes;
}
inline void store_sums(const Sums& sums, int32_t* at) { std::copy(sums.lane, sums.lane + LANES, at); }

template <int HIDDEN>
void add_chunk(const Row& codes, const int16_t* const (&hidden)[HIDDEN], Sums (&sums)[HIDDEN]) {
    for (int h = 0; h < HIDDEN; ++h)
        for (int place = 0; place < 4; ++place)
            for (int lane = 0; lane < LANES; ++lane) {
                const int first = static_cast<uint16_t>(codes.number[2 * lane]) >> (4 * place) & 15;
                const int second = static_cast<uint16_t>(codes.number[2 * lane + 1]) >> (4 * place) & 15;
                sums[h].lane[lane] += first * hidden[h][2 * place] + second * hidden[h][2 * place + 1];
            }
}

#endif

// totals[stride * h + r] of four rows and several hidden states.
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
            for (int h = 0; h < HIDDEN; ++h) sums[h][r] = multiply_add(sums[h][r], row, numbers[h]);
        }
    }
    for (int h = 0; h < HIDDEN; ++h) totals_of_four(sums[h], totals + stride * h);
}

// sums[h][i] of GROUPS groups of classes and several hidden states.
template <int GROUPS, int HIDDEN>
void multiply_codes(
    const uint8_t* codes, int64_t chunks, const int16_t* const (&hidden)[HIDDEN], int32_t (&sums)[HIDDEN][GROUPS * GROUP]) {
    constexpr int VECTORS = GROUP / LANES;
    Sums own[GROUPS * VECTORS][HIDDEN];
    for (auto& of_vector : own)
        for (Sums& one : of_vector) one = no_sums();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int16_t* at[HIDDEN];
        for (int h = 0; h < HIDDEN; ++h) at[h] = hidden[h] + CHUNK * chunk;
        for (int group = 0; group < GROUPS; ++group)
            for (int vector = 0; vector < VECTORS; ++vector) {
                const uint8_t* place = codes + (group * chunks + chunk) * CHUNK_BYTES + vector * 4 * LANES;
                add_chunk<HIDDEN>(load_codes(place), at, own[group * VECTORS + vector]);
            }
    }
    for (int h = 0; h < HIDDEN; ++h)
        for (int vector = 0; vector < GROUPS * VECTORS; ++vector)
            store_sums(own[vector][h], &sums[h][vector * LANES]);
}

}  // namespace lastlayer
