// The loss of rows of logits and, in their place, its gradient: each row while it is in cache.
//
// The plain twin, and the mathematics, are in lastlayer/kernels/softmax_rows.py. A row is taken in blocks that stay
// in the first-level cache: forward, each has exponentials and a sum relative to its own largest value.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

#include "engine.h"
#include "logit_maps.h"
#include "parallel.h"
#include "vector_math.h"

namespace lastlayer {
namespace {

struct Terms {            // of n rows over V classes
    const float* bias;    // (V,)
    const int64_t* ids;   // (n,) the target of each row
    const float* hard;    // (n,) the loss is hard (lse - f_y) + square lse^2
    const float* square;  // (n,)
    float* loss;          // (n,) out
    int64_t num_classes;
    bool form;  // whether to form the gradient; if not, rows are left as they are
};

constexpr int64_t LOGITS_A_CHUNK = 1 << 17;  // that a thread takes at a time

// The logits; returns the largest, finite even where all are -infinity.
template <class Number>
float add_bias(const Number* row, const float* bias, float* logits, int64_t count) {
    float peak = -FLT_MAX;
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < count; ++j) {
        const float logit = load(row[j]) + bias[j];
        logits[j] = logit;
        peak = logit > peak ? logit : peak;
    }
    return peak;
}

// One row after the other, by one thread.
template <class Number, class Map>
class RowPass {
   public:
    RowPass(const Terms& terms, const Map& map, PairSums* sums)
        : terms(terms),
          map(map),
          sums(sums),
          parts(static_cast<size_t>((terms.num_classes + BLOCK - 1) / BLOCK)),
          slopes(Map::HAS_SLOPES ? parts.size() : 0),
          masses(parts.size()) {}

    void run(Number* row, int64_t i) {
        const int64_t target = terms.ids[i];
        const float logit = load(row[target]) + terms.bias[target];
        double shift = -DBL_MAX, total = 0;
        each_block([&](int64_t b, int64_t start, int64_t count) {
            float* part = parts[b].at;
            const float peak = add_bias(row + start, terms.bias + start, part, count);
            masses[b] = map.forward(part, Map::HAS_SLOPES ? slopes[b].at : nullptr, count, peak);
            shift = std::max(shift, masses[b].shift);
        });
        for (const Mass& mass : masses) total += mass.sum * std::exp(mass.shift - shift);
        const double log_mass = std::log(total), normalizer = shift + log_mass;
        const double hard = terms.hard[i], square = terms.square[i];
        const double below = map.value(logit) - shift;  // first of all: a large normaliser has rounded log_mass
        terms.loss[i] = static_cast<float>(hard * (log_mass - below) + square * normalizer * normalizer);
        if (!terms.form) return;
        const double share = (hard + 2 * square * normalizer) / total;
        store(row[target], static_cast<float>(form_gradient(row, target, share, shift, hard) * map.slope(logit)));
    }

   private:
    // Row becomes `share exp(f_c - shift) f'_c`; returns `share exp(f_y - shift) - hard`, of the mapped target.
    double form_gradient(Number* row, int64_t target, double share, double shift, double hard) {
        double of_target = 0;
        each_block([&](int64_t b, int64_t start, int64_t count) {
            const float *part = parts[b].at, *slope = Map::HAS_SLOPES ? slopes[b].at : nullptr;
            Number* own = row + start;
            const float scale = static_cast<float>(share * std::exp(masses[b].shift - shift));
            const bool has_target = start <= target && target < start + count;
            if (has_target) of_target = static_cast<double>(part[target - start]) * scale - hard;
            if (sums != nullptr) add_to_sums(own, b, count, scale, has_target ? target - start : -1, of_target);
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) store(own[j], part[j] * scale * (Map::HAS_SLOPES ? slope[j] : 1.0f));
        });
        return of_target;
    }

