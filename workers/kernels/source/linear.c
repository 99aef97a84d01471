#include "kernels.h"
#include "lanes.h"

// Two rows of weights times `count` rows of x, at most ROWS: sixteen running sums that stay in registers.
// The results go to the first two columns of `tile`, float [count, TILE].
#define COLUMNS 2
#define ROWS 8
#define TILE 32
// Bytes of weights that are fetched before they are used.
#define AHEAD 4096
static inline __attribute__((always_inline)) void linear_block(const float *x, const void *weight,
                                                               int64_t column, int64_t size, int count,
                                                               int stored, float *tile) {
    lanes sums[LANES] = {0};
    int64_t first = 0;
    for (; first + LANES <= size; first += LANES) {
        lanes w[COLUMNS];
        // The processor's own prefetching stops at the end of each page.
        __builtin_prefetch((const char *)weight + (column * size + COLUMNS * first) * (stored ? 2 : 4) + AHEAD);
        for (int c = 0; c < COLUMNS; c++) w[c] = load_lanes(weight, (column + c) * size + first, stored);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            lanes value = load_lanes(x, r * size + first, 0);
            for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] += value * w[c];
        }
    }
    lanes totals = sums_of(sums);
    for (int r = 0; r < count; r++)
        for (int c = 0; c < COLUMNS; c++) {
            float total = totals[r * COLUMNS + c];
            for (int64_t i = first; i < size; i++) {
                int64_t at = (column + c) * size + i;
                float w = stored ? widen(((const uint16_t *)weight)[at]) : ((const float *)weight)[at];
                total += x[r * size + i] * w;
            }
            tile[r * TILE + c] = total;
        }
}

// out = x weight^T + bias for few rows: weights are read once, in the order in which they lie.
//
// x float [rows, size], weight [columns, size], bias [columns] or null, out float [rows, columns]; columns
// even.
void linear(const float *x, const void *weight, const void *bias, float *out, int64_t rows,
            int64_t columns, int64_t size, int stored, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < columns; first += TILE) {
        int width = columns - first < TILE ? columns - first : TILE;
        // Rows of `out` may lie a power of two apart, so results are stored a line at a time.
        float tile[rows * TILE], offsets[TILE] = {0};
        if (bias) load(bias, first, width, stored, offsets);
        for (int column = 0; column < width; column += COLUMNS)
            for (int64_t row = 0; row < rows; row += ROWS) {
                const float *own = x + row * size;
                float *target = tile + row * TILE + column;
#define CASE(n, half)                                                              \
    case n:                                                                        \
        linear_block(own, weight, first + column, size, n, half, target);          \
        break;
#define CASES(half)                                                                \
    switch (rows - row < ROWS ? rows - row : ROWS) {                               \
        CASE(1, half) CASE(2, half) CASE(3, half) CASE(4, half)                    \
        CASE(5, half) CASE(6, half) CASE(7, half) CASE(8, half)                    \
    }
                if (stored) CASES(1) else CASES(0)
            }
        for (int64_t row = 0; row < rows; row++) {
            for (int i = 0; i < width; i++) tile[row * TILE + i] += offsets[i];
            memcpy(out + row * columns + first, tile + row * TILE, sizeof(float) * width);
        }
    }
}
