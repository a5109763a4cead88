// From summarised scores to the best classes: candidates, exact logits, certificate, widening, normaliser.
//
// Every loop runs over classes, blocks or candidates once. Nothing here is NaN or +inf: `prepare_hidden` marks the
// hidden states for which a number could be.
#include <cmath>

#include "parallel.h"
#include "screening.h"
#include "summaries.h"

namespace lastlayer {
namespace {

constexpr int64_t EIGHTH = BLOCK / 8;      // scores that a finer maximum is of
constexpr int64_t SHARED = 1 << 17;        // numbers of the weight that one thread reads before others help
constexpr int64_t MOST_WIDENED = 4;        // the full layer runs where more than one class in so many is in play
constexpr float CANCELLED = 0.05f;         // of a block's sum: less than this is left with too few digits

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
    float* block_max;  // no less than the largest score of each block
    float* block_sum;
    const float* of_row;  // (terms,); null: the scores are exact logits
    int64_t parallel;     // whether other threads may help

    int64_t end_of(int64_t block) const { return std::min((block + 1) * BLOCK, screen.classes); }
};

float count_th_largest(std::vector<float>& values, int64_t count) {
    const auto place = values.begin() + (count - 1);
    std::nth_element(values.begin(), place, values.end(), [](float a, float b) { return a > b; });
    return *place;
}

// A score that at least `count` classes reach (-inf where there are fewer), and not many more.
//
// The count-th largest of maxima over disjoint sets of classes is one: so many sets hold a class that reaches it.
float threshold(const Row& row, int64_t count) {
    const int64_t classes = row.screen.classes, blocks = num_blocks(row.screen);
    if (count >= classes) return MINUS_INFINITY;
    if (2 * count <= blocks) {
        std::vector<float> maxima(row.block_max, row.block_max + blocks);
        return count_th_largest(maxima, count);
    }
    if (2 * count * EIGHTH <= classes) {
        std::vector<float> maxima;
        maxima.reserve(static_cast<size_t>(classes / EIGHTH + 1));
        for (int64_t first = 0; first < classes; first += EIGHTH)
            maxima.push_back(largest(row.scores + first, std::min(EIGHTH, classes - first)));
        return count_th_largest(maxima, count);
    }
    std::vector<float> all(row.scores, row.scores + classes);
    return count_th_largest(all, count);
}

void collect_reaching(const Row& row, int64_t block, float least, std::vector<Scored>& found) {
    const int64_t first = block * BLOCK, count = row.end_of(block) - first;
    const float* scores = row.scores + first;
    for (int64_t start = 0; start < count; start += EIGHTH) {
        const int64_t end = std::min(start + EIGHTH, count);
        bool any = false;
        for (int64_t i = start; i < end; ++i) any |= scores[i] >= least;
        if (!any) continue;
        for (int64_t i = start; i < end; ++i)
            if (scores[i] >= least && scores[i] > MINUS_INFINITY)
                found.push_back({scores[i], static_cast<int32_t>(first + i)});
    }
}

void keep_best(std::vector<Scored>& classes, int64_t count) {
    if (static_cast<int64_t>(classes.size()) <= count) return;
    std::nth_element(classes.begin(), classes.begin() + (count - 1), classes.end(), is_better);
    classes.resize(static_cast<size_t>(count));
}

// The `count` best scores that are above -inf, in no order.
std::vector<Scored> choose(const Row& row, int64_t count) {
    const float least = threshold(row, count);
    std::vector<Scored> found;
    for (int64_t block = 0; block < num_blocks(row.screen); ++block)
        if (row.block_max[block] >= least) collect_reaching(row, block, least, found);
    keep_best(found, count);
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

void fetch_row(const Row& row, int64_t id) {  // rows lie anywhere, so the processor does not foresee the next one
    constexpr int64_t LINE = 64;
    const int64_t bytes = row.screen.width * (row.screen.weight_type == FLOAT32 ? 4 : 2);
    const char* at = static_cast<const char*>(row.screen.weight) + id * bytes;
    for (int64_t j = 0; j < bytes; j += LINE) __builtin_prefetch(at + j);
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
    const int64_t grain = row.parallel ? std::max<int64_t>(1, SHARED / 2 / row.screen.width) : std::max<int64_t>(count, 1);
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            if (n + 1 < end) fetch_row(row, exact[static_cast<size_t>(n + 1)].id);
            Scored& one = exact[static_cast<size_t>(n)];
            one.value = exact_logit(row, one.id);
        }
    });
    return exact;
}

