// From summarised scores to the best classes: candidates, exact logits, certificate, widening, normaliser.
//
// Every loop runs over classes, blocks or candidates once. Nothing here is NaN or +inf: `prepare_hidden` marks the
// hidden states for which a number could be.
#include <cmath>

#include "cache_hints.h"
#include "parallel.h"
#include "screening.h"

namespace lastlayer {
namespace {

constexpr int64_t EIGHTH = BLOCK / 8;  // scores that a finer maximum is of
constexpr int64_t AHEAD = 4;           // rows of the weight that are fetched before they are used
constexpr int64_t SHARED = 1 << 17;    // numbers of the weight that one thread reads before others help
constexpr int64_t MOST_WIDENED = 4;    // the full layer runs where more than one class in so many is in play

struct Scored {
    float value;
    int32_t id;
};

bool is_better(const Scored& one, const Scored& other) {
    return one.value > other.value || (one.value == other.value && one.id < other.id);
}

struct Row {  // the scores of one hidden state
    const Screen& screen;
    const Query& query;
    const float* hidden;
    float* scores;     // -inf where a class was set aside
    float* block_max;  // the largest score of each block, -inf where all were set aside
    float* block_sum;
    const float* of_row;  // (terms,)
    bool parallel;        // whether other threads may help

    int64_t end_of(int64_t block) const { return std::min((block + 1) * BLOCK, screen.classes); }
};

// A score that at least `count` classes reach (-inf where there are fewer), and not many more.
//
// The count-th largest of maxima over disjoint sets of classes is one: so many sets hold a class that reaches it.
float threshold(const Row& row, int64_t count) {
    const int64_t classes = row.screen.classes, blocks = num_blocks(row.screen);
    if (count >= classes) return MINUS_INFINITY;
    std::vector<float> maxima;
    if (2 * count <= blocks) {
        maxima.assign(row.block_max, row.block_max + blocks);
    } else {
        const int64_t size = 2 * count * EIGHTH <= classes ? EIGHTH : 1;
        for (int64_t first = 0; first < classes; first += size)
            maxima.push_back(largest(row.scores + first, std::min(size, classes - first), MINUS_INFINITY));
    }
    const auto place = maxima.begin() + (count - 1);
    std::nth_element(maxima.begin(), place, maxima.end(), [](float a, float b) { return a > b; });
    return *place;
}

// The blocks whose bound reaches `least`.
std::vector<int32_t> blocks_reaching(const float* bounds, int64_t blocks, float least) {
    std::vector<int32_t> found;
    for (int64_t block = 0; block < blocks; ++block)
        if (bounds[block] >= least) found.push_back(static_cast<int32_t>(block));
    return found;
}

// Of the `count` classes from `first` on those whose `bounds` reach `least`, with their scores, unless these are -inf.
void collect_reaching(const Row& row, int64_t first, int64_t count, const float* bounds, float least, std::vector<Scored>& found) {
    for (int64_t start = 0; start < count; start += EIGHTH) {
        const int64_t end = std::min(start + EIGHTH, count);
        bool any = false;
        for (int64_t i = start; i < end; ++i) any |= bounds[i] >= least;
        if (!any) continue;
        for (int64_t i = start; i < end; ++i)
            if (bounds[i] >= least && row.scores[first + i] > MINUS_INFINITY)
                found.push_back({row.scores[first + i], static_cast<int32_t>(first + i)});
    }
}

// The `count` best scores that are above -inf, in no order.
std::vector<Scored> choose(const Row& row, int64_t count) {
    const float least = threshold(row, count);
    std::vector<Scored> found;
    for (const int64_t block : blocks_reaching(row.block_max, num_blocks(row.screen), least)) {
        const int64_t first = block * BLOCK;
        collect_reaching(row, first, row.end_of(block) - first, row.scores + first, least, found);
    }
    if (static_cast<int64_t>(found.size()) > count) {
        std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), is_better);
        found.resize(static_cast<size_t>(count));
    }
    return found;
}

template <class Number>
float exact_logit(const Row& row, int64_t id) {
    constexpr int64_t SUMS = 64;  // apart, so that additions do not wait for each other
    const int64_t width = row.screen.width, whole = width / SUMS * SUMS;
    const Number* weight = static_cast<const Number*>(row.screen.weight) + id * width;
    const float* hidden = row.hidden;
    float sums[SUMS] = {}, total = 0;
    for (int64_t j = 0; j < whole; j += SUMS)
#pragma omp simd
        for (int64_t n = 0; n < SUMS; ++n) sums[n] += load(weight[j + n]) * hidden[j + n];
    for (int64_t j = whole; j < width; ++j) total += load(weight[j]) * hidden[j];
#pragma omp simd reduction(+ : total)
    for (int64_t n = 0; n < SUMS; ++n) total += sums[n];
    return total + row.screen.bias[id];
}

