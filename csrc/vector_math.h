// Scalar functions that the compiler vectorises inside `#pragma omp simd` loops, and conversions of half precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace lastlayer {

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

struct bfloat16 {
    uint16_t bits;
};

struct float16 {  // finite
    uint16_t bits;
};

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(bfloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float load(float16 value) {
    constexpr uint32_t REBIAS = 112u << 23, LEAST = 1u << 23;  // a smaller magnitude is subnormal: m * 2^-24
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
    const float normal = bits_as<float>(magnitude + REBIAS);
    const float subnormal = bits_as<float>(magnitude + REBIAS + LEAST) - 6.103515625e-05f;
    const uint32_t bits = bits_as<uint32_t>(magnitude < LEAST ? subnormal : normal);
    return bits_as<float>(bits | static_cast<uint32_t>(value.bits & 0x8000) << 16);
}

inline void store(float& place, float value) { place = value; }
inline void store(bfloat16& place, float value) {  // to the nearest, ties to even; a NaN stays one
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    place.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// exp(x) for x <= 0 (or NaN), as where the largest value was subtracted, to 1 unit in the last place; 0 below -87.3.
//
// exp(x) = 2^n exp(r), |r| <= log(2) / 2; the polynomial is the one with the least largest relative error, 3e-9.
inline float exp_of_negative(float x) {
    constexpr float LOWEST = -87.3f, LOG2_E = 1.44269504f;
    constexpr float ROUND = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to a whole number, held in the low bits; the bias of 2^n
    const float shifted = x * LOG2_E + ROUND, n = shifted - ROUND;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // less n log 2, in two steps that lose nothing
    float p = 1.3814539416e-3f;
    p = p * r + 8.3687454462e-3f;
    p = p * r + 4.1668388993e-2f;
    p = p * r + 1.6666521132e-1f;
    p = p * r + 4.9999994040e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return x < LOWEST ? 0.0f : p * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
}
inline double exp_of_negative(double x) { return std::exp(x); }

// The maximum of `least` and some numbers, NaN left out; with a finite `least`, `value - largest` is no NaN.
template <class Real>
inline Real largest(const Real* values, int64_t count, Real least = std::numeric_limits<Real>::lowest()) {
    Real peak = least;
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < count; ++j) peak = values[j] > peak ? values[j] : peak;
    return peak;
}

}  // namespace lastlayer
