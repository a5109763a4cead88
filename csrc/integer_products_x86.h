// The primitives of integer_products.h for AVX-512 and AVX2, each with VNNI where it is there.
#pragma once

#include <cstring>

#include <immintrin.h>

namespace lastlayer {

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

}  // namespace lastlayer
