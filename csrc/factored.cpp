// A training pass of FactoredOutput, and its step by rows where that is far from singular.
//
// The plain twins, and the mathematics, are in lastlayer/layers/factored: step.py, state.py, record.py. Their names:
// N rows, d features, K targets a row, V classes; `reading` is Q over U, offset and total, (2 d + 2, d); `products` are
// those of the hidden states with its rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cache_hints.h"
#include "engine.h"
#include "matrix_product.h"
#include "products.h"

namespace lastlayer {
namespace {

template <class Real>
void fetch_targets(const Real* factor, const int64_t* ids, int64_t count, int64_t d) {
    for (int64_t k = 0; k < count; ++k) prefetch(factor + ids[k] * d, d * static_cast<int64_t>(sizeof(Real)));
}

template <class Real>
void read(const Real* hidden, const Real* reading, const Real* factor, const int64_t* ids, Real* products,
          double* squared_norm, double* scores, double* total, int64_t num_rows, int64_t width, int64_t d) {
    const int64_t columns = 2 * d + 2;
    fetch_targets(factor, ids, num_rows * width, d);
    multiply<Real>(num_rows, columns, d, 1, rows_of(hidden, d), rows_of(reading, d).transposed(), 0, products, columns);
    for (int64_t n = 0; n < num_rows; ++n) {
        const Real *row = products + n * columns, *mapped = row + d, *shared = row + 2 * d;
        const Real square = dot(row, hidden + n * d, d);
        squared_norm[n] = square < 0 ? 0 : square;  // NaN stays
        for (int64_t k = 0; k < width; ++k) {
            scores[n * width + k] = dot(mapped, factor + ids[n * width + k] * d, d) + shared[0];
        }
        total[n] = shared[1];
    }
}

template <class Real>
void hidden_gradient(const Real* products, const Real* reading, const Real* factor, const int64_t* ids,
                     const Real* by_score, const Real* by_norm, const Real* by_total, Real* by_hidden, Real* sparse,
                     int64_t num_rows, int64_t width, int64_t d) {
    const int64_t columns = 2 * d + 2;
    const Real *map = reading + d * d, *offset = reading + 2 * d * d, *total = offset + d;
    const Scratch<Real> sums(num_rows * d);  // Y F
    for (int64_t n = 0; n < num_rows; ++n) {
        Real* into = sums + n * d;
        std::fill_n(into, d, Real{0});
        for (int64_t k = n * width; k < (n + 1) * width; ++k) add_1x1(into, by_score[k], factor + ids[k] * d, d);
    }
    multiply<Real>(num_rows, d, d, 1, rows_of<Real>(sums, d), rows_of(map, d), 0, sparse, d);
    for (int64_t n = 0; n < num_rows; ++n) {
        const Real own = std::accumulate(by_score + n * width, by_score + (n + 1) * width, Real{0});
        Real *rest = sparse + n * d, *into = by_hidden + n * d;
        add_1x1(rest, own, offset, d);
        if (by_total != nullptr) add_1x1(rest, by_total[n], total, d);
        set_1x1(into, 2 * by_norm[n], products + n * columns, d);
        add_1x1(into, Real{1}, rest, d);
    }
}

// F -= rate Y^T X
template <class Real>
void move_targets(Real* factor, const int64_t* ids, const Real* by_score, const Real* solution, Real rate, int64_t num_rows,
                  int64_t width, int64_t d) {
    fetch_targets(factor, ids, num_rows * width, d);
    for (int64_t k = 0; k < num_rows * width; ++k) {
        add_1x1(factor + ids[k] * d, -rate * by_score[k], solution + k / width * d, d);
    }
}

// overlap += rate Y Y^T: every pair of equal ids, found by sorting them.
template <class Real>
void add_sparse_overlap(const int64_t* ids, const Real* by_score, Real rate, Real* overlap, int64_t num_rows, int64_t width) {
    std::vector<int64_t> order(num_rows * width);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (size_t first = 0, last; first < order.size(); first = last) {
        for (last = first; last < order.size() && ids[order[last]] == ids[order[first]]; ++last) {
        }
        for (size_t a = first; a < last; ++a) {
            const Real own = rate * by_score[order[a]];
            Real* row = overlap + order[a] / width * num_rows;
            for (size_t b = first; b < last; ++b) row[order[b] / width] += own * by_score[order[b]];
        }
    }
}

// (I - S)^-1 - I = S + S^2 + ... of a matrix whose powers fall as those of `size`; S is used up. As `plan` refines what
// it computes with this, which squares the error, half of the digits are enough.
template <class Real>
void sum_of_powers(Real* power, Real* sum, double size, int64_t count) {
    const Scratch<Real> next(count * count);
    const double negligible = std::sqrt(std::numeric_limits<Real>::epsilon()) / 16;
    std::copy_n(power, count * count, sum);
    for (double last = size; last * size > negligible;) {  // what is summed up so far ends with `power`, of size `last`
        multiply<Real>(count, count, count, 1, rows_of(power, count), rows_of(sum, count), 0, next, count);
        for (int64_t k = 0; k < count * count; ++k) sum[k] += next[k];
        last *= last;
        if (last * size <= negligible) return;
        multiply<Real>(count, count, count, 1, rows_of(power, count), rows_of(power, count), 0, next, count);
        std::copy_n(next.memory, count * count, power);
    }
}

// (A + A^T) / 2
template <class Real>
void make_symmetric(Real* square, int64_t d) {
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            Real &lower = square[i * d + j], &upper = square[j * d + i];
            lower = upper = (lower + upper) / 2;
        }
    }
}

