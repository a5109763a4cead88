// One pass over the stored rows for all hidden states: scores, summarised while they are in the first cache.
#include <type_traits>

#include "integer_products.h"
#include "parallel.h"
#include "screening.h"
#include "screening_tiles.h"

namespace lastlayer {
namespace {

constexpr int64_t SPAN = 16 * BLOCK;  // classes that a thread takes at once

#if defined(__AVX512BW__)
constexpr int TOGETHER = 4, GROUPS_ALONE = 4, GROUPS_TOGETHER = 2;  // as many as the registers hold
#elif defined(__AVX2__)
constexpr int TOGETHER = 2, GROUPS_ALONE = 2, GROUPS_TOGETHER = 2;
#else
constexpr int TOGETHER = 2, GROUPS_ALONE = 1, GROUPS_TOGETHER = 1;
#endif

struct Place {  // where the scores of one block go
    const Screen& screen;
    const Query& query;
    Summaries& summaries;
    int64_t first, count;  // classes

    float* scores(int64_t row) const { return query.scores + row * screen.classes + first; }

    void summarise(int64_t row) const {
        const int64_t at = row * num_blocks(screen) + first / BLOCK;
        summarise_block(scores(row), count, summaries.block_max[at], summaries.block_sum[at]);
    }
};

// Scores of the `count` classes of a block from `start` on, by the products of their rows with a hidden state's whole numbers.
template <class Product>
void put_scores(const Place& place, const Vector& vector, int64_t row, int64_t start, int64_t count, const Product* products) {
    const float *scale = place.screen.scale + place.first + start, *bias = place.screen.bias + place.first + start;
    float* scores = place.scores(row) + start;
    const float step = vector.step;
    const auto middle = static_cast<int32_t>(15 * vector.sum);  // codes are 0 to 15
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float number;
        if constexpr (std::is_same_v<Product, int32_t>) number = static_cast<float>(2 * products[i] - middle);
        else number = products[i];
        scores[i] = scale[i] * (step * number) + bias[i];
    }
}

// Of `HIDDEN` hidden states from `row` on.
template <int HIDDEN>
void int8_block(const Place& place, const Vector* vectors, int64_t row) {
    const Screen& screen = place.screen;
    const int8_t* rows = static_cast<const int8_t*>(screen.rows) + place.first * screen.rows_width;
    const int16_t* packed[HIDDEN];
    for (int h = 0; h < HIDDEN; ++h) packed[h] = vectors[row + h].packed.data();
    float totals[HIDDEN][BLOCK];
    for (int64_t i = 0; i < place.count; i += 4)
        multiply_rows<HIDDEN>(rows + i * screen.rows_width, screen.rows_width, packed, &totals[0][i], BLOCK);
    for (int h = 0; h < HIDDEN; ++h) put_scores(place, vectors[row + h], row + h, 0, place.count, totals[h]);
}

template <int GROUPS, int HIDDEN>
void int4_block(const Place& place, const Vector* vectors, int64_t row) {
    constexpr int64_t CLASSES = GROUPS * GROUP;
    const Screen& screen = place.screen;
    const int64_t chunks = screen.rows_width / CHUNK;
    const int16_t* packed[HIDDEN];
    for (int h = 0; h < HIDDEN; ++h) packed[h] = vectors[row + h].packed.data();
    for (int64_t start = 0; start < place.count; start += CLASSES) {
        const int64_t first = place.first + start, count = std::min(CLASSES, place.count - start);
        int32_t sums[HIDDEN][CLASSES];
        multiply_codes<GROUPS, HIDDEN>(
            static_cast<const uint8_t*>(screen.rows) + first / GROUP * chunks * CHUNK_BYTES, chunks, packed, sums);
        for (int h = 0; h < HIDDEN; ++h) put_scores(place, vectors[row + h], row + h, start, count, sums[h]);
    }
}

template <class Number>
void float_block(const Place& place, const Vector& vector, int64_t row) {
    const Screen& screen = place.screen;
    const Number* columns = static_cast<const Number*>(screen.rows) + place.first;
    float* scores = place.scores(row);
    std::copy(screen.bias + place.first, screen.bias + place.first + place.count, scores);
    int64_t j = 0;
    for (; j + 4 <= screen.rows_width; j += 4) {  // four at once: a score is loaded and stored a quarter as often
        const Number* column[4];
        for (int n = 0; n < 4; ++n) column[n] = columns + (j + n) * screen.classes;
        const float *h = vector.numbers.data() + j;
#pragma omp simd
        for (int64_t i = 0; i < place.count; ++i)
            scores[i] += (load(column[0][i]) * h[0] + load(column[1][i]) * h[1]) +
                         (load(column[2][i]) * h[2] + load(column[3][i]) * h[3]);
    }
    for (; j < screen.rows_width; ++j) {
        const Number* column = columns + j * screen.classes;
        const float h = vector.numbers[static_cast<size_t>(j)];
#pragma omp simd
        for (int64_t i = 0; i < place.count; ++i) scores[i] += load(column[i]) * h;
    }
}

void integer_block(const Place& place, const std::vector<Vector>& vectors) {
    const bool by_bytes = place.screen.preview == INT8_ROWS;
    const int64_t rows = place.query.count;
    int64_t row = 0;
    for (; row + TOGETHER <= rows; row += TOGETHER) {
        if (by_bytes) int8_block<TOGETHER>(place, vectors.data(), row);
        else int4_block<GROUPS_TOGETHER, TOGETHER>(place, vectors.data(), row);
    }
    for (; row < rows; ++row) {
        if (by_bytes) int8_block<1>(place, vectors.data(), row);
        else int4_block<GROUPS_ALONE, 1>(place, vectors.data(), row);
    }
}

// The same for all hidden states at once.
void tiled_block(const Place& place, const std::vector<Vector>& vectors, const TiledHidden& hidden) {
    const Screen& screen = place.screen;
    const auto store = [&](int64_t start, int64_t row, const auto* products) {
        put_scores(place, vectors[row], row, start, std::min(2 * SIDE, place.count - start), products);
    };
    if (screen.preview == INT8_ROWS) int8_tiles(screen, place.first, hidden, store);
    else int4_tiles(screen, place.first, hidden, store);
}

void float_span(const Place& span, const std::vector<Vector>& vectors) {
    for (int64_t row = 0; row < span.query.count; ++row) {
        const Vector& vector = vectors[static_cast<size_t>(row)];
        if (span.screen.columns_type == BFLOAT16) float_block<bfloat16>(span, vector, row);
        else float_block<float>(span, vector, row);
    }
}

}  // namespace

void scan(const Screen& screen, const Query& query, const Prepared& prepared, Summaries& summaries) {
    const bool tiled = HAS_TILES && screen.preview != FLOAT_COLUMNS && query.count >= fewest_for_tiles(screen.preview);
    const TiledHidden hidden(screen, tiled ? prepared.vectors : std::vector<Vector>{});
    parallel_for(screen.classes, query.grain(screen.classes, SPAN), [&](int64_t begin, int64_t end) {
        for (int64_t start = begin; start < end; start += SPAN) {
            const Place span{screen, query, summaries, start, std::min(SPAN, end - start)};
            if (screen.preview == FLOAT_COLUMNS) float_span(span, prepared.vectors);
            for (int64_t first = start; first < start + span.count; first += BLOCK) {
                const Place block{screen, query, summaries, first, std::min(BLOCK, start + span.count - first)};
                if (tiled) tiled_block(block, prepared.vectors, hidden);
                else if (screen.preview != FLOAT_COLUMNS) integer_block(block, prepared.vectors);
                for (int64_t row = 0; row < query.count; ++row) block.summarise(row);
            }
        }
    });
}

}  // namespace lastlayer
