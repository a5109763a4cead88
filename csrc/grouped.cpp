// Many softmaxes side by side: each of some rows of a batch over its own rows of one weight.
//
// The plain twin, and the mathematics, are in lastlayer/functional/cluster_softmax.py. Where one or two rows of the
// batch fall into a cluster, a matrix product per cluster is all overhead, and what remains is reading each cluster's
// weight once: threads share such small groups. Large ones, as the head of two levels is, come one after the other, by
// matrix products that threads share. A "residual" is softmax - one_hot(target).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cache_hints.h"
#include "engine.h"
#include "matrix_product.h"
#include "parallel.h"
#include "products.h"
#include "vector_math.h"

namespace lastlayer {
namespace {

constexpr int64_t WORK_A_CHUNK = 1 << 19;  // multiply-adds that a thread takes at a time
constexpr int64_t SOFTMAX_WORK = 32;       // of a softmax, in multiply-adds a logit

struct Group {  // some rows of the batch, over weight rows [start, start + size)
    const int64_t* rows;
    int64_t count, start, size;
    int64_t place;  // of its (count, size) numbers among the residuals
    int64_t out;    // its first row in the weight's gradient
    bool large;     // computed by matrix products
};

// `count` things of some multiply-adds each, shared among threads.
template <class Body>
void share(int64_t count, int64_t work_of_all, const Body& body) {
    const int64_t grain = std::max<int64_t>(1, count * WORK_A_CHUNK / std::max<int64_t>(1, work_of_all));
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) body(k);
    });
}

// `pass.run(group)` of all groups: of the small ones shared among threads, of the large ones one after the other.
template <class Pass>
void each_group(const int64_t* table, int64_t num_groups, const int64_t* order, int64_t large_work, bool compact,
                const Pass& pass) {
    std::vector<Group> small, large;
    int64_t place = 0, out = 0, work = 0;
    for (int64_t g = 0; g < num_groups; ++g, table += 4) {
        const int64_t count = table[1], start = table[2], size = table[3];
        const bool is_large = count * size * pass.width >= large_work;
        (is_large ? large : small).push_back({order + table[0], count, start, size, place, compact ? out : start, is_large});
        if (!is_large) work += (count + 1) * size * pass.width;
        place += count * size;
        out += size;
    }
    share(static_cast<int64_t>(small.size()), work, [&](int64_t g) { pass.run(small[g]); });
    for (const Group& group : large) pass.run(group);
}

template <class Real>
struct Forward {
    const Real* hidden;    // (N, d)
    const Real* weight;    // (V, d)
    const Real* bias;      // (V,), or null
    const int64_t* slots;  // (N,), the weight row of each target
    Real* residual;        // flat, group after group; out
    Real* log_prob;        // (N,), of the target in its group; out
    Real* slope;           // (N, d), or null; residual @ weight; out
    int64_t width;
    bool fresh;  // whether the weight is too large to be in a cache

    void run(const Group& group) const {
        const int64_t count = group.count, size = group.size;
        const Real* block = weight + group.start * width;
        Real* logits = residual + group.place;
        const Scratch<Real> rows(count * width);  // the group's hidden states, then its part of the slope
        for (int64_t n = 0; n < count; ++n) std::copy_n(hidden + group.rows[n] * width, width, rows + n * width);
        if (group.large) {
            multiply<Real>(count, size, width, 1, rows_of<Real>(rows, width), rows_of(block, width).transposed(), 0, logits,
                           size);
        } else {
            form_logits(rows, block, count, size, logits);
        }
        share(count, count * size * SOFTMAX_WORK, [&](int64_t n) { finish_row(group, n); });
        if (slope == nullptr) return;
        if (group.large) {
            multiply<Real>(count, width, size, 1, rows_of<Real>(logits, size), rows_of(block, width), 0, rows, width);
        } else {
            std::fill_n(static_cast<Real*>(rows), count * width, Real{0});
            add_mean_weight(logits, block, count, size, rows);
        }
        for (int64_t n = 0; n < count; ++n) std::copy_n(rows + n * width, width, slope + group.rows[n] * width);
    }

    // The logits of a row become residuals, and its log-probability is known.
    void finish_row(const Group& group, int64_t n) const {
        const int64_t row = group.rows[n];
        Real* logits = residual + group.place + n * group.size;
        if (bias != nullptr) add_1x1(logits, Real{1}, bias + group.start, group.size);
        log_prob[row] = to_residual(logits, group.size, slots[row] - group.start);
    }

    // Four weight rows at a time, for all rows of the group: the weight is read from memory once.
    void form_logits(const Real* rows, const Real* block, int64_t count, int64_t size, Real* logits) const {
        const int64_t row_bytes = width * static_cast<int64_t>(sizeof(Real)), ahead = 1 + PREFETCH_BYTES / row_bytes;
        int64_t i = 0;
        for (; i + 4 <= size; i += 4) {
            const Real* four = block + i * width;
            if (fresh) prefetch(four + ahead * width, 4 * row_bytes);
            int64_t n = 0;
            for (; n + 2 <= count; n += 2) {
                Real* out = logits + n * size + i;
                dot_2x4(rows + n * width, four, width, out, out + size);
            }
            if (n < count) dot_1x4(rows + n * width, four, width, logits + n * size + i);
        }
        for (; i < size; ++i)
            for (int64_t n = 0; n < count; ++n) logits[n * size + i] = dot(rows + n * width, block + i * width, width);
    }

