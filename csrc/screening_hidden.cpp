// Hidden states made ready for the stored rows: rotated where the preview requires it, rounded to whole numbers, and
// measured: the rows' part of the error bound.
#include <cmath>

#include "integer_products.h"
#include "parallel.h"
#include "products.h"
#include "screening.h"

namespace lastlayer {
namespace {

constexpr int64_t PART = 192;  // products that are summed in float32 before they are added in float64
constexpr int64_t GRAIN = 16;  // coordinates of rotated states that a thread makes at once
constexpr float WHOLE = 8128;  // the largest whole number of a hidden state, see integer_products.h
constexpr float FINER = 16;    // 8-bit steps in a 4-bit one

double norm_of(const float* values, int64_t count) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; ++j) total += static_cast<double>(values[j]) * values[j];
    return std::sqrt(total);
}

// rotated[row * stride + i] = rotation[i] . hidden[row] for `count` rows of a rotation, PART products at a time in `Real`.
template <class Real, class Number>
void rotate(const Screen& screen, const Query& query, const void* rotation, int64_t count, float* rotated, int64_t stride) {
    const int64_t width = screen.width;
    const std::vector<Real> hidden(query.hidden, query.hidden + query.count * width);
    parallel_for(count, query.grain(count, GRAIN), [&](int64_t begin, int64_t end) {
        std::vector<Real> four(static_cast<size_t>(4 * width));  // part after part of four rows
        for (int64_t first = begin; first < end; first += 4) {
            const int64_t together = std::min<int64_t>(4, end - first);
            for (int64_t start = 0; start < width; start += PART) {
                const int64_t size = std::min(PART, width - start);
                for (int64_t n = 0; n < together; ++n) {
                    const Number* from = static_cast<const Number*>(rotation) + (first + n) * width + start;
                    Real* to = four.data() + 4 * start + n * size;
#pragma omp simd
                    for (int64_t j = 0; j < size; ++j) to[j] = load(from[j]);
                }
            }
            for (int64_t row = 0; row < query.count; ++row) {
                double totals[4] = {};
                for (int64_t start = 0; start < width; start += PART) {
                    Real sums[4];
                    dot_1x4<Real>(hidden.data() + row * width + start, four.data() + 4 * start, std::min(PART, width - start), sums);
                    for (int64_t n = 0; n < 4; ++n) totals[n] += sums[n];
                }
                for (int64_t n = 0; n < together; ++n) rotated[row * stride + first + n] = static_cast<float>(totals[n]);
            }
        }
    });
}

// Rounds to whole numbers times a step; returns the norm of what that leaves over.
double quantise(const float* numbers, int64_t count, const Screen& screen, Vector& vector) {
    float most = 0;
    for (int64_t j = 0; j < count; ++j) most = std::max(most, std::fabs(numbers[j]));
    vector.step = std::max(most / WHOLE, std::numeric_limits<float>::min());
    std::vector<int16_t> whole(static_cast<size_t>(screen.rows_width));
    double left = 0;
    for (int64_t j = 0; j < count; ++j) {
        const double exact = static_cast<double>(numbers[j]) / vector.step, nearest = std::nearbyint(exact);
        whole[static_cast<size_t>(j)] = static_cast<int16_t>(nearest);
        vector.sum += static_cast<int64_t>(nearest);
        left += (exact - nearest) * (exact - nearest);
    }
    vector.packed.resize(whole.size());
    const auto pack = screen.preview == INT4_ROWS ? pack_hidden_chunks : pack_hidden;
    pack(whole.data(), screen.rows_width, vector.packed.data());
    return std::sqrt(left) * vector.step;
}

struct Measures {
    double norm;           // of the hidden state
    double tail = 0;       // of the coordinates that the preview leaves out
    double balanced = 0;   // of INT4: of the rotated state, each coordinate in its own units
    double in_rows;        // of the vector that the rows are multiplied with
    double left_over = 0;  // of what its whole numbers leave over
};

