#include "kernels.h"
#include "lanes.h"

// Query heads that share the loads of a key.
#define TOGETHER 3

// Sixteen codes, of a byte each.
static inline indices load_codes(const uint8_t *source) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes codes;
    memcpy(&codes, source, sizeof codes);
    return __builtin_convertvector(codes, indices);
}

// logits[g * stride + t] of `heads` query heads of one KV head, a constant, and the keys t of one row of the index,
// which have `bits` bits a value, a constant. Groups of 8 / bits keys share bytes, `channels` for a group.
static inline __attribute__((always_inline)) void score_row(const int heads, const int bits, const uint8_t *row,
                                                            int64_t channels, const float *query, int head_size,
                                                            float *logits, int64_t stride) {
    const int group = 8 / bits, mask = (1 << bits) - 1;
    lanes sums[TOGETHER][KEYS_PER_ROW] = {0};
    for (int key = 0; key < KEYS_PER_ROW; key += group, row += channels)
        for (int at = 0; at < head_size; at += LANES) {
            const indices codes = load_codes(row + at);
            lanes asked[TOGETHER];
#pragma GCC unroll 3
            for (int g = 0; g < heads; g++) asked[g] = load_lanes(query + g * head_size + at, 0, 0);
#pragma GCC unroll 4
            for (int k = 0; k < group; k++) {
                const lanes code = __builtin_convertvector((codes >> (bits * k)) & mask, lanes);
#pragma GCC unroll 3
                for (int g = 0; g < heads; g++) sums[g][key + k] += asked[g] * code;
            }
        }
#pragma GCC unroll 3
    for (int g = 0; g < heads; g++) store_lanes(logits + g * stride, 0, 0, sums_of(sums[g]));
}

// What tokens would get of whose keys there is an index alone: see SpilledKeys for its layout.
//
// query [sequences, heads, head_size], head_size a multiple of 16; counts [sequences], keys of each; logits: scratch,
// float [sequences, heads, width], width a multiple of 16; shares: float [sequences, width], summed over heads, -1
// beyond a sequence's keys.
void indexed_shares(const void *query, const paged_cache *index, const int32_t *counts, float *logits, float *shares,
                    int64_t sequences, int64_t width, int heads, int kv_heads, int head_size, int bf16, int stored,
                    int threads) {
    const int64_t rows = width / KEYS_PER_ROW, channels = (int64_t)kv_heads * head_size;
    const int64_t row_bytes = 2 * channels * (stored ? 2 : 4), parts = (rows + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const int group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < sequences * parts; task++) {
            const int64_t sequence = task / parts, begin = task % parts * PAGE_TOKENS;
            const int64_t own_rows = (counts[sequence] + KEYS_PER_ROW - 1) / KEYS_PER_ROW;
            if (begin >= own_rows) continue;
            const int32_t *table = index->pages + sequence * index->width;
#define ROW(number) ((const char *)index->rows + (table[(number) / PAGE_TOKENS] * PAGE_TOKENS + (number) % PAGE_TOKENS) * row_bytes)
            // Behind the least of each channel, in the first row, are the steps.
            float asked[heads * head_size], steps[channels];
            load(ROW(0), channels, channels, stored, steps);
            load(query, sequence * heads * head_size, heads * head_size, bf16, asked);
            for (int head = 0; head < heads; head++)
                for (int i = 0; i < head_size; i++)
                    asked[head * head_size + i] *= steps[head / group * head_size + i] * (LOG2_E / sqrtf(head_size));
            for (int64_t row = begin; row < own_rows && row < begin + PAGE_TOKENS; row++) {
                const uint8_t *keys = (const uint8_t *)ROW(row + 1);
                for (int head = 0; head < heads;) {
                    const int left = group - head % group, count = left < TOGETHER ? left : TOGETHER;
                    float *target = logits + (sequence * heads + head) * width + row * KEYS_PER_ROW;
#define SCORE(n, bits)                                                                                             \
    score_row(n, bits, keys + head / group * head_size, channels, asked + head * head_size, head_size, target, width)
                    switch (count) {
                        case 1: if (stored) SCORE(1, 2); else SCORE(1, 4); break;
                        case 2: if (stored) SCORE(2, 2); else SCORE(2, 4); break;
                        case 3: if (stored) SCORE(3, 2); else SCORE(3, 4); break;
                    }
                    head += count;
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < sequences; sequence++) {
            const int64_t count = counts[sequence];
            float *summed = shares + sequence * width;
            memset(summed, 0, sizeof(float) * width);
            for (int head = 0; head < heads; head++) {
                float *own = logits + (sequence * heads + head) * width, best = -INFINITY, sum = 0;
                for (int64_t t = 0; t < count; t++) best = fmaxf(best, own[t]);
                for (int64_t t = 0; t < count; t += LANES)
                    store_lanes(own, t, 0, exp2_lanes(load_lanes(own, t, 0) - best));
                for (int64_t t = 0; t < count; t++) sum += own[t];
                for (int64_t t = 0; t < count; t++) summed[t] += own[t] / sum;
            }
            for (int64_t t = count; t < width; t++) summed[t] = -1;
        }
    }
}
