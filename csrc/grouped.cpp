// Many softmaxes side by side: each of some rows of a batch over its own rows of one weight.
//
// The plain twin, and the mathematics, are in lastlayer/functional/two_level.py. Where one or two rows of the batch
// fall into a cluster, a matrix product per cluster is all overhead, and what remains is reading each cluster's
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

struct Group {  // rows [row, row + count) of the batch, over weight rows [start, start + size)
    int64_t row, count, start, size;
    int64_t place;  // of its (count, size) numbers among the residuals
    int64_t out;    // its first row in the weight's gradient
};

struct Groups {
    std::vector<Group> small, large;  // `large` have at least `large_work` multiply-adds a pass

    Groups(const int64_t* table, int64_t num_groups, int64_t width, int64_t large_work, bool compact) {
        small.reserve(static_cast<size_t>(num_groups));
        int64_t place = 0, out = 0;
        for (int64_t g = 0; g < num_groups; ++g) {
            const int64_t row = table[4 * g], count = table[4 * g + 1], start = table[4 * g + 2], size = table[4 * g + 3];
            auto& kind = count * size * width < large_work ? small : large;
            kind.push_back({row, count, start, size, place, compact ? out : start});
            place += count * size;
            out += size;
        }
    }
};

// `count` things of some multiply-adds each, shared among threads.
template <class Body>
void share(int64_t count, int64_t work_of_all, const Body& body) {
    const int64_t grain = std::max<int64_t>(1, count * WORK_A_CHUNK / std::max<int64_t>(1, work_of_all));
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) body(k);
    });
}

// `pass.run(group)` of all small groups, and `pass.run_shared(group)` of the large ones.
template <class Pass>
void each_group(const Groups& groups, int64_t width, const Pass& pass) {
    int64_t work = 0;
    for (const Group& group : groups.small) work += (group.count + 1) * group.size * width;
    share(static_cast<int64_t>(groups.small.size()), work, [&](int64_t g) { pass.run(groups.small[g]); });
    for (const Group& group : groups.large) pass.run_shared(group);
}

template <class Real>
struct Forward {
    const Real* hidden;    // (N, d), sorted by group
    const Real* weight;    // (V, d)
    const Real* bias;      // (V,), or null
    const int64_t* slots;  // (N,), the weight row of each target
    Real* residual;        // flat, group after group; out
    Real* log_prob;        // (N,), gains the target's log-probability in its group
    Real* slope;           // (N, d), or null; gains residual @ weight, or becomes it
    bool slope_is_new;     // and becomes it
    int64_t width;
    bool fresh;  // whether the weight is too large to be in a cache

    void run(const Group& group) const {
        form_logits(group);
        for (int64_t n = 0; n < group.count; ++n) finish_row(group, n);
        if (slope == nullptr) return;
        if (slope_is_new) std::fill_n(slope + group.row * width, group.count * width, Real{0});
        add_mean_weight(group);
    }

    void run_shared(const Group& group) const {
        const auto rows = rows_of(hidden + group.row * width, width), block = rows_of(weight + group.start * width, width);
        Real* logits = residual + group.place;
        multiply<Real>(group.count, group.size, width, 1, rows, block.transposed(), 0, logits, group.size);
        share(group.count, group.count * group.size * SOFTMAX_WORK, [&](int64_t n) { finish_row(group, n); });
        if (slope == nullptr) return;
        const auto residuals = rows_of<Real>(logits, group.size);
        multiply<Real>(group.count, width, group.size, 1, residuals, block, slope_is_new ? Real{0} : Real{1},
                       slope + group.row * width, width);
    }

    // The logits of a row become residuals, and its log-probability is known.
    void finish_row(const Group& group, int64_t n) const {
        const int64_t row = group.row + n;
        Real* logits = residual + group.place + n * group.size;
        if (bias != nullptr) add_1x1(logits, Real{1}, bias + group.start, group.size);
        log_prob[row] += to_residual(logits, group.size, slots[row] - group.start);
    }