void fill_terms(const Screen& screen, const Measures& found, float* terms) {
    const double* rounding = screen.rounding;
    int64_t n = 0;
    if (screen.preview == INT4_ROWS) {
        terms[n++] = static_cast<float>(found.balanced + rounding[0] * found.norm);
        terms[n++] = static_cast<float>(found.left_over + rounding[1] * found.norm + rounding[2] * found.in_rows);
        terms[n++] = static_cast<float>(found.norm + 1);
        return;
    }
    terms[n++] = static_cast<float>(found.in_rows);
    if (screen.preview == INT8_ROWS) terms[n++] = static_cast<float>(found.left_over);
    if (screen.rotated == 0) {
        terms[n++] = 1;
        return;
    }
    terms[n++] = static_cast<float>(found.tail + rounding[0] * found.norm);
    terms[n++] = static_cast<float>(rounding[1] * (found.norm + 1));
}

bool moderate(const Screen& screen, const Measures& found, const float* terms) {
    double most = found.norm * screen.limits[screen.terms] + screen.limits[screen.terms + 1];
    for (int64_t m = 0; m < screen.terms; ++m) most += terms[m] * screen.limits[m];
    return found.norm < MODERATE && found.in_rows < MODERATE && most < MODERATE;  // false for NaN as well
}

// From the rotated hidden state (or the hidden state itself) to the vector and the bound.
bool finish(const Screen& screen, const float* hidden, const float* rotated, Vector& vector, float* terms) {
    Measures found{};
    found.norm = norm_of(hidden, screen.width);
    std::vector<float> own;  // what the rows are multiplied with
    const float* numbers = screen.rotated ? rotated : hidden;
    int64_t count = screen.rotated ? screen.rotated : screen.width;
    if (screen.preview == INT4_ROWS) {
        own.resize(static_cast<size_t>(screen.fine + count));
        for (int64_t j = 0; j < screen.fine; ++j) own[static_cast<size_t>(j)] = numbers[j] / FINER;
        std::copy(numbers, numbers + count, own.begin() + screen.fine);
        std::vector<float> balanced(numbers, numbers + count);
        for (int64_t j = 0; j < count; ++j) balanced[static_cast<size_t>(j)] *= screen.unbalance[j];
        found.balanced = norm_of(balanced.data(), count);
        numbers = own.data();
        count += screen.fine;
    } else if (screen.tail) {
        found.tail = norm_of(rotated + screen.rotated, screen.tail);
    }
    found.in_rows = norm_of(numbers, count);
    const bool finite = found.norm < MODERATE && found.in_rows < MODERATE;
    if (screen.preview == FLOAT_COLUMNS) {
        vector.numbers.assign(static_cast<size_t>(screen.rows_width), 0);
        if (finite) std::copy(numbers, numbers + count, vector.numbers.begin());
    } else if (finite) {
        found.left_over = quantise(numbers, count, screen, vector);
    } else {
        vector.packed.assign(static_cast<size_t>(screen.rows_width), 0);
    }
    fill_terms(screen, found, terms);
    return moderate(screen, found, terms);
}

}  // namespace

Prepared prepare_hidden(const Screen& screen, const Query& query) {
    Prepared prepared;
    prepared.vectors.resize(static_cast<size_t>(query.count));
    prepared.of_rows.resize(static_cast<size_t>(query.count * screen.terms));
    const int64_t coordinates = screen.rotated ? screen.rotated + screen.tail : 0;
    std::vector<float> rotated(static_cast<size_t>(query.count * coordinates));
    if (screen.preview == INT4_ROWS) {
        const auto by_type = screen.rotation_type == BFLOAT16 ? rotate<float, bfloat16> : rotate<float, float>;
        by_type(screen, query, screen.rotation, screen.rotated, rotated.data(), coordinates);
    } else if (screen.rotated != 0) {
        rotate<double, double>(screen, query, screen.rotation, screen.rotated, rotated.data(), coordinates);
        rotate<float, float>(screen, query, screen.rotated_tail, screen.tail, rotated.data() + screen.rotated, coordinates);
    }
    parallel_for(query.count, query.grain(query.count, 4), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const bool fits = finish(screen, query.hidden + row * screen.width, rotated.data() + row * coordinates,
                                     prepared.vectors[static_cast<size_t>(row)], prepared.of_rows.data() + row * screen.terms);
            query.status[row] = fits ? DONE : OVERFLOWS;
        }
    });
    return prepared;
}

}  // namespace lastlayer
