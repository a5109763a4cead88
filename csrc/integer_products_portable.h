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
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { std::copy(n, n + width, packed); }

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
inline Row load_codes(const uint8_t* at) {
    Row codes;
    for (int j = 0; j < 2 * LANES; ++j) codes.number[j] = static_cast<int16_t>(at[2 * j] | at[2 * j + 1] << 8);
    return codes;
}
inline void store_sums(const Sums& sums, int32_t* at) { std::copy(sums.lane, sums.lane + LANES, at); }

template <int HIDDEN>
void add_chunk(const Row& codes, const int16_t* const (&hidden)[HIDDEN], Sums (&sums)[HIDDEN]) {
    for (int h = 0; h < HIDDEN; ++h)
        for (int place = 0; place < 4; ++place)
            for (int lane = 0; lane < LANES; ++lane) {
                const int first = static_cast<uint16_t>(codes.number[2 * lane]) >> (4 * place) & 15;
                const int second = static_cast<uint16_t>(codes.number[2 * lane + 1]) >> (4 * place) & 15;
                sums[h].lane[lane] += first * hidden[h][2 * place] + second * hidden[h][2 * place + 1];
            }
}

}  // namespace lastlayer