// The new reading and inverse, X and the norm of S of an easy step; false where that is above `easy` or R has drifted.
template <class Real>
bool plan(const Real* hidden, const Real* products, const Real* by_hidden, const Real* sparse, const int64_t* ids,
          const Real* by_score, const Real* by_norm, const Real* by_total, const Real* reading, const Real* inverse,
          Real* new_reading, Real* new_inverse, Real* solution, double* size, Real rate, double easy, double drift_limit,
          int64_t num_rows, int64_t width, int64_t d, int64_t num_classes) {
    const int64_t n2 = num_rows * num_rows, nd = num_rows * d, columns = 2 * d + 2;
    const Matrix<Real> h = rows_of(hidden, d);
    const Scratch<Real> pull(num_rows), overlap(n2), inner(n2), response(n2), left(num_rows * columns), right(nd), rest(nd);
    for (int64_t n = 0; n < num_rows; ++n) pull[n] = 2 * rate * by_norm[n];

    // S = lr H H^T D, and its norm in the symmetric form, which bounds its eigenvalues
    multiply<Real>(num_rows, num_rows, d, 1, h, h.transposed(), 0, overlap, num_rows);
    double square = 0;
    for (int64_t n = 0; n < num_rows; ++n) {
        Real* row = overlap + n * num_rows;
        Real own = 0;
        for (int64_t m = 0; m < num_rows; ++m) {
            own += row[m] * row[m] * std::fabs(pull[m]);
            row[m] *= pull[m];
        }
        square += std::fabs(pull[n]) * own;
    }
    *size = std::sqrt(square);
    if (!(*size <= easy)) return false;

    // the update of Q, U, offset and total
    for (int64_t k = 0; k < nd; ++k) rest[k] = by_hidden[k] + sparse[k];
    multiply<Real>(num_rows, num_rows, d, 1, h, rows_of<Real>(rest, d).transposed(), 0, inner, num_rows);
    for (int64_t n = 0; n < num_rows; ++n) {
        const Real own = std::accumulate(by_score + n * width, by_score + (n + 1) * width, Real{0});
        const Real more = by_total == nullptr ? Real{0} : by_total[n];
        Real *row = inner + n * num_rows, *into = left + n * columns;
        for (int64_t m = 0; m < num_rows; ++m) row[m] *= pull[n];
        set_1x1(into, -2 * rate, by_hidden + n * d, d);
        set_1x1(into + d, -pull[n], products + n * columns + d, d + 2);
        into[2 * d] -= rate * more;
        into[2 * d + 1] -= rate * (own + static_cast<Real>(num_classes) * more);
        right[n] = own + static_cast<Real>(num_classes) / 2 * more;
    }
    add_sparse_overlap(ids, by_score, rate, inner.memory, num_rows, width);
    for (int64_t n = 0; n < num_rows && by_total != nullptr; ++n) {
        Real* row = inner + n * num_rows;
        for (int64_t m = 0; m < num_rows; ++m) row[m] += rate * (by_total[n] * right[m] + right[n] * by_total[m]);
    }
    multiply<Real>(num_rows, d, num_rows, rate, rows_of<Real>(inner, num_rows), h, 1, left, columns);
    std::copy_n(reading, columns * d, new_reading);
    multiply<Real>(columns, d, num_rows, 1, rows_of<Real>(left, columns).transposed(), h, 1, new_reading, d);
    make_symmetric(new_reading, d);

    // X, refined against the new U
    sum_of_powers<Real>(overlap.memory, response.memory, *size, num_rows);
    multiply<Real>(num_rows, d, d, 1, h, rows_of(inverse, d).transposed(), 0, right, d);
    std::copy_n(right.memory, nd, solution);
    multiply<Real>(num_rows, d, num_rows, 1, rows_of<Real>(response, num_rows), rows_of<Real>(right, d), 1, solution, d);
    std::copy_n(hidden, nd, rest.memory);
    multiply<Real>(num_rows, d, d, -1, rows_of<Real>(solution, d), rows_of<Real>(new_reading + d * d, d), 1, rest, d);
    for (int64_t n = 0; n < num_rows; ++n) {
        const double length = dot(hidden + n * d, hidden + n * d, d), missing = dot(rest + n * d, rest + n * d, d);
        if (!(missing <= length * drift_limit * drift_limit)) return false;
    }
    multiply<Real>(num_rows, num_rows, d, 1, rows_of<Real>(rest, d), h.transposed(), 0, overlap, num_rows);
    for (int64_t n = 0; n < num_rows; ++n) {
        for (int64_t m = 0; m < num_rows; ++m) overlap[n * num_rows + m] *= pull[m];
    }
    std::copy_n(solution, nd, right.memory);
    multiply<Real>(num_rows, d, d, 1, rows_of<Real>(rest, d), rows_of(inverse, d).transposed(), 1, solution, d);
    multiply<Real>(num_rows, d, num_rows, 1, rows_of<Real>(overlap, num_rows), rows_of<Real>(right, d), 1, solution, d);

    // the update of R
    for (int64_t n = 0; n < num_rows; ++n) set_1x1(right + n * d, pull[n], solution + n * d, d);
    std::copy_n(inverse, d * d, new_inverse);
    multiply<Real>(d, d, num_rows, 1, rows_of<Real>(right, d).transposed(), h, 1, new_inverse, d);
    return true;
}

}  // namespace
}  // namespace lastlayer

