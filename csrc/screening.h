// A screen, a query of it, and what the stages of a query hand to each other.
//
// The plain twins are lastlayer/screening/screen.py (candidates, certificate, normaliser) and the previews' own
// `scores`. `Screen` and `Query` are 8-byte numbers in the order in which lastlayer/kernels/screening.py packs them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace lastlayer {

constexpr int64_t BLOCK = 64;  // classes that one summary is of
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr double MODERATE = 1e30;  // up to here nothing overflows float32, with 10^8 to spare

enum Status : uint8_t { DONE = 0, DENSE = 1, OVERFLOWS = 2 };  // DENSE: too much is in play; the full layer has to run
enum PreviewKind : int64_t { INT8_ROWS = 0, INT4_ROWS = 1, FLOAT_COLUMNS = 2 };
enum NumberType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Screen {  // all that stays the same between queries
    int64_t classes, width;
    int64_t weight_type;
    const void* weight;         // (classes, width)
    const float* bias;          // (classes,); -inf bars a class
    int64_t terms;              // of the error bound
    const float* of_classes;    // (terms, classes)
    const float* of_blocks;     // (terms, blocks): the largest of each block
    const double* limits;       // (terms + 2,): the largest of each term, of the rows' norms, of the finite |bias|
    int64_t preview;            // PreviewKind
    const void* rows;           // INT8: (padded classes, rows_width); INT4: codes; FLOAT_COLUMNS: (rows_width, classes)
    int64_t columns_type;       // of FLOAT_COLUMNS
    const float* scale;         // (classes,), of integer rows
    int64_t rows_width;         // padded; both are multiplied with a vector of so many coordinates
    int64_t rotated;            // coordinates of the rotated hidden state; 0: the hidden state itself is multiplied
    const void* rotation;       // (rotated, width): float64; of INT4 float32 or bfloat16
    int64_t rotation_type;      // of INT4
    int64_t tail;               // rows of `rotated_tail`; 0 with INT4
    const float* rotated_tail;  // (tail, width): the coordinates that the preview leaves out
    int64_t fine;               // of INT4: coordinates with 8 bits
    const float* unbalance;     // of INT4: (rotated,)
    const double* rounding;     // what rounding adds to the rows' part of the bound: (2,), or of INT4 (3,)
};

struct Query {
    int64_t count, k, candidates, exact;
    const float* hidden;      // (count, width)
    float* log_prob;          // (count, k) out
    int64_t* indices;         // (count, k) out; -1 where fewer than k classes are left
    uint8_t* certified;       // (count,) out
    double* log_normalizer;   // (count,) out
    uint8_t* status;          // (count,) out
    float* scores;            // (count, classes) out: the scores, exact logits where these were computed
    int64_t num_excluded;
    const int64_t* excluded;  // (count, num_excluded) class ids that a row may not return; `classes` in unused places
    const uint8_t* barred;    // (classes,), whether no row may return the class; null: none
    int64_t only_scores;      // whether the scores alone are wanted
    int64_t serial;           // whether to stay on one thread

    int64_t grain(int64_t count, int64_t shared) const { return serial ? std::max<int64_t>(count, 1) : shared; }
};

struct Vector {  // a hidden state as the stored rows are multiplied with it
    std::vector<int16_t> packed;  // of integer rows: whole numbers, see integer_products.h
    std::vector<float> numbers;   // of float columns
    float step = 0;
    int64_t sum = 0;  // of the whole numbers
};

struct Prepared {
    std::vector<Vector> vectors;
    std::vector<float> of_rows;  // (count, terms): the rows' part of the error bound
};

struct Summaries {  // (count, blocks): the largest score of a block of classes, and the sum of exponentials relative to it
    std::vector<float> block_max, block_sum;
};

// Of at most BLOCK scores; a block of which nothing is left (all -inf) has the sum 0.
inline void summarise_block(const float* scores, int64_t count, float& most, float& sum) {
    most = largest(scores, count, MINUS_INFINITY);
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += exp_of_negative(scores[i] - most);
    sum = most > MINUS_INFINITY ? total : 0.0f;
}

inline int64_t num_blocks(const Screen& screen) { return (screen.classes + BLOCK - 1) / BLOCK; }

// Marks a row's status OVERFLOWS where float32 might, or where a number is not finite.
Prepared prepare_hidden(const Screen& screen, const Query& query);

// The scores of all classes, and their summaries, in one pass over the stored rows.
void scan(const Screen& screen, const Query& query, const Prepared& prepared, Summaries& summaries);

// Best classes, certificate and normaliser of every row, from summarised scores.
void select(const Screen& screen, const Query& query, const Prepared& prepared, Summaries& summaries);

}  // namespace lastlayer