    // Logits become their residual; returns the target's log-probability.
    static Real to_residual(Real* logits, int64_t size, int64_t target) {
        const Real peak = largest(logits, size);
        const Real of_target = logits[target] - peak;
        Real total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < size; ++i) {
            const Real part = exp_of_negative(logits[i] - peak);
            logits[i] = part;
            total += part;
        }
        const Real inverse = 1 / total;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) logits[i] *= inverse;
        logits[target] -= 1;
        return static_cast<Real>(of_target - std::log(static_cast<double>(total)));
    }

    // into += residuals @ block
    void add_mean_weight(const Real* residuals, const Real* block, int64_t count, int64_t size, Real* into) const {
        for (int64_t n = 0; n < count; n += 2, into += 2 * width) {
            const bool pair = n + 1 < count;
            const Real *f = residuals + n * size, *g = f + size;
            int64_t i = 0;
            for (; i + 4 <= size; i += 4) {
                if (pair) {
                    add_2x4(into, f + i, g + i, block + i * width, width);
                } else {
                    add_1x4(into, f + i, block + i * width, width);
                }
            }
            for (; i < size; ++i) {
                add_1x1(into, f[i], block + i * width, width);
                if (pair) add_1x1(into + width, g[i], block + i * width, width);
            }
        }
    }
};

template <class Real>
struct Backward {
    const Real* hidden;    // (N, d)
    const Real* residual;  // flat, from the forward pass
    const Real* scale;     // (N,)
    Real* of_weight;       // (R, d); the groups' rows become residual^T (scale * hidden)
    Real* of_bias;         // (R,); likewise residual^T scale
    int64_t width;
    bool streamed;

    void run(const Group& group) const {
        const int64_t count = group.count, size = group.size;
        const Real* residuals = residual + group.place;
        const Scratch<Real> scaled(count * width);
        std::fill_n(of_bias + group.out, size, Real{0});
        for (int64_t n = 0; n < count; ++n) {
            const int64_t row = group.rows[n];
            set_1x1(scaled + n * width, scale[row], hidden + row * width, width);
            add_1x1(of_bias + group.out, scale[row], residuals + n * size, size);
        }
        Real* into = of_weight + group.out * width;
        if (group.large) {
            multiply<Real>(size, width, count, 1, rows_of(residuals, size).transposed(), rows_of<Real>(scaled, width), 0,
                           into, width);
        } else {
            write_rows(residuals, scaled, count, size, into);
        }
    }

    // Two weight rows at a time; every row is written once.
    void write_rows(const Real* residuals, const Real* scaled, int64_t count, int64_t size, Real* into) const {
        const Scratch<Real> pair(2 * width), factors(2 * count);
        Real *f = factors, *g = f + count;
        for (int64_t i = 0; i < size; i += 2) {
            const int64_t rows = std::min<int64_t>(2, size - i);  // of one row alone, the second is left out
            for (int64_t n = 0; n < count; ++n) {
                f[n] = residuals[n * size + i];
                g[n] = rows == 2 ? residuals[n * size + i + 1] : Real{0};
            }
            set_1x1<Real>(pair, f[0], scaled, width);
            set_1x1<Real>(pair + width, g[0], scaled, width);
            int64_t n = 1;
            for (; n + 4 <= count; n += 4) add_2x4<Real>(pair, f + n, g + n, scaled + n * width, width);
            for (; n < count; ++n) {
                add_1x1<Real>(pair, f[n], scaled + n * width, width);
                add_1x1<Real>(pair + width, g[n], scaled + n * width, width);
            }
            const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(Real));
            if (streamed) {
                stream(into + i * width, pair, bytes);
            } else {
                std::memcpy(into + i * width, pair, static_cast<size_t>(bytes));
            }
        }
        if (streamed) stream_fence();
    }
};

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(grouped_softmax_forward)
(const int64_t* table, int64_t num_groups, int64_t large_work, const int64_t* order, const void* hidden, const void* weight,
 const void* bias, const int64_t* slots, void* residual, void* log_prob, void* slope, int64_t num_classes, int64_t width,
 int64_t in_float64) {
    using namespace lastlayer;
    by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        const bool fresh = num_classes * width * static_cast<int64_t>(sizeof(Real)) >= CACHE_BYTES;
        const Forward<Real> pass{as(hidden), as(weight), as(bias), slots, as(residual), as(log_prob), as(slope), width, fresh};
        each_group(table, num_groups, order, large_work, false, pass);
    });
    return 0;
}

LASTLAYER_KERNEL(grouped_softmax_backward)
(const int64_t* table, int64_t num_groups, int64_t large_work, int64_t compact, const int64_t* order, const void* hidden,
 const void* residual, const void* scale, void* of_weight, void* of_bias, int64_t num_rows, int64_t width,
 int64_t in_float64) {
    using namespace lastlayer;
    by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        const bool streamed = better_streamed(of_weight, num_rows, width * static_cast<int64_t>(sizeof(Real)));
        const Backward<Real> pass{as(hidden), as(residual), as(scale), as(of_weight), as(of_bias), width, streamed};
        each_group(table, num_groups, order, large_work, compact != 0, pass);
    });
    return 0;
}
