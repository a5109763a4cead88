// The primitives of integer_products.h in plain C++.
#pragma once

namespace lastlayer {

constexpr int64_t PIECE = 8, LANES = 16;
struct Sums {
    int32_t lane[LANES];
};
using CodeSums = Sums;
struct Row {
    int16_t number[2 * LANES];
};

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { pack_bytes_of_chunks(n, width, packed); }

inline Sums no_sums() { return {}; }
inline Row load_row(const int8_t* at) {
    Row row;
    for (int j = 0; j < PIECE; ++j) row.number[j] = at[j];
    return row;
}
inline Row load_hidden(const int16_t* at) {
    Row row;
    for (int j = 0; j < PIECE; ++j) row.number[j] = at[j];
    return row;
}
inline Sums multiply_add(Sums sums, const Row& a, const Row& b) {
    for (int j = 0; j < PIECE; ++j) sums.lane[j] += int32_t{a.number[j]} * b.number[j];
    return sums;
}
inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    for (int r = 0; r < 4; ++r) {
        totals[r] = 0;
        for (int j = 0; j < PIECE; ++j) totals[r] += static_cast<float>(sums[r].lane[j]);
    }
}
inline const uint8_t* load_codes(const uint8_t* at) { return at; }
inline void store_sums(const Sums& sums, int32_t* at) { std::copy(sums.lane, sums.lane + LANES, at); }

template <int HIDDEN>
void add_chunk(const uint8_t* codes, const int16_t* const (&hidden)[HIDDEN], CodeSums (&sums)[HIDDEN]) {
    for (int h = 0; h < HIDDEN; ++h) {
        const int8_t *high = reinterpret_cast<const int8_t*>(hidden[h]), *low = high + CHUNK;
        for (int byte = 0; byte < 4; ++byte) {
            const int first = 128 * high[byte] + low[byte], second = 128 * high[byte + 4] + low[byte + 4];
            for (int lane = 0; lane < LANES; ++lane) {
                const int two = codes[4 * lane + byte];
                sums[h].lane[lane] += (two & 15) * first + (two >> 4) * second;
            }
        }
    }
}

}  // namespace lastlayer
