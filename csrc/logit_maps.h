// Logit maps f as `softmax_rows.cpp` takes them: over a block of logits that is in the first-level cache.
//
// `forward(logits, slopes, count, peak)` turns logits x, of which `peak` is the largest, into exp(f(x) - shift), with
// f'(x) in `slopes`, and returns the shift and the sum: as f increases, the shift is f(peak) for all but one of them.
// `value(x)` and `slope(x)` are f and f' of one logit, exact to its rounding.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "engine.h"
#include "vector_math.h"

namespace lastlayer {

constexpr int64_t BLOCK = 1024;  // logits

struct alignas(64) Block {  // as long as a cache line, so that no vector lies in two
    float at[BLOCK];
};

struct Mass {
    double shift;
    float sum;  // of exp(value - shift)
};

inline Mass exponentiate(float* values, int64_t count, double peak) {  // in place
    // Finite even where all values are -infinity, so that none becomes NaN.
    const float shift = static_cast<float>(std::max<double>(peak, -FLT_MAX));
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
        const float part = exp_of_negative(values[j] - shift);
        values[j] = part;
        sum += part;
    }
    return {shift, sum};
}

// f(x) = x
struct Identity {
    static constexpr bool HAS_SLOPES = false;

    double value(float x) const { return x; }
    double slope(float) const { return 1; }
    Mass forward(float* logits, float*, int64_t count, float peak) const { return exponentiate(logits, count, peak); }
};

// f(x) = x + log sigmoid(x), with one exponential a logit. With m the largest logit and E = exp(x - m):
//
//     exp f(x) = exp(m) E^2 / (E + exp(-m))             f'(x) = 2 - E / (E + exp(-m))            m >= 0
//              = exp(2m) E^2 / (E exp(m) + 1)                 = 2 - E exp(m) / (E exp(m) + 1)    m < 0
//
// so both are E^2 / (a E + b) and (a E + 2 b) / (a E + b), with a and b at most 1.
struct Sigsoftmax {
    static constexpr bool HAS_SLOPES = true;

    double value(float x) const { return x + std::min<double>(x, 0) - std::log1p(std::exp(-std::fabs(double{x}))); }
    double slope(float x) const { return 1 + 1 / (1 + std::exp(double{x})); }

    Mass forward(float* logits, float* slopes, int64_t count, float peak) const {
        const float a = peak >= 0 ? 1.0f : exp_of_negative(peak);
        const float b = peak >= 0 ? std::max(exp_of_negative(-peak), 1e-37f) : 1.0f;  // never 0 / 0
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; ++j) {
            const float e = exp_of_negative(logits[j] - peak), inverse = 1.0f / (a * e + b);
            const float part = e * e * inverse;
            slopes[j] = (a * e + 2.0f * b) * inverse;
            logits[j] = part;
            sum += part;
        }
        return {double{peak} + std::min<double>(peak, 0), sum};
    }
};

// f(x) = cap tanh(x / cap); with t = exp(-2 |x| / cap), tanh |x / cap| = (1 - t) / (1 + t), of slope 4 t / (1 + t)^2.
struct SoftCap {
    static constexpr bool HAS_SLOPES = true;
    float cap;

    double value(float x) const { return cap * std::tanh(double{x} / cap); }
    double slope(float x) const { return 1 / std::pow(std::cosh(double{x} / cap), 2); }

    Mass forward(float* logits, float* slopes, int64_t count, float peak) const {
        const float rate = -2.0f / cap;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
            const float t = exp_of_negative(rate * std::fabs(logits[j])), inverse = 1.0f / (1.0f + t);
            slopes[j] = 4.0f * t * inverse * inverse;
            logits[j] = std::copysign(cap * (1.0f - t) * inverse, logits[j]);
        }
        return exponentiate(logits, count, value(peak));
    }
};

struct Line {
    float slope, offset;
};

struct PairSums {
    double first, second;
};

// Adds two numbers to the two sums of each segment.
inline void add_pairs(PairSums* sums, const int32_t* segments, const float* first, const float* second, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        PairSums& own = sums[segments[j]];
        own.first += first[j];
        own.second += second[j];
    }
}

// f(x) = slope_k x + offset_k on segment k, of `width`, the first of which begins at `-bound`.
struct Plif {
    static constexpr bool HAS_SLOPES = true;
    const Line* lines;  // (num_lines,)
    int64_t num_lines;
    float bound, width;

    double value(float x) const {
        const Line line = lines[segment_of(x)];
        return line.slope * x + line.offset;
    }

    double slope(float x) const { return lines[segment_of(x)].slope; }

    Mass forward(float* logits, float* slopes, int64_t count, float peak) const {
        alignas(64) int32_t segments[BLOCK];
        alignas(64) float inside[BLOCK];
        find_segments(logits, segments, inside, count);
        for (int64_t j = 0; j < count; ++j) {
            const Line line = lines[segments[j]];
            slopes[j] = line.slope;
            logits[j] = line.slope * logits[j] + line.offset;
        }
        return exponentiate(logits, count, value(peak));
    }

    // The segment of each logit, clamp(floor((x + bound) / width), 0, last), 0 for NaN; and where inside of it.
    void find_segments(const float* logits, int32_t* segments, float* inside, int64_t count) const {
        const float rate = 1.0f / width, last = static_cast<float>(num_lines - 1), begin = bound;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
            const float at = (logits[j] + begin) * rate;
            const float positive = at > 0.0f ? at : 0.0f;
            const int32_t segment = static_cast<int32_t>(positive < last ? positive : last);
            segments[j] = segment;
            inside[j] = at - static_cast<float>(segment);
        }
    }

   private:
    int32_t segment_of(float x) const {
        int32_t segment;
        float inside;
        find_segments(&x, &segment, &inside, 1);
        return segment;
    }
};

}  // namespace lastlayer
