// Checks the primitives that differ between instruction sets against plain loops, without Python: for a processor that
// is emulated (`make test-arm`). On a processor that is there, tests/kernels and tests/screening do it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../integer_products.h"
#include "../screening_tiles.h"
#include "../vector_math.h"

namespace {

using namespace lastlayer;

int failures = 0;

void expect(bool holds, const char* what, int64_t at) {
    if (holds) return;
    std::printf("FAILED %s at %lld\n", what, static_cast<long long>(at));
    ++failures;
}

std::mt19937 generator(0);

int64_t drawn(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

template <int HIDDEN>
struct Hidden {  // whole numbers of 14 bits, the largest among them, as rows and as codes are multiplied with them
    explicit Hidden(int64_t width) : numbers(HIDDEN, std::vector<int16_t>(width)), rows(numbers), chunks(numbers) {
        for (int h = 0; h < HIDDEN; ++h) {
            for (int16_t& n : numbers[h]) n = static_cast<int16_t>(drawn(0, 4) ? drawn(-8128, 8128) : 8128);
            pack_hidden(numbers[h].data(), width, rows[h].data());
            pack_hidden_chunks(numbers[h].data(), width, chunks[h].data());
        }
    }
    std::vector<std::vector<int16_t>> numbers, rows, chunks;
};

template <int HIDDEN>
void check_rows(int64_t width) {
    std::vector<int8_t> rows(4 * width);
    for (int8_t& number : rows) number = static_cast<int8_t>(drawn(-127, 127));
    const Hidden<HIDDEN> hidden(width);
    const int16_t* packed[HIDDEN];
    for (int h = 0; h < HIDDEN; ++h) packed[h] = hidden.rows[h].data();
    float totals[4 * HIDDEN];
    multiply_rows<HIDDEN>(rows.data(), width, packed, totals, 4);
    for (int h = 0; h < HIDDEN; ++h)
        for (int r = 0; r < 4; ++r) {
            double exact = 0, sizes = 0;
            for (int64_t j = 0; j < width; ++j) {
                exact += double(rows[r * width + j]) * hidden.numbers[h][j];
                sizes += std::abs(double(rows[r * width + j]) * hidden.numbers[h][j]);
            }
            expect(std::abs(totals[4 * h + r] - exact) <= 1e-6 * sizes, "multiply_rows", width);
        }
}

// Coordinate j of class i. A class has four bytes of a chunk: two 16-bit words, whose nibbles belong to coordinates in pairs.
int code(const uint8_t* codes, int64_t chunks, int64_t i, int64_t j) {
    const uint8_t* four = codes + ((i / GROUP) * chunks + j / CHUNK) * CHUNK_BYTES + i % GROUP * 4;
    const int place = static_cast<int>(j % CHUNK), word = four[place % 2 * 2] | four[place % 2 * 2 + 1] << 8;
    return word >> (4 * (place / 2)) & 15;
}

template <int GROUPS, int HIDDEN>
void check_codes(int64_t chunks) {
    std::vector<uint8_t> codes(GROUPS * chunks * CHUNK_BYTES);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(drawn(0, 255));
    const Hidden<HIDDEN> hidden(CHUNK * chunks);
    const int16_t* packed[HIDDEN];
    for (int h = 0; h < HIDDEN; ++h) packed[h] = hidden.chunks[h].data();
    int32_t sums[HIDDEN][GROUPS * GROUP];
    multiply_codes<GROUPS, HIDDEN>(codes.data(), chunks, packed, sums);
    for (int h = 0; h < HIDDEN; ++h)
        for (int64_t i = 0; i < GROUPS * GROUP; ++i) {
            int64_t exact = 0;
            for (int64_t j = 0; j < CHUNK * chunks; ++j)
                exact += int64_t{code(codes.data(), chunks, i, j)} * hidden.numbers[h][j];
            expect(sums[h][i] == exact, "multiply_codes", i);
        }
}

#if !defined(__ARM_FEATURE_DOTPROD)  // where tiles run, rows of 8 bits are multiplied with whole numbers in order

// `exact(i, n)`: the product of class i with the whole numbers n.
template <class Number, class Product>
void check_tiles(PreviewKind preview, int64_t width, int64_t count, const std::vector<Number>& rows, const Product& exact) {
    Screen screen{};
    screen.classes = BLOCK, screen.rows_width = width, screen.preview = preview, screen.rows = rows.data();
    std::vector<Vector> vectors(static_cast<size_t>(count));
    std::vector<std::vector<int16_t>> numbers(vectors.size(), std::vector<int16_t>(static_cast<size_t>(width)));
    for (size_t row = 0; row < vectors.size(); ++row) {
        for (int16_t& number : numbers[row]) number = static_cast<int16_t>(drawn(-8128, 8128));
        vectors[row].packed = numbers[row];
        if (preview == INT4_ROWS) pack_bytes_of_chunks(numbers[row].data(), width, vectors[row].packed.data());
    }
    const TiledHidden hidden(screen, vectors);
    int64_t found = 0;
    const auto compare = [&](int64_t start, int64_t row, const auto* products) {
        for (int64_t i = 0; i < 2 * SIDE; ++i) {
            const double sum = exact(start + i, numbers[row]);
            expect(std::abs(products[i] - sum) <= (preview == INT4_ROWS ? 0 : 2e-7 * 128 * 8128.0 * double(width)), "tiles", start + i);
        }
        found += 2 * SIDE;
    };
    if (preview == INT4_ROWS) int4_tiles(screen, 0, hidden, compare);
    else int8_tiles(screen, 0, hidden, compare);
    expect(found == BLOCK * count, "tiles: all sums", found);
}

void check_tiles(int64_t width, int64_t count) {
    std::vector<int8_t> rows(BLOCK * width);
    for (int8_t& number : rows) number = static_cast<int8_t>(drawn(-127, 127));
    if (width % STEP == 0)
        check_tiles(INT8_ROWS, width, count, rows, [&](int64_t i, const std::vector<int16_t>& n) {
            int64_t sum = 0;
            for (int64_t j = 0; j < width; ++j) sum += int64_t{rows[i * width + j]} * n[j];
            return static_cast<double>(sum);
        });
    std::vector<uint8_t> codes(BLOCK * width / 2);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(drawn(0, 255));
    check_tiles(INT4_ROWS, width, count, codes, [&](int64_t i, const std::vector<int16_t>& n) {
        int64_t sum = 0;
        for (int64_t j = 0; j < width; ++j) sum += int64_t{code(codes.data(), width / CHUNK, i, j)} * n[j];
        return static_cast<double>(sum);
    });
}

#endif

void check_exponential() {
    for (double x = -87; x <= 0; x += 1e-3) {
        const double exact = std::exp(static_cast<double>(static_cast<float>(x)));
        const float found = exp_of_negative(static_cast<float>(x));
        expect(std::abs(found - exact) <= 2e-7 * exact, "exp_of_negative", std::lround(1e3 * x));
    }
    expect(exp_of_negative(-INFINITY) == 0 && std::isnan(exp_of_negative(NAN)), "exp_of_negative of infinity", 0);
}

}  // namespace

int main() {
    for (const int64_t width : {64, 128, 576, 4096}) {
        check_rows<1>(width);
        check_rows<2>(width);
        check_rows<4>(width);
    }
    for (const int64_t chunks : {1, 2, 9, 72}) {
        check_codes<1, 1>(chunks);
        check_codes<2, 1>(chunks);
        check_codes<1, 4>(chunks);
    }
#if !defined(__ARM_FEATURE_DOTPROD)
    for (const int64_t count : {1, 16, 21}) {
        check_tiles(64, count);
        check_tiles(72, count);
        check_tiles(640, count);
    }
#endif
    check_exponential();
    std::puts(failures ? "primitives: FAILED" : "primitives: all equal");
    return failures != 0;
}
