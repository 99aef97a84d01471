#include "kernels.h"
#include "rows.h"

// Query heads that share the loads of a key, and keys that are scored together.
#define TOGETHER 3
#define KEYS LANES

// Where the index of one sequence lies.
typedef struct {
    const char *rows;
    const int32_t *table;
    int64_t row_bytes, channels;
    int scale_rows, keys_per_row;
} key_index;

static inline const char *row_of(const key_index *index, int64_t number) {
    return index->rows + (index->table[number / PAGE_TOKENS] * PAGE_TOKENS + number % PAGE_TOKENS) * index->row_bytes;
}

// Sixteen codes, of a byte each.
static inline indices load_codes(const uint8_t *source) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes codes;
    memcpy(&codes, source, sizeof codes);
    return __builtin_convertvector(codes, indices);
}

// logits[g * stride + t] of `heads` query heads of one KV head, a constant, and the keys from `first` on, a multiple
// of KEYS, which have `bits` bits a value, a constant, and begin at `offset` among the channels. Groups of 8 / bits
// keys share bytes, one of each channel for a group. Of the last row there may be less than KEYS.
INLINE void score_keys(const int heads, const int bits, const key_index *index, int64_t first, int64_t count,
                       int64_t offset, const float *query, int head_size, float *logits, int64_t stride) {
    const int group = 8 / bits, mask = (1 << bits) - 1;
    lanes sums[TOGETHER][KEYS] = {0};
    for (int key = 0; key < KEYS && first + key < count; key += group) {
        const int64_t number = first + key, inside = number % index->keys_per_row / group;
        const char *row = row_of(index, index->scale_rows + number / index->keys_per_row);
        const uint8_t *own = (const uint8_t *)row + inside * index->channels + offset;
        for (int at = 0; at < head_size; at += LANES) {
            const indices codes = load_codes(own + at);
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
                    int64_t sequences, int64_t width, int heads, int kv_heads, int head_size, int keys_per_row,
                    int scale_rows, int bf16, int threads) {
    const int64_t channels = (int64_t)kv_heads * head_size, parts = (width + CHUNK - 1) / CHUNK;
    const int group = heads / kv_heads, format = index->format;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < sequences * parts; task++) {
            const int64_t sequence = task / parts, begin = task % parts * CHUNK, count = counts[sequence];
            if (begin >= count) continue;
            const key_index own = {
                .rows = index->rows,
                .table = index->pages + sequence * index->width,
                .row_bytes = index->row_bytes,
                .channels = channels,
                .scale_rows = scale_rows,
                .keys_per_row = keys_per_row,
            };
            // Behind the least of each channel, in the first rows, are the steps: numbers of the pool's type, or of
            // bfloat16 where that has codes.
            const int scale_format = has_scale(format) ? BFLOAT16 : format;
            float asked[heads * head_size], steps[channels];
            for (int64_t i = 0; i < channels; i += LANES)
                store_lanes(steps, i, 0, load_numbers(scale_format, row_of(&own, 0), channels + i, 0));
            load(query, sequence * heads * head_size, heads * head_size, bf16, asked);
            for (int head = 0; head < heads; head++)
                for (int i = 0; i < head_size; i++)
                    asked[head * head_size + i] *= steps[head / group * head_size + i] * (LOG2_E / sqrtf(head_size));
            for (int64_t first = begin; first < count && first < begin + CHUNK; first += KEYS)
                for (int head = 0; head < heads;) {
                    const int left = group - head % group, together = left < TOGETHER ? left : TOGETHER;
                    float *target = logits + (sequence * heads + head) * width + first;
#define SCORE(n, bits)                                                                                     \
    score_keys(n, bits, &own, first, count, head / group * head_size, asked + head * head_size, head_size, \
               target, width)
                    switch (together) {
                        case 1: if (format == FLOAT32) SCORE(1, 4); else SCORE(1, 2); break;
                        case 2: if (format == FLOAT32) SCORE(2, 4); else SCORE(2, 2); break;
                        case 3: if (format == FLOAT32) SCORE(3, 4); else SCORE(3, 2); break;
                    }
                    head += together;
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
