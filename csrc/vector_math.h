// Scalar functions that the compiler vectorises inside `#pragma omp simd` loops, and conversions of half precision.
#pragma once

#include <cstdint>
#include <cstring>

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

inline float load(float value) { return value; }
inline float load(bfloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

inline void store(float& place, float value) { place = value; }
inline void store(bfloat16& place, float value) {  // to the nearest, ties to even; a NaN stays one
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    place.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// exp(x) to 1 unit in the last place of float32; 0 below -87.3, infinity above 88.7, NaN for NaN.
//
// x = n log 2 + r with |r| <= log(2) / 2; exp(r) by its Taylor polynomial with coefficients fitted on that interval.
inline float exp(float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    constexpr float HIGHEST = 88.72283f, LOWEST = -87.33654f;
    const float shifted = x * 1.44269504f + ROUND;
    const float n = shifted - ROUND;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = bits_as<int32_t>(shifted) - bits_as<int32_t>(ROUND);
    const int32_t half = power >> 1;  // 2^128 does not fit: two factors
    const float value = p * bits_as<float>((half + 127) << 23) * bits_as<float>((power - half + 127) << 23);
    const float bounded = x > HIGHEST ? bits_as<float>(0x7f800000) : value;
    return x < LOWEST ? 0.0f : bounded;
}

}  // namespace lastlayer