LASTLAYER_KERNEL(factored_read)
(const void* hidden, const void* reading, const void* factor, const int64_t* ids, void* products, double* squared_norm,
 double* scores, double* total, int64_t num_rows, int64_t width, int64_t d, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        lastlayer::read(as(hidden), as(reading), as(factor), ids, as(products), squared_norm, scores, total,
                        num_rows, width, d);
    });
    return 0;
}

LASTLAYER_KERNEL(factored_hidden_gradient)
(const void* products, const void* reading, const void* factor, const int64_t* ids, const void* by_score,
 const void* by_norm, const void* by_total, void* by_hidden, void* sparse, int64_t num_rows, int64_t width,
 int64_t d, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        lastlayer::hidden_gradient(as(products), as(reading), as(factor), ids, as(by_score), as(by_norm), as(by_total),
                                   as(by_hidden), as(sparse), num_rows, width, d);
    });
    return 0;
}

LASTLAYER_KERNEL(factored_move_targets)
(void* factor, const int64_t* ids, const void* by_score, const void* solution, double rate, int64_t num_rows,
 int64_t width, int64_t d, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        lastlayer::move_targets<Real>(as(factor), ids, as(by_score), as(solution), static_cast<Real>(rate), num_rows,
                                      width, d);
    });
    return 0;
}

// 1 where the step is easy and planned.
LASTLAYER_KERNEL(factored_plan)
(const void* hidden, const void* products, const void* by_hidden, const void* sparse, const int64_t* ids,
 const void* by_score, const void* by_norm, const void* by_total, const void* reading, const void* inverse,
 void* new_reading, void* new_inverse, void* solution, double* size, double rate, double easy, double drift_limit,
 int64_t num_rows, int64_t width, int64_t d, int64_t num_classes, int64_t in_float64) {
    return lastlayer::by_type(in_float64, [&](auto as) {
        using Real = typename decltype(as)::Real;
        return lastlayer::plan<Real>(as(hidden), as(products), as(by_hidden), as(sparse), ids, as(by_score), as(by_norm),
                                     as(by_total), as(reading), as(inverse), as(new_reading), as(new_inverse),
                                     as(solution), size, static_cast<Real>(rate), easy, drift_limit, num_rows, width, d,
                                     num_classes);
    });
}
