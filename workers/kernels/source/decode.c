#include "kernels.h"
#include "lanes.h"

// Tokens that one thread attends to at a time; a long sequence is shared among threads.
#define CHUNK 256
// What a part of a sequence comes to, for each head: sums of values, sums of shares in sixteen parts, the
// greatest logit.
#define PARTIAL(head_size) ((head_size) + LANES + 1)

// Query heads that share the loads of a key and value, and vectors of a head that stay in registers.
#define TOGETHER 3
#define WIDE 4

// Asks for `size` values from `first` on, which are soon needed.
static inline void fetch(const void *rows, int64_t first, int size, int stored) {
    const int itemsize = stored ? 2 : 4;
    for (int at = 0; at < size * itemsize; at += 64)
        __builtin_prefetch((const char *)rows + first * itemsize + at);
}

// One page of one KV head: the logits of `heads` of its query heads, a constant, to sums [heads, LANES].
static inline __attribute__((always_inline)) void score_page(const int heads, const float *query,
                                                             const void *rows, int64_t row, int64_t ahead,
                                                             int64_t row_size, int count, int head_size,
                                                             int stored, lanes sums[TOGETHER][LANES]) {
    for (int t = 0; t < count; t++) {
        fetch(rows, row + ahead + t * row_size, head_size, stored);
        lanes part[TOGETHER] = {0};
#pragma GCC unroll 4
        for (int at = 0; at < head_size; at += LANES) {
            const lanes key = load_lanes(rows, row + t * row_size + at, stored);
#pragma GCC unroll 3
            for (int g = 0; g < heads; g++) part[g] += key * load_lanes(query, g * head_size + at, 0);
        }
#pragma GCC unroll 3
        for (int g = 0; g < heads; g++) sums[g][t] = part[g];
    }
}

// mixed[g] [head_size] += shares[g] . values of a page, for `heads` query heads, a constant.
static inline __attribute__((always_inline)) void mix_page(const int heads, float shares[TOGETHER][LANES],
                                                           const void *rows, int64_t row, int64_t ahead,
                                                           int64_t row_size, int count, int head_size,
                                                           int stored, float *mixed, int64_t mixed_size) {
    for (int t = 0; t < count; t++) fetch(rows, row + ahead + t * row_size, head_size, stored);
    int first = 0;
    for (; first + LANES * WIDE <= head_size; first += LANES * WIDE) {
        lanes sums[TOGETHER][WIDE];
#pragma GCC unroll 3
        for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++)
                sums[g][v] = load_lanes(mixed, g * mixed_size + first + v * LANES, 0);
        for (int t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) {
                const lanes value = load_lanes(rows, row + t * row_size + first + v * LANES, stored);
#pragma GCC unroll 3
                for (int g = 0; g < heads; g++) sums[g][v] += value * shares[g][t];
            }
#pragma GCC unroll 3
        for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++)
                memcpy(mixed + g * mixed_size + first + v * LANES, &sums[g][v], sizeof sums[g][v]);
    }
    for (; first < head_size; first += LANES)
        for (int g = 0; g < heads; g++) {
            lanes sum = load_lanes(mixed, g * mixed_size + first, 0);
            for (int t = 0; t < count; t++)
                sum += load_lanes(rows, row + t * row_size + first, stored) * shares[g][t];
            memcpy(mixed + g * mixed_size + first, &sum, sizeof sum);
        }
}

// `heads` query heads, a constant, of one KV head over `count` tokens of a page that begins at `row`: their
// logits [heads, PAGE_TOKENS], and what the page adds to their running sums.
static inline __attribute__((always_inline)) void attend_page(const int heads, const float *query,
                                                              const void *rows, int64_t row, int64_t ahead,
                                                              int64_t row_size, int64_t to_value, int count, int head_size,
                                                              int stored, float *logits, float *partials) {
    const indices slots = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const indices there = slots < count;
    lanes sums[TOGETHER][LANES];
    float shares[TOGETHER][LANES] __attribute__((aligned(64)));
    score_page(heads, query, rows, row, ahead, row_size, count, head_size, stored, sums);
    for (int g = 0; g < heads; g++) {
        float *partial = partials + g * PARTIAL(head_size);
        for (int t = count; t < LANES; t++) sums[g][t] = all(0);
        const lanes scored = sums_of(sums[g]);
        memcpy(logits + g * PAGE_TOKENS, &scored, sizeof scored);
        const float before = partial[head_size + LANES];
        const float best = fmaxf(before, greatest(choose(there, scored, all(before))));
        if (best > before) {
            const float shrink = exp_negative(before - best);
            for (int i = 0; i < head_size + LANES; i++) partial[i] *= shrink;
            partial[head_size + LANES] = best;
        }
        const lanes share = choose(there, exp_lanes(scored - all(best)), all(0));
        const lanes total = load_lanes(partial, head_size, 0) + share;
        memcpy(partial + head_size, &total, sizeof total);
        memcpy(shares[g], &share, sizeof share);
    }
    mix_page(heads, shares, rows, row + to_value, ahead, row_size, count, head_size, stored, partials,
             PARTIAL(head_size));
}

