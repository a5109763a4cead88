// Lookups into a table of pairs, by gathers where the processor has them, and sums of pairs at places of a table.
#pragma once

#include "engine.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lastlayer {

struct Line {
    float slope, offset;
};

struct PairSums {
    double first, second;
};

// The slope at each value, from the line of its segment; the values become the lines' values.
inline void look_up_portable(const Line* lines, const int32_t* segments, float* values, float* slopes, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        const Line line = lines[segments[j]];
        slopes[j] = line.slope;
        values[j] = line.slope * values[j] + line.offset;
    }
}

#if defined(__AVX512F__)  // AVX2's gathers are no quicker than the loads that they replace
inline void look_up(const Line* lines, const int32_t* segments, float* values, float* slopes, int64_t count) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const int64_t whole = count / 16 * 16;
    for (int64_t j = 0; j < whole; j += 16) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(segments + j));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(segments + j + 8));
        const __m512 low = _mm512_castsi512_ps(_mm512_mask_i32gather_epi64(_mm512_setzero_si512(), 0xff, first, lines, 8));
        const __m512 high = _mm512_castsi512_ps(_mm512_mask_i32gather_epi64(_mm512_setzero_si512(), 0xff, second, lines, 8));
        const __m512 slope = _mm512_permutex2var_ps(low, even, high);
        const __m512 offset = _mm512_permutex2var_ps(low, odd, high);
        _mm512_storeu_ps(values + j, _mm512_fmadd_ps(slope, _mm512_loadu_ps(values + j), offset));
        _mm512_storeu_ps(slopes + j, slope);
    }
    look_up_portable(lines, segments + whole, values + whole, slopes + whole, count - whole);
}
#else
inline void look_up(const Line* lines, const int32_t* segments, float* values, float* slopes, int64_t count) {
    look_up_portable(lines, segments, values, slopes, count);
}
#endif

// Adds two numbers to the two sums of each segment.
inline void add_pairs(PairSums* sums, const int32_t* segments, const float* first, const float* second, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        PairSums& own = sums[segments[j]];
        own.first += first[j];
        own.second += second[j];
    }
}

}  // namespace lastlayer
