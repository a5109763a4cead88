// Logistic regressions along paths through a binary tree.
//
// The plain twin, and the mathematics, are in lastlayer/functional/paths.py.
#include <algorithm>
#include <cmath>

#include "cache_hints.h"
#include "engine.h"
#include "parallel.h"
#include "products.h"

namespace lastlayer {
namespace {

constexpr int64_t NODES_AHEAD = 3;  // whose rows are fetched before they are needed: they lie anywhere
constexpr int64_t WORK_A_CHUNK = 1 << 17;  // multiply-adds that a thread takes at a time

int64_t items_a_chunk(int64_t num_items, int64_t num_pairs, int64_t width) {
    return std::max<int64_t>(1, num_items * WORK_A_CHUNK / std::max<int64_t>(1, num_pairs * width));
}

template <class Real>
struct Forward {
    const int64_t *classes, *starts;  // (N,), and where the path of each begins, (N + 1,)
    const int64_t* parents;           // (2V - 1,), the inner node above each id; -1 above the root
    const int8_t* sides;              // (2V - 1,), 1 for a first child, -1 for a second
    int64_t num_classes, width;
    const Real *hidden, *weight;
    int64_t* nodes;  // (P,), the inner nodes on the way from each class to the root; out, as all that follow
    int8_t* signs;   // (P,), on which side each was left
    Real* log_prob;  // (N,)
    Real* factors;   // (P,)
    Real* slope;     // (N, d), or null

    void run(int64_t n) const {
        const int64_t begin = starts[n], end = starts[n + 1];
        for (int64_t p = begin, current = classes[n]; p < end; ++p) {
            nodes[p] = parents[current];
            signs[p] = sides[current];
            current = num_classes + parents[current];
            if (p < begin + NODES_AHEAD) fetch(p);
        }
        const Real* row = hidden + n * width;
        if (slope != nullptr) std::fill_n(slope + n * width, width, Real{0});
        Real total = 0;
        for (int64_t p = begin; p < end; ++p) {
            if (p + NODES_AHEAD < end) fetch(p + NODES_AHEAD);
            const Real* node = weight + nodes[p] * width;
            const Real sign = signs[p], score = sign * dot(row, node, width);
            const Real decay = std::exp(-std::fabs(score));
            total += std::min<Real>(score, 0) - std::log1p(decay);
            factors[p] = sign * (score > 0 ? decay : 1) / (1 + decay);  // sign * sigmoid(-score)
            if (slope != nullptr) add_1x1(slope + n * width, factors[p], node, width);
        }
        log_prob[n] = total;
    }

    void fetch(int64_t p) const { prefetch(weight + nodes[p] * width, width * static_cast<int64_t>(sizeof(Real))); }
};

template <class Real>
void backward(const int64_t* starts, const int64_t* pairs, const int64_t* rows, const Real* factors, const Real* scale,
              const Real* hidden, Real* of_weight, int64_t num_nodes, int64_t width) {
    parallel_for(num_nodes, items_a_chunk(num_nodes, starts[num_nodes], width), [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
            Real* into = of_weight + u * width;
            for (int64_t place = starts[u]; place < starts[u + 1]; ++place) {
                const int64_t pair = pairs[place], row = rows[pair];
                const Real factor = factors[pair] * scale[row];
                if (place == starts[u]) {
                    set_1x1(into, factor, hidden + row * width, width);
                } else {
                    add_1x1(into, factor, hidden + row * width, width);
                }
            }
        }
    });
}

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(paths_forward)
(const int64_t* classes, const int64_t* starts, const int64_t* parents, const int8_t* sides, int64_t num_classes,
 const void* hidden, const void* weight, int64_t* nodes, int8_t* signs, void* log_prob, void* factors, void* slope,
 int64_t num_rows, int64_t width, int64_t in_float64) {
    using namespace lastlayer;
    by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        const Forward<Real> pass{classes,    starts, parents, sides,        num_classes, width,    as(hidden),
                                 as(weight), nodes,  signs,   as(log_prob), as(factors), as(slope)};
        parallel_for(num_rows, items_a_chunk(num_rows, starts[num_rows], width), [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) pass.run(n);
        });
    });
    return 0;
}

LASTLAYER_KERNEL(paths_backward)
(const int64_t* starts, const int64_t* pairs, const int64_t* rows, const void* factors, const void* scale,
 const void* hidden, void* of_weight, int64_t num_nodes, int64_t width, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        lastlayer::backward(starts, pairs, rows, as(factors), as(scale), as(hidden), as(of_weight), num_nodes, width);
    });
    return 0;
}
