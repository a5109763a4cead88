// The loss of rows of logits and, in their place, its gradient: each row in one visit, while it is in cache.
//
// The plain twin, and the mathematics, are in lastlayer/kernels/softmax_rows.py.
#include <cmath>
#include <limits>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "vector_math.h"

namespace lastlayer {
namespace {

struct Terms {               // of n rows over V classes
    const float* bias;       // (V,)
    const int64_t* ids;      // (n,) the target of each row
    const float* hard;       // (n,) the loss is hard (lse - f_y) + square lse^2
    const float* square;     // (n,)
    float* loss;             // (n,) out
    int64_t num_classes;
    bool form;               // whether to form the gradient; if not, rows are left as they are
};

template <class Number>
float add_bias(const Number* row, const float* bias, int64_t count, float* logits) {  // returns the largest
    float peak = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < count; ++j) {
        const float logit = load(row[j]) + bias[j];
        logits[j] = logit;
        peak = logit > peak ? logit : peak;
    }
    return peak;
}

float exponentiate(float* values, int64_t count, float peak) {  // exp(value - peak) in place; returns the sum
    float mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t j = 0; j < count; ++j) {
        const float part = exp(values[j] - peak);
        values[j] = part;
        mass += part;
    }
    return mass;
}

template <class Number>
void plain_row(Number* row, int64_t i, const Terms& terms, float* scratch) {
    const int64_t target = terms.ids[i], count = terms.num_classes;
    const float peak = add_bias(row, terms.bias, count, scratch);
    const float at_target = scratch[target];
    const float mass = exponentiate(scratch, count, peak);
    const double normalizer = static_cast<double>(peak) + std::log(static_cast<double>(mass));
    const double hard = terms.hard[i], square = terms.square[i];
    terms.loss[i] = static_cast<float>(hard * (normalizer - at_target) + square * normalizer * normalizer);
    if (!terms.form) return;
    const float share = static_cast<float>((hard + 2 * square * normalizer) / mass);
    const float of_target = scratch[target] * share - terms.hard[i];
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) store(row[j], scratch[j] * share);
    store(row[target], of_target);
}

template <class Number>
void plain_rows(Number* rows, int64_t num_rows, const Terms& terms) {
    parallel_for(num_rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(terms.num_classes));
        for (int64_t i = begin; i < end; ++i) plain_row(rows + i * terms.num_classes, i, terms, scratch.data());
    });
}

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(softmax_rows_plain)
(void* rows, const float* bias, const int64_t* ids, const float* hard, const float* square, float* loss,
 int64_t num_rows, int64_t num_classes, int64_t form, int64_t in_bfloat16) {
    const lastlayer::Terms terms{bias, ids, hard, square, loss, num_classes, form != 0};
    if (in_bfloat16) {
        lastlayer::plain_rows(static_cast<lastlayer::bfloat16*>(rows), num_rows, terms);
    } else {
        lastlayer::plain_rows(static_cast<float*>(rows), num_rows, terms);
    }
    return 0;
}
