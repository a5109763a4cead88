// The primitives of integer_products.h for AVX-512 and AVX2, each with VNNI where it is there.
//
// Rows of 8 bits are multiplied as 16-bit integers (vpmaddwd; vpdpwssd with VNNI), which their sign does not disturb. Codes
// of 4 bits have none: with VNNI they are multiplied as bytes (vpdpbusd), twice as many in an instruction, with both
// bytes of a hidden state.
#pragma once

#include <cstring>

#include <immintrin.h>

namespace lastlayer {

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }

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
inline Row shifted(Row codes, int bits) { return _mm512_srli_epi16(codes, bits); }
inline Row masked(Row codes, int32_t mask) { return _mm512_and_si512(codes, _mm512_set1_epi32(mask)); }
inline Row broadcast(int32_t bytes) { return _mm512_set1_epi32(bytes); }
#if defined(__AVX512VNNI__)
inline Sums multiply_add_bytes(Sums sums, Row codes, Row hidden) { return _mm512_dpbusd_epi32(sums, codes, hidden); }
inline Sums combined(Sums high, Sums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }
#endif
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
inline Row shifted(Row codes, int bits) { return _mm256_srli_epi16(codes, bits); }
inline Row masked(Row codes, int32_t mask) { return _mm256_and_si256(codes, _mm256_set1_epi32(mask)); }
inline Row broadcast(int32_t bytes) { return _mm256_set1_epi32(bytes); }
#if defined(__AVXVNNI__)
inline Sums multiply_add_bytes(Sums sums, Row codes, Row hidden) { return _mm256_dpbusd_avx_epi32(sums, codes, hidden); }
inline Sums combined(Sums high, Sums low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low); }
#endif
inline void store_sums(Sums sums, int32_t* at) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), sums); }

#endif

inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    const __m256 pairs = _mm256_hadd_ps(halves(sums[0]), halves(sums[1]));
    const __m256 others = _mm256_hadd_ps(halves(sums[2]), halves(sums[3]));
    const __m256 fours = _mm256_hadd_ps(pairs, others);
    _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}

inline Row repeated(const int16_t* four_bytes) {
    int32_t bytes;
    std::memcpy(&bytes, four_bytes, sizeof bytes);
    return broadcast(bytes);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

struct CodeSums {
    Sums high, low;
};
inline void store_sums(CodeSums sums, int32_t* at) { store_sums(combined(sums.high, sums.low), at); }
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { pack_bytes_of_chunks(n, width, packed); }

template <int HIDDEN>
void add_chunk(Row codes, const int16_t* const (&hidden)[HIDDEN], CodeSums (&sums)[HIDDEN]) {
    constexpr int32_t MASK = 0x0f0f0f0f;
    const Row first = masked(codes, MASK), second = masked(shifted(codes, 4), MASK);
    for (int h = 0; h < HIDDEN; ++h) {
        const Row high = repeated(hidden[h]), next_high = repeated(hidden[h] + 2);
        const Row low = repeated(hidden[h] + 4), next_low = repeated(hidden[h] + 6);
        sums[h].high = multiply_add_bytes(multiply_add_bytes(sums[h].high, first, high), second, next_high);
        sums[h].low = multiply_add_bytes(multiply_add_bytes(sums[h].low, first, low), second, next_low);
    }
}

#else

using CodeSums = Sums;
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }

template <int HIDDEN>
void add_chunk(Row codes, const int16_t* const (&hidden)[HIDDEN], CodeSums (&sums)[HIDDEN]) {
    constexpr int32_t MASK = 0x000f000f;
    const Row parts[4] = {masked(codes, MASK), masked(shifted(codes, 4), MASK), masked(shifted(codes, 8), MASK), shifted(codes, 12)};
    for (int h = 0; h < HIDDEN; ++h)
        for (int place = 0; place < 4; ++place)
            sums[h] = multiply_add(sums[h], parts[place], repeated(hidden[h] + 2 * place));
}

#endif

}  // namespace lastlayer