float exact_logit(const Row& row, int64_t id) {
    switch (row.screen.weight_type) {
        case BFLOAT16: return exact_logit<bfloat16>(row, id);
        case FLOAT16: return exact_logit<float16>(row, id);
        default: return exact_logit<float>(row, id);
    }
}

// The same classes with their exact logits.
std::vector<Scored> rescored(const Row& row, const std::vector<Scored>& classes) {
    std::vector<Scored> exact(classes);
    const auto count = static_cast<int64_t>(exact.size());
    const int64_t bytes = row.screen.width * (row.screen.weight_type == FLOAT32 ? 4 : 2);
    const int64_t grain = row.parallel ? std::max<int64_t>(1, SHARED / 2 / row.screen.width) : std::max<int64_t>(count, 1);
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            if (n + AHEAD < end)
                prefetch(static_cast<const char*>(row.screen.weight) + exact[static_cast<size_t>(n + AHEAD)].id * bytes, bytes);
            Scored& one = exact[static_cast<size_t>(n)];
            one.value = exact_logit(row, one.id);
        }
    });
    return exact;
}

// Takes classes out of the scores and out of the summaries of their blocks.
void set_aside(const Row& row, const std::vector<Scored>& classes) {
    const int64_t blocks = num_blocks(row.screen);
    std::vector<uint8_t> changed(static_cast<size_t>(blocks));
    for (const Scored& one : classes) {
        row.scores[one.id] = MINUS_INFINITY;
        changed[static_cast<size_t>(one.id / BLOCK)] = 1;
    }
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * BLOCK;
        if (changed[static_cast<size_t>(block)])
            summarise_block(row.scores + first, row.end_of(block) - first, row.block_max[block], row.block_sum[block]);
    }
}

// The blocks in which a logit could reach `kth`.
std::vector<int32_t> blocks_in_play(const Row& row, float kth) {
    const Screen& screen = row.screen;
    const int64_t blocks = num_blocks(screen);
    std::vector<float> upper(row.block_max, row.block_max + blocks);
    for (int64_t m = 0; m < screen.terms; ++m) {
        const float share = row.of_row[m], *of_blocks = screen.of_blocks + m * blocks;
#pragma omp simd
        for (int64_t block = 0; block < blocks; ++block) upper[static_cast<size_t>(block)] += share * of_blocks[block];
    }
    return blocks_reaching(upper.data(), blocks, kth);
}

// The classes, not set aside, whose logit could reach `kth`; false where they are more than `limit`.
bool find_in_play(const Row& row, float kth, int64_t limit, std::vector<Scored>& found) {
    const Screen& screen = row.screen;
    for (const int64_t block : blocks_in_play(row, kth)) {
        const int64_t first = block * BLOCK, count = row.end_of(block) - first;
        float upper[BLOCK];
        std::copy(row.scores + first, row.scores + first + count, upper);
        for (int64_t m = 0; m < screen.terms; ++m) {
            const float share = row.of_row[m], *of_classes = screen.of_classes + m * screen.classes + first;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) upper[i] += share * of_classes[i];
        }
        collect_reaching(row, first, count, upper, kth, found);
        if (static_cast<int64_t>(found.size()) > limit) return false;
    }
    return true;
}

// Of the classes that were not set aside and of those that were.
double log_sum_exp(const Row& row, const std::vector<Scored>& exact, const std::vector<Scored>& barred) {
    const int64_t blocks = num_blocks(row.screen);
    float most = largest(row.block_max, blocks, MINUS_INFINITY);
    for (const auto* part : {&exact, &barred})
        for (const Scored& one : *part) most = std::max(most, one.value);
    if (most == MINUS_INFINITY) return most;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t block = 0; block < blocks; ++block)
        total += static_cast<double>(row.block_sum[block] * exp_of_negative(row.block_max[block] - most));
    for (const auto* part : {&exact, &barred}) {
        for (const Scored& one : *part) total += static_cast<double>(exp_of_negative(one.value - most));
    }
    return most + std::log(total);  // in float64, as the logits may be large
}

// The classes that this row may not return, with their scores, set aside; those whose score is -inf are left out.
std::vector<Scored> bar_classes(const Row& row, int64_t number) {
    const int64_t classes = row.screen.classes, count = row.query.num_excluded, *ids = row.query.excluded + number * count;
    std::vector<Scored> barred;
    const auto bar = [&](int64_t id) {
        float& score = row.scores[id];
        if (score > MINUS_INFINITY) barred.push_back({score, static_cast<int32_t>(id)});
        score = MINUS_INFINITY;
    };
    if (row.query.barred != nullptr)
        for (int64_t i = 0; i < classes; ++i)
            if (row.query.barred[i]) bar(i);
    for (int64_t n = 0; n < count; ++n)
        if (ids[n] >= 0 && ids[n] < classes) bar(ids[n]);
    if (!barred.empty()) set_aside(row, barred);
    return barred;
}