    // Four weight rows at a time, for all rows of the group: the weight is read from memory once.
    void form_logits(const Group& group) const {
        const int64_t row_bytes = width * static_cast<int64_t>(sizeof(Real)), ahead = 1 + PREFETCH_BYTES / row_bytes;
        const Real *rows = hidden + group.row * width, *block = weight + group.start * width;
        Real* logits = residual + group.place;
        int64_t i = 0;
        for (; i + 4 <= group.size; i += 4) {
            const Real* four = block + i * width;
            if (fresh) prefetch(four + ahead * width, 4 * row_bytes);
            int64_t n = 0;
            for (; n + 2 <= group.count; n += 2) {
                Real* out = logits + n * group.size + i;
                dot_2x4(rows + n * width, four, width, out, out + group.size);
            }
            if (n < group.count) dot_1x4(rows + n * width, four, width, logits + n * group.size + i);
        }
        for (; i < group.size; ++i)
            for (int64_t n = 0; n < group.count; ++n)
                logits[n * group.size + i] = dot(rows + n * width, block + i * width, width);
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

    void add_mean_weight(const Group& group) const {
        const int64_t size = group.size;
        for (int64_t n = 0; n < group.count; n += 2) {
            const bool pair = n + 1 < group.count;
            const Real *f = residual + group.place + n * size, *g = f + size;
            const Real* block = weight + group.start * width;
            Real* into = slope + (group.row + n) * width;
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
    const Real* hidden;    // (N, d), sorted by group
    const Real* residual;  // flat, from the forward pass
    const Real* scale;     // (N,)
    Real* of_weight;       // (R, d); the groups' rows become (scale * residual)^T hidden
    Real* of_bias;         // (R,), or null; likewise the sums over the batch
    int64_t width;
    bool streamed;

    // Two weight rows at a time; every row is written once.
    void run(const Group& group) const {
        std::vector<Real> pair(static_cast<size_t>(2 * width)), factors(static_cast<size_t>(2 * group.count));
        Real *f = factors.data(), *g = f + group.count;
        for (int64_t i = 0; i < group.size; i += 2) {
            const int64_t rows = std::min<int64_t>(2, group.size - i), out = group.out + i;
            weigh(group, i, f);
            if (rows == 2) weigh(group, i + 1, g);
            if (of_bias != nullptr)
                for (int64_t r = 0; r < rows; ++r) of_bias[out + r] = sum(r == 0 ? f : g, group.count);
            combine(group, f, g, rows, pair.data());
            Real* into = of_weight + out * width;
            const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(Real));
            if (streamed) {
                stream(into, pair.data(), bytes);
            } else {
                std::memcpy(into, pair.data(), static_cast<size_t>(bytes));
            }
        }
        if (streamed) stream_fence();
    }

    void run_shared(const Group& group) const {
        const Scratch<Real> scaled(group.count * width);
        const Real* residuals = residual + group.place;
        if (of_bias != nullptr) std::fill_n(of_bias + group.out, group.size, Real{0});
        for (int64_t n = 0; n < group.count; ++n) {
            const int64_t row = group.row + n;
            set_1x1(scaled + n * width, scale[row], hidden + row * width, width);
            if (of_bias != nullptr) add_1x1(of_bias + group.out, scale[row], residuals + n * group.size, group.size);
        }
        multiply<Real>(group.size, width, group.count, 1, rows_of(residuals, group.size).transposed(),
                       rows_of<Real>(scaled, width), 0, of_weight + group.out * width, width);
    }

    void weigh(const Group& group, int64_t i, Real* f) const {
        const Real* column = residual + group.place + i;
        for (int64_t n = 0; n < group.count; ++n) f[n] = scale[group.row + n] * column[n * group.size];
    }

    static Real sum(const Real* f, int64_t count) {
        Real total = 0;
        for (int64_t n = 0; n < count; ++n) total += f[n];
        return total;
    }

    // One or two rows of factors times the hidden states of the group.
    void combine(const Group& group, const Real* f, const Real* g, int64_t rows, Real* into) const {
        const Real* own = hidden + group.row * width;
        set_1x1(into, f[0], own, width);
        if (rows == 2) set_1x1(into + width, g[0], own, width);
        int64_t n = 1;
        for (; n + 4 <= group.count; n += 4) {
            if (rows == 2) {
                add_2x4(into, f + n, g + n, own + n * width, width);
            } else {
                add_1x4(into, f + n, own + n * width, width);
            }
        }
        for (; n < group.count; ++n) {
            add_1x1(into, f[n], own + n * width, width);
            if (rows == 2) add_1x1(into + width, g[n], own + n * width, width);
        }
    }
};

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(grouped_softmax_forward)
(const int64_t* table, int64_t num_groups, int64_t large_work, const void* hidden, const void* weight, const void* bias,
 const int64_t* slots, void* residual, void* log_prob, void* slope, int64_t slope_is_new, int64_t num_classes,
 int64_t width, int64_t in_float64) {
    using namespace lastlayer;
    const Groups groups(table, num_groups, width, large_work, false);
    by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        const bool fresh = num_classes * width * static_cast<int64_t>(sizeof(Real)) >= CACHE_BYTES;
        each_group(groups, width, Forward<Real>{as(hidden), as(weight), as(bias), slots, as(residual), as(log_prob),
                                                as(slope), slope_is_new != 0, width, fresh});
    });
    return 0;
}

LASTLAYER_KERNEL(grouped_softmax_backward)
(const int64_t* table, int64_t num_groups, int64_t large_work, int64_t compact, const void* hidden, const void* residual,
 const void* scale, void* of_weight, void* of_bias, int64_t num_rows, int64_t width, int64_t in_float64) {
    using namespace lastlayer;
    const Groups groups(table, num_groups, width, large_work, compact != 0);
    by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        const bool streamed = better_streamed(of_weight, num_rows, width * static_cast<int64_t>(sizeof(Real)));
        each_group(groups, width, Backward<Real>{as(hidden), as(residual), as(scale), as(of_weight), as(of_bias), width,
                                                 streamed});
    });
    return 0;
}