void summarise_again(const Row& row, int64_t block) {
    const int64_t first = block * BLOCK;
    summarise_block(row.scores + first, row.end_of(block) - first, row.block_max[block], row.block_sum[block]);
}

// Takes classes, given with their scores, out of the scores and out of the sums of their blocks. Maxima stay, as upper
// bounds, unless `exactly`.
void set_aside(const Row& row, const std::vector<Scored>& classes, bool exactly) {
    enum : uint8_t { UNTOUCHED, TOUCHED, WITHOUT_SUMMARY };
    const int64_t blocks = num_blocks(row.screen);
    const bool most = static_cast<int64_t>(classes.size()) > blocks;
    std::vector<float> left(row.block_sum, row.block_sum + blocks);
    std::vector<uint8_t> state(static_cast<size_t>(blocks));
    for (const Scored& one : classes) {
        const auto block = static_cast<size_t>(one.id / BLOCK);
        row.scores[one.id] = MINUS_INFINITY;
        if (most || (exactly && one.value >= row.block_max[block])) state[block] = WITHOUT_SUMMARY;
        if (state[block] == UNTOUCHED) state[block] = TOUCHED;
        if (state[block] == TOUCHED) left[block] -= exp(one.value - row.block_max[block]);
    }
    for (int64_t block = 0; block < blocks; ++block) {
        const auto n = static_cast<size_t>(block);
        if (state[n] == UNTOUCHED) continue;
        if (state[n] == WITHOUT_SUMMARY || left[n] < CANCELLED * row.block_sum[n]) summarise_again(row, block);
        else row.block_sum[n] = left[n];
    }
}

// The classes, not set aside, whose logit could reach `kth`; false where they are more than `limit`.
bool find_in_play(const Row& row, float kth, int64_t limit, std::vector<Scored>& found) {
    const Screen& screen = row.screen;
    const int64_t blocks = num_blocks(screen);
    for (int64_t block = 0; block < blocks; ++block) {
        float most = row.block_max[block];
        for (int64_t m = 0; m < screen.terms; ++m) most += row.of_row[m] * screen.of_blocks[m * blocks + block];
        if (most < kth) continue;
        const int64_t first = block * BLOCK, count = row.end_of(block) - first;
        float upper[BLOCK];
        std::copy(row.scores + first, row.scores + first + count, upper);
        for (int64_t m = 0; m < screen.terms; ++m) {
            const float share = row.of_row[m], *of_classes = screen.of_classes + m * screen.classes + first;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) upper[i] += share * of_classes[i];
        }
        if (largest(upper, count) < kth) continue;
        for (int64_t i = 0; i < count; ++i)
            if (upper[i] >= kth && row.scores[first + i] > MINUS_INFINITY)
                found.push_back({row.scores[first + i], static_cast<int32_t>(first + i)});
        if (static_cast<int64_t>(found.size()) > limit) return false;
    }
    return true;
}

// Of the classes that were not set aside and of those that were.
double log_sum_exp(const Row& row, const std::vector<Scored>& exact, const std::vector<Scored>& barred) {
    const int64_t blocks = num_blocks(row.screen);
    float most = largest(row.block_max, blocks);
    for (const auto* part : {&exact, &barred})
        for (const Scored& one : *part) most = std::max(most, one.value);
    if (most == MINUS_INFINITY) return most;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t block = 0; block < blocks; ++block)
        total += static_cast<double>(row.block_sum[block] * exp(row.block_max[block] - most));
    for (const auto* part : {&exact, &barred}) {
        const auto count = static_cast<int64_t>(part->size());
#pragma omp simd reduction(+ : total)
        for (int64_t n = 0; n < count; ++n) total += static_cast<double>(exp((*part)[static_cast<size_t>(n)].value - most));
    }
    return most + std::log(total);  // in float64, as the logits may be large
}

