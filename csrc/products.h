// Products of a few rows with a few others, all of `width` contiguous numbers.
//
// Two rows with four: each number is loaded once for several products, and their eight sums fit in registers.
#pragma once

#include "engine.h"

namespace lastlayer {

// out[i] = row . others[i], i < 4
template <class Real>
inline void dot_1x4(const Real* row, const Real* others, int64_t width, Real* out) {
    const Real *b0 = others, *b1 = b0 + width, *b2 = b1 + width, *b3 = b2 + width;
    Real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t k = 0; k < width; ++k) {
        s0 += row[k] * b0[k];
        s1 += row[k] * b1[k];
        s2 += row[k] * b2[k];
        s3 += row[k] * b3[k];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// The same for two rows, one after the other; to `out` and `other_out`.
template <class Real>
inline void dot_2x4(const Real* rows, const Real* others, int64_t width, Real* out, Real* other_out) {
    const Real *a0 = rows, *a1 = a0 + width;
    const Real *b0 = others, *b1 = b0 + width, *b2 = b1 + width, *b3 = b2 + width;
    Real s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, t0, t1, t2, t3)
    for (int64_t k = 0; k < width; ++k) {
        s0 += a0[k] * b0[k];
        s1 += a0[k] * b1[k];
        s2 += a0[k] * b2[k];
        s3 += a0[k] * b3[k];
        t0 += a1[k] * b0[k];
        t1 += a1[k] * b1[k];
        t2 += a1[k] * b2[k];
        t3 += a1[k] * b3[k];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
    other_out[0] = t0, other_out[1] = t1, other_out[2] = t2, other_out[3] = t3;
}

template <class Real>
inline Real dot(const Real* row, const Real* other, int64_t width) {
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; ++k) sum += row[k] * other[k];
    return sum;
}

// into = factor * row
template <class Real>
inline void set_1x1(Real* into, Real factor, const Real* row, int64_t width) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) into[k] = factor * row[k];
}

// into += factor * row
template <class Real>
inline void add_1x1(Real* into, Real factor, const Real* row, int64_t width) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) into[k] += factor * row[k];
}

// into += sum of f[i] * others[i], i < 4
template <class Real>
inline void add_1x4(Real* into, const Real* f, const Real* others, int64_t width) {
    const Real *b0 = others, *b1 = b0 + width, *b2 = b1 + width, *b3 = b2 + width;
    const Real f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) into[k] += f0 * b0[k] + f1 * b1[k] + f2 * b2[k] + f3 * b3[k];
}

// The same into two rows, one after the other, by the factors `f` and `g`.
template <class Real>
inline void add_2x4(Real* into, const Real* f, const Real* g, const Real* others, int64_t width) {
    const Real *b0 = others, *b1 = b0 + width, *b2 = b1 + width, *b3 = b2 + width;
    const Real f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3], g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
    Real* other_into = into + width;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
        into[k] += f0 * b0[k] + f1 * b1[k] + f2 * b2[k] + f3 * b3[k];
        other_into[k] += g0 * b0[k] + g1 * b1[k] + g2 * b2[k] + g3 * b3[k];
    }
}

}  // namespace lastlayer
