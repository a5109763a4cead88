// Products of 8-bit numbers by tiles, exact in 32-bit integers: sums of 16 rows with 16 columns, 64 coordinates a step.
//
// On x86-64 with AMX a tile instruction multiplies as many numbers in a cycle as sixteen of AVX-512 VNNI, once there are
// several hidden states. The portable twin runs where the engine is built with LASTLAYER_PORTABLE_TILES (`make
// test-tiles`), so that the code above it is tested on processors that have no tiles.
#pragma once

#include <cstdint>

#if defined(__AMX_INT8__)
#include <immintrin.h>
#endif

namespace lastlayer {

#if defined(__AMX_INT8__) || defined(LASTLAYER_PORTABLE_TILES)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

constexpr int64_t SIDE = 16;         // rows of a left tile, columns of a right tile
constexpr int64_t STEP = 64;         // coordinates in a tile: the bytes of a row of a left tile
constexpr int64_t TILE_BYTES = 1024;

// A left tile has SIDE rows, `stride` bytes apart; that of the next step lies STEP bytes on.
// A right tile has 64 bytes for each four coordinates: those of column 0, of column 1, ...; the next lies TILE_BYTES on.
struct TileOperands {
    const int8_t* left[2];
    int64_t stride;
    const int8_t* right[2];
    int64_t steps;
};

using TileSums = int32_t[2][2][SIDE][SIDE];  // of left[a] with right[b]: row, column

#if defined(__AMX_INT8__)

// The tiles of a thread, all of SIDE rows of 64 bytes, while this exists.
class Tiles {
   public:
    Tiles() {
        struct Configuration {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
        };
        static const Configuration configuration;
        _tile_loadconfig(&configuration);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    void multiply(const TileOperands& operands, TileSums& sums) const {
        __asm__ volatile("" ::: "memory");  // gcc's tile loads do not tell the compiler that they read memory
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < operands.steps; ++step) {
            _tile_loadd(4, operands.left[0] + step * STEP, operands.stride);
            _tile_loadd(5, operands.left[1] + step * STEP, operands.stride);
            _tile_loadd(6, operands.right[0] + step * TILE_BYTES, 64);
            _tile_loadd(7, operands.right[1] + step * TILE_BYTES, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(1, sums[0][1], 64);
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }
};

#else

class Tiles {
   public:
    void multiply(const TileOperands& operands, TileSums& sums) const {
        for (int a = 0; a < 2; ++a)
            for (int b = 0; b < 2; ++b)
                for (int64_t row = 0; row < SIDE; ++row)
                    for (int64_t column = 0; column < SIDE; ++column) {
                        int32_t sum = 0;
                        for (int64_t j = 0; j < operands.steps * STEP; ++j)
                            sum += operands.left[a][row * operands.stride + j] *
                                   operands.right[b][j / 4 * 64 + column * 4 + j % 4];
                        sums[a][b][row][column] = sum;
                    }
    }
};

#endif

}  // namespace lastlayer
