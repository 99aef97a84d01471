// Products of matrices, block by block: what the attention of a prefill rests on.
//
// A word is a float, or two bfloat16 that lie side by side (`pairs`). A panel is words [depth, PANEL]: what
// lies side by side is of different rows of what was packed, so that sums are never taken across a vector.
#pragma once

#include "lanes.h"

#define PANEL 32
#define TILE_ROWS 12

// Element [i][j] becomes [j][i]: four times, the halves of all vectors are laid out alternately.
static inline void transpose(lanes v[LANES]) {
    const indices low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
#pragma GCC unroll 4
    for (int pass = 0; pass < 4; pass++) {
        lanes next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], high);
        }
        memcpy(v, next, sizeof next);
    }
}

// `rows` rows, at most PANEL, of `depth` words each become a panel; 0 for rows that lack. `depth` is a
// multiple of 8.
static inline void pack_panel(const float *source, int64_t row_words, int rows, int depth, float *panel) {
    for (int done = 0; done < depth; done += LANES) {
        const int width = depth - done < LANES ? depth - done : LANES;
        for (int half = 0; half < PANEL; half += LANES) {
            lanes v[LANES] = {0};
            for (int i = 0; i < LANES && half + i < rows; i++)
                memcpy(&v[i], source + (half + i) * row_words + done, sizeof(float) * width);
            transpose(v);
            for (int i = 0; i < width; i++) memcpy(panel + (done + i) * PANEL + half, &v[i], sizeof v[i]);
        }
    }
}

// tile [rows, PANEL] += or, from zero, = a [rows, depth] panel; strides of `a` in words. `rows` is a constant,
// at most TILE_ROWS: so many sums stay in registers.
static inline __attribute__((always_inline)) void multiply_tile(const int rows, const float *a,
                                                                int64_t row_stride, int64_t depth_stride,
                                                                const float *panel, int64_t depth,
                                                                const int from_zero, const int pairs,
                                                                float *tile) {
    lanes sums[TILE_ROWS][2] = {0};
#pragma GCC unroll 12
    for (int r = 0; r < rows && !from_zero; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = load_lanes(tile, r * PANEL + half * LANES, 0);
    for (int64_t k = 0; k < depth; k++) {
        const lanes left = load_lanes(panel, k * PANEL, 0), right = load_lanes(panel, k * PANEL + LANES, 0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const lanes words = all_words(a + r * row_stride + k * depth_stride);
            sums[r][0] = multiply(sums[r][0], words, left, pairs);
            sums[r][1] = multiply(sums[r][1], words, right, pairs);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) store_lanes(tile, r * PANEL + half * LANES, 0, sums[r][half]);
}
