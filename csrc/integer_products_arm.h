// The primitives of integer_products.h for NEON with the dot products of bytes, and with their matrix products (i8mm).
#pragma once

#include <arm_neon.h>

namespace lastlayer {

struct Sums {
    int32x4_t high, low;
};
using CodeSums = Sums;
using Row = int8x16_t;
struct HiddenBytes {
    int8x16_t runs[2];  // 16 high bytes and 16 low ones; or twice 8 high ones and 8 low ones
};
constexpr int64_t PIECE = 16, LANES = 4;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int64_t RUN = 8;  // high bytes that lie one after another, then as many low ones
#else
constexpr int64_t RUN = 16;
#endif

inline void pack_hidden(const int16_t* n, int64_t width, int16_t* packed) {
    int8_t* bytes = reinterpret_cast<int8_t*>(packed);
    for (int64_t j = 0; j < width; ++j) {
        const int64_t place = j / RUN * 2 * RUN + j % RUN;
        bytes[place] = high_byte(n[j]);
        bytes[place + RUN] = low_byte(n[j]);
    }
}
inline void pack_hidden_chunks(const int16_t* n, int64_t width, int16_t* packed) { pack_bytes_of_chunks(n, width, packed); }

inline Sums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Row load_row(const int8_t* at) { return vld1q_s8(at); }
inline HiddenBytes load_hidden(const int16_t* at) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(at);
    return {{vld1q_s8(bytes), vld1q_s8(bytes + 16)}};
}
inline Row load_codes(const uint8_t* at) { return vreinterpretq_s8_u8(vld1q_u8(at)); }
inline void store_sums(Sums sums, int32_t* at) { vst1q_s32(at, vaddq_s32(vshlq_n_s32(sums.high, 7), sums.low)); }

template <int HIDDEN>
void add_chunk(Row codes, const int16_t* const (&hidden)[HIDDEN], CodeSums (&sums)[HIDDEN]) {
    const uint8x16_t bytes = vreinterpretq_u8_s8(codes);
    const Row first = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    const Row second = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    for (int h = 0; h < HIDDEN; ++h) {
        const int8x16_t parts = vld1q_s8(reinterpret_cast<const int8_t*>(hidden[h]));
        sums[h].high = vdotq_laneq_s32(vdotq_laneq_s32(sums[h].high, first, parts, 0), second, parts, 1);
        sums[h].low = vdotq_laneq_s32(vdotq_laneq_s32(sums[h].low, first, parts, 2), second, parts, 3);
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

template <int HIDDEN>  // one instruction multiplies two rows with the high and the low bytes of a hidden state
void multiply_rows(
    const int8_t* rows, int64_t width, const int16_t* const (&hidden)[HIDDEN], float* totals, int64_t stride) {
    int32x4_t sums[HIDDEN][2];  // of two rows: high, low of the first; high, low of the second
    for (auto& own : sums) own[0] = own[1] = vdupq_n_s32(0);
    for (int64_t j = 0; j < width; j += PIECE)
        for (int pair = 0; pair < 2; ++pair) {
            const int8x16_t a = vld1q_s8(rows + 2 * pair * width + j), b = vld1q_s8(rows + (2 * pair + 1) * width + j);
            const int8x16_t first = vcombine_s8(vget_low_s8(a), vget_low_s8(b));
            const int8x16_t second = vcombine_s8(vget_high_s8(a), vget_high_s8(b));
            for (int h = 0; h < HIDDEN; ++h) {
                const HiddenBytes numbers = load_hidden(hidden[h] + j);
                sums[h][pair] = vmmlaq_s32(vmmlaq_s32(sums[h][pair], first, numbers.runs[0]), second, numbers.runs[1]);
            }
        }
    for (int h = 0; h < HIDDEN; ++h)
        for (int r = 0; r < 4; ++r) {
            float parts[4];
            vst1q_f32(parts, vcvtq_f32_s32(sums[h][r / 2]));
            totals[stride * h + r] = 128.0f * parts[r % 2 * 2] + parts[r % 2 * 2 + 1];
        }
}

#else

inline Sums multiply_add(Sums sums, Row row, HiddenBytes hidden) {
    return {vdotq_s32(sums.high, row, hidden.runs[0]), vdotq_s32(sums.low, row, hidden.runs[1])};
}
inline void totals_of_four(const Sums (&sums)[4], float* totals) {
    for (int r = 0; r < 4; ++r)
        totals[r] = 128.0f * vaddvq_f32(vcvtq_f32_s32(sums[r].high)) + vaddvq_f32(vcvtq_f32_s32(sums[r].low));
}

#endif

}  // namespace lastlayer
