// Scores summarised by blocks of classes: a block's maximum, and the sum of exponentials relative to it.
#pragma once

#include <cstdint>

#include "screening.h"

namespace lastlayer {

inline float largest(const float* values, int64_t count) {
    float most = MINUS_INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

inline float sum_of_exponentials(const float* values, int64_t count, float most) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += exp(values[i] - most);
    return total;
}

// Of at most BLOCK scores; a block of which nothing is left (all -inf) has the sum 0.
inline void summarise_block(const float* scores, int64_t count, float& most, float& sum) {
    most = largest(scores, count);
    sum = most > MINUS_INFINITY ? sum_of_exponentials(scores, count, most) : 0.0f;
}

}  // namespace lastlayer
