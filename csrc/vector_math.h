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

// exp(r) for |r| <= log(2) / 2, to 3e-9 of its value: the polynomial with the least largest relative error.
inline float exp_near_zero(float r) {
    float p = 1.3814539416e-3f;
    p = p * r + 8.3687454462e-3f;
    p = p * r + 4.1668388993e-2f;
    p = p * r + 1.6666521132e-1f;
    p = p * r + 4.9999994040e-1f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

// x less n log 2, in two steps that lose nothing.
inline float reduced(float x, float n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }

constexpr float LOG2_E = 1.44269504f;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits

// exp(x) to 1 unit in the last place of float32; 0 below -87.3, infinity above 88.7, NaN for NaN.
inline float exp(float x) {
    constexpr float HIGHEST = 88.72283f, LOWEST = -87.33654f;
    const float shifted = x * LOG2_E + ROUND;
    const float n = shifted - ROUND;
    const uint32_t power = bits_as<uint32_t>(shifted) - bits_as<uint32_t>(ROUND);
    const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(power) >> 1);  // 2^128 does not fit: two factors
    const float value = exp_near_zero(reduced(x, n)) * bits_as<float>((half + 127) << 23) *
                        bits_as<float>((power - half + 127) << 23);
    const float bounded = x > HIGHEST ? bits_as<float>(0x7f800000) : value;
    return x < LOWEST ? 0.0f : bounded;
}

// The same for x <= 0 (or NaN), in two thirds of the instructions: where the largest value was subtracted.
inline float exp_of_negative(float x) {
    constexpr float LOWEST = -87.3f;
    constexpr float BIASED_ROUND = ROUND + 127.0f;  // then the low bits are the exponent of 2^n
    const float shifted = x * LOG2_E + BIASED_ROUND;
    const float value = exp_near_zero(reduced(x, shifted - BIASED_ROUND)) *
                        bits_as<float>(bits_as<uint32_t>(shifted) << 23);
    return x < LOWEST ? 0.0f : value;
}
inline double exp_of_negative(double x) { return std::exp(x); }

// The maximum of some numbers, NaN left out; finite, so that `value - largest` is no NaN where all are -infinity.
template <class Real>
inline Real largest(const Real* values, int64_t count) {
    Real peak = std::numeric_limits<Real>::lowest();
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < count; ++j) peak = values[j] > peak ? values[j] : peak;
    return peak;
}

}  // namespace lastlayer
