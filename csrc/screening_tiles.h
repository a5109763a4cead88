// The scores of a block of classes for a batch of hidden states, by tiles: what screening_scan.cpp does by vectors.
//
// The stored rows are those that vectors multiply. Rows of 8 bits are left tiles as they lie, hidden states right ones.
// Codes of 4 bits lie as right tiles do once the nibbles are separated, so there hidden states are left tiles.
#pragma once

#include <vector>

#include "integer_products.h"
#include "screening.h"
#include "tile_products.h"

namespace lastlayer {

// The number of hidden states from which tiles are faster: below, most of a tile is padding, and 4-bit codes have to be
// separated first.
inline int64_t fewest_for_tiles(int64_t preview) { return preview == INT4_ROWS ? 12 : 8; }

// Hidden states by sixteens as tiles: all high bytes of a group, then all low ones; zeros where states are lacking.
class TiledHidden {
   public:
    TiledHidden(const Screen& screen, const std::vector<Vector>& vectors)
        : count(static_cast<int64_t>(vectors.size())), steps((screen.rows_width + STEP - 1) / STEP),
          bytes(static_cast<size_t>((count + SIDE - 1) / SIDE * 2 * steps * TILE_BYTES)) {
        for (int64_t row = 0; row < count; ++row) {
            const std::vector<int16_t>& packed = vectors[static_cast<size_t>(row)].packed;
            const auto* of_codes = reinterpret_cast<const int8_t*>(packed.data());  // see pack_bytes_of_chunks
            for (int64_t low = 0; low < 2; ++low) {
                int8_t* to = part(row / SIDE, low);
                for (int64_t j = 0; j < screen.rows_width; ++j) {
                    if (screen.preview == INT4_ROWS)
                        to[row % SIDE * steps * STEP + j] = of_codes[(2 * (j / CHUNK) + low) * CHUNK + j % CHUNK];
                    else
                        to[j / 4 * 64 + row % SIDE * 4 + j % 4] = (low ? low_byte : high_byte)(packed[static_cast<size_t>(j)]);
                }
            }
        }
    }

    int64_t num_groups() const { return (count + SIDE - 1) / SIDE; }
    const int8_t* part(int64_t group, int64_t low) const { return bytes.data() + (2 * group + low) * steps * TILE_BYTES; }
    int8_t* part(int64_t group, int64_t low) { return bytes.data() + (2 * group + low) * steps * TILE_BYTES; }

    int64_t count, steps;

   private:
    std::vector<int8_t> bytes;
};

// Codes of one group of classes, a byte each, as right tiles. Bytes past the last chunk are left as they are.
inline void separate_nibbles(const uint8_t* codes, int64_t chunks, int8_t* tiles) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint8_t* from = codes + chunk * CHUNK_BYTES;
        int8_t* low = tiles + 2 * chunk * CHUNK_BYTES;
        int8_t* high = low + CHUNK_BYTES;
        for (int64_t i = 0; i < CHUNK_BYTES; ++i) {
            low[i] = static_cast<int8_t>(from[i] & 15);
            high[i] = static_cast<int8_t>(from[i] >> 4);
        }
    }
}

// store(start, row of `query`, products): of the 2 SIDE classes from `first + start` on, padded ones included, with its
// whole numbers; of 8-bit rows float, of codes int32_t.
template <class Store>
void int8_tiles(const Screen& screen, int64_t first, const TiledHidden& hidden, const Store& store) {
    const int8_t* rows = static_cast<const int8_t*>(screen.rows) + first * screen.rows_width;
    const Tiles tiles;
    TileSums sums;
    for (int64_t start = 0; start < BLOCK; start += 2 * SIDE) {
        const int8_t* left = rows + start * screen.rows_width;
        for (int64_t group = 0; group < hidden.num_groups(); ++group) {
            tiles.multiply({{left, left + SIDE * screen.rows_width}, screen.rows_width,
                            {hidden.part(group, 0), hidden.part(group, 1)}, hidden.steps}, sums);
            float products[2 * SIDE][SIDE];
            for (int64_t i = 0; i < 2 * SIDE; ++i) {
                const auto& of_class = sums[i / SIDE];
                for (int64_t h = 0; h < SIDE; ++h)
                    products[i][h] = 128.0f * static_cast<float>(of_class[0][i % SIDE][h]) + static_cast<float>(of_class[1][i % SIDE][h]);
            }
            const int64_t states = std::min(SIDE, hidden.count - group * SIDE);
            for (int64_t h = 0; h < states; ++h) {
                float of_state[2 * SIDE];
                for (int64_t i = 0; i < 2 * SIDE; ++i) of_state[i] = products[i][h];
                store(start, group * SIDE + h, of_state);
            }
        }
    }
}

template <class Store>
void int4_tiles(const Screen& screen, int64_t first, const TiledHidden& hidden, const Store& store) {
    const int64_t chunks = screen.rows_width / CHUNK, group_bytes = hidden.steps * TILE_BYTES;
    const uint8_t* codes = static_cast<const uint8_t*>(screen.rows) + first / GROUP * chunks * CHUNK_BYTES;
    std::vector<int8_t> separated(static_cast<size_t>(2 * group_bytes));
    const Tiles tiles;
    TileSums sums;
    for (int64_t start = 0; start < BLOCK; start += 2 * GROUP) {
        const int8_t* right = separated.data();
        for (int64_t pair = 0; pair < 2; ++pair)
            separate_nibbles(codes + (start / GROUP + pair) * chunks * CHUNK_BYTES, chunks, separated.data() + pair * group_bytes);
        for (int64_t group = 0; group < hidden.num_groups(); ++group) {
            tiles.multiply({{hidden.part(group, 0), hidden.part(group, 1)}, hidden.steps * STEP,
                            {right, right + group_bytes}, hidden.steps}, sums);
            const int64_t states = std::min(SIDE, hidden.count - group * SIDE);
            for (int64_t h = 0; h < states; ++h) {
                int32_t of_state[2 * GROUP];
                for (int64_t pair = 0; pair < 2; ++pair)
                    for (int64_t i = 0; i < GROUP; ++i)
                        of_state[pair * GROUP + i] = 128 * sums[0][pair][h][i] + sums[1][pair][h][i];
                store(start, group * SIDE + h, of_state);
            }
        }
    }
}

}  // namespace lastlayer