    // With g the gradient of f: the sums of g (x - l_k) / width and of g over the logits x of each segment, whose left
    // end is l_k. The segments are found again, which costs less than to keep them.
    void add_to_sums(const Number* row, int64_t b, int64_t count, float scale, int64_t target, double of_target) {
        if constexpr (std::is_same_v<Map, Plif>) {
            Block logits, inside, gradient;
            alignas(64) int32_t segments[BLOCK];
            const float* part = parts[b].at;
            add_bias(row, terms.bias + b * BLOCK, logits.at, count);
            map.find_segments(logits.at, segments, inside.at, count);
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) gradient.at[j] = part[j] * scale;
            if (target >= 0) gradient.at[target] = static_cast<float>(of_target);
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) inside.at[j] *= gradient.at[j];
            add_pairs(sums, segments, inside.at, gradient.at, count);
        }
    }

    template <class Body>
    void each_block(const Body& body) {  // body(block, first class, number of classes)
        for (int64_t b = 0; b < static_cast<int64_t>(parts.size()); ++b)
            body(b, b * BLOCK, std::min(BLOCK, terms.num_classes - b * BLOCK));
    }

    const Terms& terms;
    const Map& map;
    PairSums* sums;  // of PLIF's segments; or null
    std::vector<Block> parts, slopes;
    std::vector<Mass> masses;
};

template <class Number, class Map>
void run_rows(Number* rows, int64_t num_rows, const Terms& terms, const Map& map) {
    const int64_t grain = std::max<int64_t>(1, LOGITS_A_CHUNK / terms.num_classes);
    parallel_for(num_rows, grain, [&](int64_t begin, int64_t end) {
        RowPass<Number, Map> pass(terms, map, nullptr);
        for (int64_t i = begin; i < end; ++i) pass.run(rows + i * terms.num_classes, i);
    });
}

// The same with PLIF's sums: one equal part of the rows a thread, so that they come in the same order every time.
template <class Number>
void run_counted(Number* rows, int64_t num_rows, const Terms& terms, const Plif& map, PairSums* sums) {
    const int64_t chunks = std::max<int64_t>(1, num_rows * terms.num_classes / LOGITS_A_CHUNK);
    const int64_t num_parts = std::min({num_threads(), num_rows, chunks});
    std::vector<std::vector<PairSums>> others(static_cast<size_t>(std::max<int64_t>(1, num_parts) - 1));
    parallel_for(num_parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
            if (part > 0) others[part - 1].resize(map.num_lines);
            RowPass<Number, Plif> pass(terms, map, part > 0 ? others[part - 1].data() : sums);
            const int64_t end = num_rows * (part + 1) / num_parts;
            for (int64_t i = num_rows * part / num_parts; i < end; ++i) pass.run(rows + i * terms.num_classes, i);
        }
    });
    for (const auto& other : others)
        for (int64_t k = 0; k < map.num_lines; ++k) {
            sums[k].first += other[k].first;
            sums[k].second += other[k].second;
        }
}

enum Kind : int64_t { IDENTITY, SIGSOFTMAX, SOFT_CAP, PLIF };  // as in lastlayer/kernels/softmax_rows.py

template <class Number>
void run(Number* rows, int64_t num_rows, const Terms& terms, int64_t kind, float first, float second,
         const Line* lines, int64_t num_lines, PairSums* sums) {
    if (kind == IDENTITY) run_rows(rows, num_rows, terms, Identity{});
    if (kind == SIGSOFTMAX) run_rows(rows, num_rows, terms, Sigsoftmax{});
    if (kind == SOFT_CAP) run_rows(rows, num_rows, terms, SoftCap{first});
    if (kind != PLIF) return;
    const Plif plif{lines, num_lines, first, second};
    if (sums == nullptr) {
        run_rows(rows, num_rows, terms, plif);
    } else {
        run_counted(rows, num_rows, terms, plif, sums);
    }
}

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(softmax_rows)
(void* rows, const float* bias, const int64_t* ids, const float* hard, const float* square, float* loss,
 int64_t num_rows, int64_t num_classes, int64_t form, int64_t in_bfloat16, int64_t kind, float first, float second,
 const lastlayer::Line* lines, int64_t num_lines, lastlayer::PairSums* sums) {
    using namespace lastlayer;
    const Terms terms{bias, ids, hard, square, loss, num_classes, form != 0};
    if (in_bfloat16) {
        run(static_cast<bfloat16*>(rows), num_rows, terms, kind, first, second, lines, num_lines, sums);
    } else {
        run(static_cast<float*>(rows), num_rows, terms, kind, first, second, lines, num_lines, sums);
    }
    return 0;
}