// Those of `some` that are among the `count` best of `some` and `others` come first; their number.
std::ptrdiff_t best_first(std::vector<Scored>& some, std::vector<Scored> others, int64_t count) {
    others.insert(others.end(), some.begin(), some.end());
    if (static_cast<int64_t>(others.size()) <= count) return static_cast<std::ptrdiff_t>(some.size());
    const auto place = others.begin() + (count - 1);
    std::nth_element(others.begin(), place, others.end(), is_better);
    const auto rest = std::partition(some.begin(), some.end(), [&](const Scored& one) { return !is_better(*place, one); });
    return rest - some.begin();
}

struct Candidates {
    std::vector<Scored> permitted, barred;  // exact logits; of the barred classes that are not among the best, scores
};

// The candidates among the classes that the row may return, and its barred classes; both are set aside.
//
// Barred classes are set aside first, so they take no candidate's place and leave no block's maximum too high. The
// normaliser depends on the best of all classes: the barred ones among them get exact logits too.
Candidates candidates_of(const Row& row, int64_t number) {
    const int64_t count = row.query.candidates;
    std::vector<Scored> barred = bar_classes(row, number);
    std::vector<Scored> chosen = choose(row, count);
    set_aside(row, chosen);
    if (barred.empty()) return {rescored(row, chosen), {}};
    const auto permitted = chosen.size();
    const auto among_best = best_first(barred, chosen, count);
    chosen.insert(chosen.end(), barred.begin(), barred.begin() + among_best);
    std::vector<Scored> exact = rescored(row, chosen);
    std::copy(exact.begin() + static_cast<std::ptrdiff_t>(permitted), exact.end(), barred.begin());
    exact.resize(permitted);
    return {exact, barred};
}

float kth_best(std::vector<Scored> found, int64_t k) {
    if (static_cast<int64_t>(found.size()) < k) return MINUS_INFINITY;
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), is_better);
    return found[static_cast<size_t>(k - 1)].value;
}

void write_best(const Query& query, int64_t number, std::vector<Scored> found, double log_normalizer) {
    const int64_t k = query.k, there = std::min<int64_t>(k, static_cast<int64_t>(found.size()));
    std::partial_sort(found.begin(), found.begin() + there, found.end(), is_better);
    float* log_prob = query.log_prob + number * k;
    int64_t* indices = query.indices + number * k;
    for (int64_t n = 0; n < k; ++n) {
        const bool is_class = n < there && found[static_cast<size_t>(n)].value > MINUS_INFINITY;
        log_prob[n] = is_class ? static_cast<float>(found[static_cast<size_t>(n)].value - log_normalizer) : MINUS_INFINITY;
        indices[n] = is_class ? found[static_cast<size_t>(n)].id : -1;
    }
    query.log_normalizer[number] = log_normalizer;
}

void put_back(const Row& row, const std::vector<Scored>& classes) {
    for (const Scored& one : classes) row.scores[one.id] = one.value;
}

Status select_row(const Row& row, int64_t number) {
    const Query& query = row.query;
    auto [exact, barred] = candidates_of(row, number);
    std::vector<Scored> in_play;
    const int64_t limit = query.exact ? row.screen.classes / MOST_WIDENED : 0;
    const bool within = find_in_play(row, kth_best(exact, query.k), limit, in_play);
    if (query.exact && !within) return DENSE;
    if (query.exact && !in_play.empty()) {
        const std::vector<Scored> more = rescored(row, in_play);
        set_aside(row, in_play);
        exact.insert(exact.end(), more.begin(), more.end());
    }
    query.certified[number] = within;
    write_best(query, number, exact, log_sum_exp(row, exact, barred));
    put_back(row, exact);
    put_back(row, barred);
    return DONE;
}

}  // namespace

void select(const Screen& screen, const Query& query, const Prepared& prepared, Summaries& summaries) {
    const int64_t blocks = num_blocks(screen);
    const bool alone = query.count == 1 && !query.serial;
    parallel_for(query.count, query.grain(query.count, 1), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            if (query.status[n] != DONE) continue;
            const Row row{screen, query, query.hidden + n * screen.width, query.scores + n * screen.classes,
                          summaries.block_max.data() + n * blocks, summaries.block_sum.data() + n * blocks,
                          prepared.of_rows.data() + n * screen.terms, alone};
            query.status[n] = select_row(row, n);
        }
    });
}

}  // namespace lastlayer
