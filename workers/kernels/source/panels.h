// Products of matrices, block by block: what `linear` of many rows and the attention of a prefill rest on.
//
// A panel is float [depth, PANEL]: sixteen values side by side are of different rows of what was packed, so
// that sums never have to be taken across a vector.
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

// Columns `first` to `first + depth` of `rows` rows, at most PANEL, become a panel; 0 for rows that lack.
static inline void pack_panel(const void *source, int64_t row_size, int rows, int64_t first, int depth,
                              int bf16, float *panel) {
    // A word holds two bfloat16, of which the upper half is the second.
    const int step = bf16 ? 2 * LANES : LANES, itemsize = bf16 ? 2 : 4;
    int done = 0;
    for (; done + step <= depth; done += step)
        for (int half = 0; half < PANEL; half += LANES) {
            lanes v[LANES] = {0};
            for (int i = 0; i < LANES && half + i < rows; i++)
                memcpy(&v[i], (const char *)source + ((half + i) * row_size + first + done) * itemsize, 64);
            transpose(v);
            for (int i = 0; i < LANES; i++) {
                float *out = panel + (done + (bf16 ? 2 * i : i)) * PANEL + half;
                if (bf16) {
                    const indices lower = (indices)v[i] << 16, upper = (indices)v[i] & ~0xffff;
                    memcpy(out, &lower, 64);
                    memcpy(out + PANEL, &upper, 64);
                } else {
                    memcpy(out, &v[i], 64);
                }
            }
        }
    for (; done < depth; done++)
        for (int row = 0; row < PANEL; row++) {
            const int64_t at = row * row_size + first + done;
            float value = 0;
            if (row < rows) load(source, at, 1, bf16, &value);
            panel[done * PANEL + row] = value;
        }
}

// tile [rows, PANEL] += or, from zero, = a [rows, depth] panel; strides of `a` in floats. `rows` is a
// constant, at most TILE_ROWS: so many sums stay in registers.
static inline __attribute__((always_inline)) void multiply_tile(const int rows, const float *a,
                                                                int64_t row_stride, int64_t depth_stride,
                                                                const float *panel, int64_t depth,
                                                                int from_zero, float *tile) {
    lanes sums[TILE_ROWS][2] = {0};
#pragma GCC unroll 12
    for (int r = 0; r < rows && !from_zero; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = load_lanes(tile, r * PANEL + half * LANES, 0);
    for (int64_t k = 0; k < depth; k++) {
        const lanes left = load_lanes(panel, k * PANEL, 0), right = load_lanes(panel, k * PANEL + LANES, 0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const lanes value = all(a[r * row_stride + k * depth_stride]);
            sums[r][0] += value * left;
            sums[r][1] += value * right;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) memcpy(tile + r * PANEL, sums[r], sizeof sums[r]);
}