// One query row a sequence over its own pages: see PagedBatch for the layout.
//
// query, out [sequences, heads, head_size], head_size a multiple of 16; rows [*, 2, kv_heads, head_size];
// pages [sequences, width]; partials: scratch, float [sequences, chunks of the longest, heads,
// head_size + 17]; logits: scratch, float [sequences, heads, tail]; shares: float [sequences, tail], the
// attention to the newest `tail` tokens, averaged over heads, 0 where there are fewer.
void decode_attention_rows(const void *query, const void *rows, const int32_t *pages, const int32_t *lengths,
                           void *out, float *partials, float *logits, float *shares, int64_t sequences,
                           int64_t width, int64_t chunks, int64_t tail, int heads, int kv_heads, int head_size,
                           int from_bf16, int bf16, int stored) {
    const int group = heads / kv_heads;
    const float scale = 1.0f / sqrtf(head_size);
    const int64_t row_size = (int64_t)2 * kv_heads * head_size, size = PARTIAL(head_size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * chunks; task++) {
        const int64_t sequence = task / chunks, begin = task % chunks * CHUNK;
        const int64_t length = lengths[sequence], end = begin + CHUNK < length ? begin + CHUNK : length;
        const int32_t *table = pages + sequence * width;
        float q[heads * head_size], own[group * PAGE_TOKENS], *sums = partials + task * heads * size;
        load(query, sequence * heads * head_size, heads * head_size, from_bf16, q);
        for (int i = 0; i < heads * head_size; i++) q[i] *= scale;
        memset(sums, 0, sizeof(float) * heads * size);
        for (int head = 0; head < heads; head++) sums[head * size + size - 1] = -INFINITY;
        for (int64_t slot = begin; slot < end; slot += PAGE_TOKENS) {
            const int count = end - slot < PAGE_TOKENS ? end - slot : PAGE_TOKENS;
            const int64_t page = table[slot / PAGE_TOKENS];
            const int64_t next = slot + PAGE_TOKENS < end ? table[slot / PAGE_TOKENS + 1] : page;
            const int64_t ahead = (next - page) * PAGE_TOKENS * row_size;
            for (int head = 0; head < kv_heads; head++) {
                const int64_t row = page * PAGE_TOKENS * row_size + head * head_size;
                for (int g = 0; g < group; g += TOGETHER) {
                    const int first = head * group + g;
#define CASE(n, half)                                                                                      \
    case n:                                                                                                \
        attend_page(n, q + first * head_size, rows, row, ahead, row_size, (int64_t)kv_heads * head_size,   \
                    count, head_size, half, own + g * PAGE_TOKENS, sums + first * size);                   \
        break;
#define CASES(half)                                              \
    switch (group - g < TOGETHER ? group - g : TOGETHER) {       \
        CASE(1, half) CASE(2, half) CASE(3, half)                \
    }
                    if (stored) CASES(1) else CASES(0)
                }
                for (int64_t t = 0; t < count; t++) {
                    int64_t column = slot + t - (length - tail);
                    for (int g = 0; g < group && column >= 0; g++)
                        logits[(sequence * heads + head * group + g) * tail + column] =
                            own[g * PAGE_TOKENS + t];
                }
            }
        }
    }
#pragma omp for
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        const int64_t length = lengths[sequence], used = (length + CHUNK - 1) / CHUNK;
        float *first = partials + sequence * chunks * heads * size, *seen = shares + sequence * tail;
        memset(seen, 0, sizeof(float) * tail);
        for (int head = 0; head < heads; head++) {
            float mixed[head_size], best = -INFINITY, sum = 0;
            for (int i = 0; i < head_size; i++) mixed[i] = 0;
            for (int64_t c = 0; c < used; c++) {
                const float other = first[(c * heads + head) * size + size - 1];
                best = other > best ? other : best;
            }
            for (int64_t c = 0; c < used; c++) {
                const float *part = first + (c * heads + head) * size;
                const float weight = exp_negative(part[size - 1] - best);
                for (int i = 0; i < LANES; i++) sum += weight * part[head_size + i];
                for (int i = 0; i < head_size; i++) mixed[i] += weight * part[i];
            }
            for (int i = 0; i < head_size; i++) mixed[i] /= sum;
            store(out, (sequence * heads + head) * head_size, head_size, bf16, mixed);
            const float *own = logits + (sequence * heads + head) * tail;
            for (int64_t column = tail > length ? tail - length : 0; column < tail; column++)
                seen[column] += exp_negative(own[column] - best) / (sum * heads);
        }
    }
}

void decode_attention(const void *query, const void *rows, const int32_t *pages, const int32_t *lengths,
                      void *out, float *partials, float *logits, float *shares, int64_t sequences,
                      int64_t width, int64_t chunks, int64_t tail, int heads, int kv_heads, int head_size,
                      int bf16, int stored, int threads) {
#pragma omp parallel num_threads(threads)
    decode_attention_rows(query, rows, pages, lengths, out, partials, logits, shares, sequences, width, chunks,
                          tail, heads, kv_heads, head_size, bf16, bf16, stored);
}
