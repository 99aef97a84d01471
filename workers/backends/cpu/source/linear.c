#include "kernels.h"
#include "lanes.h"

// COLUMNS rows of weights times at most ROWS rows of x: as many running sums as stay in registers. A thread
// takes TILE columns at a time; while it multiplies some, it fetches those that are DISTANCE blocks ahead, in
// as many portions as there are passes over them.
#define ROWS 4
#define TILE 32
#define DISTANCE 2

// tile[r][c], TILE apart, = row r of x times row c of the weights, for `count` rows, a constant.
static inline __attribute__((always_inline)) void linear_block(const int count, const void *x, const void *weight,
                                                               int64_t size, int pass, int passes, const int bf16,
                                                               const int stored, float *tile) {
    const int step = bf16 ? 2 * LANES : LANES, itemsize = bf16 ? 2 : 4, stored_size = stored ? 2 : 4;
    const char *rows = x, *columns = weight;
    lanes sums[LANES] = {0};
    int64_t first = 0;
    for (; first + step <= size; first += step) {
        const char *ahead = columns + (COLUMNS * DISTANCE * size + first) * stored_size;
        for (int c = pass; c < COLUMNS; c += passes) __builtin_prefetch(ahead + c * size * stored_size);
        lanes words[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++)
            words[c] = load_lanes(columns + (c * size + first) * stored_size, 0, stored && !bf16);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            const lanes value = load_lanes(rows + (r * size + first) * itemsize, 0, 0);
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++)
                sums[r * COLUMNS + c] = multiply(sums[r * COLUMNS + c], value, words[c], bf16);
        }
    }
    const lanes totals = sums_of(sums);
    for (int r = 0; r < count; r++)
        for (int c = 0; c < COLUMNS; c++) tile[r * TILE + c] = totals[r * COLUMNS + c];
    if (first == size) return;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < COLUMNS; c++) {
            float left[2 * LANES], right[2 * LANES];
            load(rows + (r * size + first) * itemsize, 0, size - first, bf16, left);
            load(columns + (c * size + first) * stored_size, 0, size - first, stored, right);
            for (int64_t i = 0; i < size - first; i++) tile[r * TILE + c] += left[i] * right[i];
        }
}

// out = or, with `add`, += x weight^T + bias for few rows: weights are read once, in the order in which they
// lie.
//
// x [rows, size], weight [columns, size], bias [columns] or null, out float [rows, columns]; columns a
// multiple of COLUMNS.
void linear_rows(const void *x, const void *weight, const void *bias, float *out, int64_t rows, int64_t columns,
                 int64_t size, int add, int bf16, int stored) {
    const int passes = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < columns; first += TILE) {
        const int width = columns - first < TILE ? columns - first : TILE;
        // Rows of `out` may lie a power of two apart, so results are stored a line at a time.
        float tile[rows * TILE], offsets[TILE] = {0};
        if (bias) load(bias, first, width, stored, offsets);
        for (int column = 0; column < width; column += COLUMNS)
            for (int pass = 0; pass < passes; pass++) {
                const int64_t row = pass * ROWS;
                const void *own = (const char *)x + row * size * (bf16 ? 2 : 4);
                const void *columns_own = (const char *)weight + (first + column) * size * (stored ? 2 : 4);
                float *target = tile + row * TILE + column;
#define CASE(n, whole, half)                                                                     \
    case n:                                                                                      \
        linear_block(n, own, columns_own, size, pass, passes, whole, half, target);              \
        break;
#define CASES(whole, half)                                                                       \
    switch (rows - row < ROWS ? rows - row : ROWS) {                                             \
        CASE(1, whole, half) CASE(2, whole, half) CASE(3, whole, half) CASE(4, whole, half)      \
    }
                if (bf16) CASES(1, 1) else if (stored) CASES(0, 1) else CASES(0, 0)
            }
        for (int64_t row = 0; row < rows; row++) {
            float *own = tile + row * TILE, *to = out + row * columns + first, before[TILE] = {0};
            if (add) memcpy(before, to, sizeof(float) * width);
            for (int i = 0; i < TILE; i += LANES) {
                const lanes sum = load_lanes(own, i, 0) + load_lanes(offsets, i, 0) + load_lanes(before, i, 0);
                store_lanes(own, i, 0, sum);
            }
            memcpy(to, own, sizeof(float) * width);
        }
    }
}

void linear(const void *x, const void *weight, const void *bias, float *out, int64_t rows, int64_t columns,
            int64_t size, int bf16, int stored, int threads) {
#pragma omp parallel num_threads(threads)
    linear_rows(x, weight, bias, out, rows, columns, size, 0, bf16, stored);
}