// The classes that this row may not return, with their scores, which become -inf; those that are -inf are left out.
std::vector<Scored> bar_classes(const Row& row, int64_t number) {
    std::vector<Scored> barred;
    const auto bar = [&](int64_t id) {
        float& score = row.scores[id];
        if (score > MINUS_INFINITY) barred.push_back({score, static_cast<int32_t>(id)});
        score = MINUS_INFINITY;
    };
    if (row.query.barred != nullptr)
        for (int64_t i = 0; i < row.screen.classes; ++i)
            if (row.query.barred[i]) bar(i);
    for (int64_t n = 0; n < row.query.num_excluded; ++n) {
        const int64_t id = row.query.excluded[number * row.query.num_excluded + n];
        if (id >= 0 && id < row.screen.classes) bar(id);
    }
    return barred;
}

void rescore_barred(const Row& row, const std::vector<Scored>& some, std::vector<Scored>& barred) {
    if (some.empty()) return;
    const auto before = [](const Scored& a, const Scored& b) { return a.id < b.id; };
    std::sort(barred.begin(), barred.end(), before);
    for (const Scored& one : rescored(row, some)) std::lower_bound(barred.begin(), barred.end(), one, before)->value = one.value;
}

struct Candidates {
    std::vector<Scored> permitted, barred;  // with their scores; of the barred ones those among the best exact logits
};

// The candidates among the classes that the row may return, and the barred classes; both are set aside. The normaliser
// hangs on the best of all classes, so that barred ones among them need exact logits too.
Candidates candidates_of(const Row& row, int64_t number) {
    const int64_t count = row.query.candidates, excluded = row.query.num_excluded;
    const bool exactly = row.query.exact != 0, few = row.query.barred == nullptr && excluded <= count;
    std::vector<Scored> best = choose(row, few ? count + excluded : count);  // enough for both, or for those barred
    if (excluded == 0 && row.query.barred == nullptr) {
        set_aside(row, best, exactly);
        return {best, {}};
    }
    if (static_cast<int64_t>(best.size()) > count)
        std::nth_element(best.begin(), best.begin() + (count - 1), best.end(), is_better);
    Candidates found;
    found.barred = bar_classes(row, number);
    std::vector<Scored> among_best;
    for (size_t n = 0; n < best.size(); ++n) {
        if (row.scores[best[n].id] > MINUS_INFINITY) found.permitted.push_back(best[n]);
        else if (static_cast<int64_t>(n) < count) among_best.push_back(best[n]);
    }
    if (few) {
        keep_best(found.permitted, count);
        std::vector<Scored> both(found.permitted);
        both.insert(both.end(), found.barred.begin(), found.barred.end());
        set_aside(row, both, exactly);
    } else {
        set_aside(row, found.barred, true);
        found.permitted = choose(row, count);
        set_aside(row, found.permitted, exactly);
    }
    rescore_barred(row, among_best, found.barred);
    return found;
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
    if (row.of_row == nullptr) {  // exact logits: their best
        const std::vector<Scored> barred = bar_classes(row, number);
        set_aside(row, barred, true);
        std::vector<Scored> best = choose(row, query.k);
        write_best(query, number, best, log_sum_exp(row, {}, barred));
        query.certified[number] = 1;
        put_back(row, barred);
        return DONE;
    }
    const auto [chosen, barred] = candidates_of(row, number);
    std::vector<Scored> exact = rescored(row, chosen);
    std::vector<Scored> in_play;
    const int64_t limit = query.exact ? row.screen.classes / MOST_WIDENED : 0;
    const bool within = find_in_play(row, kth_best(exact, query.k), limit, in_play);
    if (query.exact && !within) return DENSE;
    if (query.exact && !in_play.empty()) {
        const std::vector<Scored> more = rescored(row, in_play);
        set_aside(row, in_play, false);
        exact.insert(exact.end(), more.begin(), more.end());
    }
    query.certified[number] = within;
    write_best(query, number, exact, log_sum_exp(row, exact, barred));
    put_back(row, exact);
    put_back(row, barred);
    return DONE;
}

}  // namespace

void select(const Screen& screen, const Query& query, const float* of_rows, Summaries& summaries) {
    const int64_t blocks = num_blocks(screen);
    const int64_t alone = query.count == 1 && !query.serial;
    parallel_for(query.count, query.grain(query.count, 1), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            if (query.status[n] != DONE) continue;
            const Row row{screen, query, query.hidden + n * screen.width, query.scores + n * screen.classes,
                          summaries.block_max.data() + n * blocks, summaries.block_sum.data() + n * blocks,
                          of_rows == nullptr ? nullptr : of_rows + n * screen.terms, alone};
            query.status[n] = select_row(row, n);
        }
    });
}

}  // namespace lastlayer
