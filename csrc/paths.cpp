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
void forward(const int64_t* starts, const int64_t* nodes, const int8_t* signs, const Real* hidden, const Real* weight,
             Real* log_prob, Real* factors, Real* slope, int64_t num_rows, int64_t width) {
    const int64_t num_pairs = starts[num_rows];
    parallel_for(num_rows, items_a_chunk(num_rows, num_pairs, width), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            const Real* row = hidden + n * width;
            if (slope != nullptr) std::fill_n(slope + n * width, width, Real{0});
            Real total = 0;
            for (int64_t p = starts[n]; p < starts[n + 1]; ++p) {
                if (p + NODES_AHEAD < num_pairs)
                    prefetch(weight + nodes[p + NODES_AHEAD] * width, width * static_cast<int64_t>(sizeof(Real)));
                const Real* node = weight + nodes[p] * width;
                const Real sign = signs[p], score = sign * dot(row, node, width);
                const Real decay = std::exp(-std::fabs(score));
                total += std::min<Real>(score, 0) - std::log1p(decay);
                factors[p] = sign * (score > 0 ? decay : 1) / (1 + decay);  // sign * sigmoid(-score)
                if (slope != nullptr) add_1x1(slope + n * width, factors[p], node, width);
            }
            log_prob[n] = total;
        }
    });
}

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
(const int64_t* starts, const int64_t* nodes, const int8_t* signs, const void* hidden, const void* weight, void* log_prob,
 void* factors, void* slope, int64_t num_rows, int64_t width, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        lastlayer::forward(starts, nodes, signs, as(hidden), as(weight), as(log_prob), as(factors), as(slope), num_rows,
                           width);
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

// The inner nodes on the way from each class to the root, and on which side each was left: 1 first child, -1 second.
LASTLAYER_KERNEL(walk_to_root)
(const int64_t* classes, const int64_t* starts, const int64_t* parents, const int8_t* sides, int64_t num_rows,
 int64_t num_classes, int64_t* nodes, int8_t* signs) {
    for (int64_t n = 0; n < num_rows; ++n) {
        int64_t current = classes[n];
        for (int64_t p = starts[n]; p < starts[n + 1]; ++p) {
            nodes[p] = parents[current];
            signs[p] = sides[current];
            current = num_classes + parents[current];
        }
    }
    return 0;
}
