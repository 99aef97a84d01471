#include "kernels.h"
#include "lanes.h"

// What a part of a sequence comes to, for each head: sums of values, the sum of shares, the greatest logit.
// Logits are powers of two.
#define PART_SIZE(head_size) ((head_size) + PARTIAL)

// Query heads that share the loads of a key and value, and vectors of a head that stay in registers.
#define TOGETHER 3
#define WIDE 4

// Where one thread finds its part of a sequence: `count` tokens on pages from `table` on.
typedef struct {
    const char *rows;
    const int32_t *table;
    int count, head_size;
    int64_t row_bytes;
} cache_part;

static inline const char *page_of(const cache_part *part, int token) {
    return part->rows + part->table[token / PAGE_TOKENS] * PAGE_TOKENS * part->row_bytes;
}

// logits[g * CHUNK + t] of `heads` query heads of one KV head, a constant, and the tokens of a page, whose
// keys begin at `row`; behind the last token there is 0. Meanwhile `ahead_bytes` for each token are fetched
// from `ahead` on, which are soon needed: little by little, as only so many can be under way.
static inline __attribute__((always_inline)) void score_page(const int heads, const int pairs, const int stored,
                                                             const cache_part *part, const char *row, int count,
                                                             const char *ahead, int64_t ahead_bytes,
                                                             const char *query, float scale, float *logits) {
    const int step = pairs ? 2 * LANES : LANES, itemsize = pairs ? 2 : 4, size = part->head_size;
    lanes sums[TOGETHER][LANES];
    for (int t = 0; t < count; t++, row += part->row_bytes) {
        for (int64_t at = 0; at < ahead_bytes; at += 64) __builtin_prefetch(ahead + t * ahead_bytes + at);
        lanes own[TOGETHER] = {0};
        int at = 0;
#pragma GCC unroll 4
        for (; at + step <= size; at += step) {
            const lanes key = load_lanes(row + at * (stored ? 2 : 4), 0, stored && !pairs);
#pragma GCC unroll 3
            for (int g = 0; g < heads; g++) {
                const lanes words = load_lanes(query + (g * size + at) * itemsize, 0, 0);
                own[g] = multiply(own[g], words, key, pairs);
            }
        }
        if (at < size)  // half a vector of pairs
            for (int g = 0; g < heads; g++)
                own[g] += load_lanes(query, g * size + at, 1) * load_lanes(row, at, 1);
#pragma GCC unroll 3
        for (int g = 0; g < heads; g++) sums[g][t] = own[g];
    }
#pragma GCC unroll 3
    for (int g = 0; g < heads; g++) {
        for (int t = count; t < LANES; t++) sums[g][t] = all(0);
        store_lanes(logits, g * CHUNK, 0, sums_of(sums[g]) * scale);
    }
}

// Turns the logits of `count` tokens into shares where they lie, bf16 for `pairs`; what is behind the last
// becomes 0. Returns their sum; `best` is the greatest logit.
static inline float exponentiate(float *logits, int count, int pairs, float *best) {
    const indices slots = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    lanes greatest_of = all(-INFINITY), total = all(0);
    for (int t = 0; t < count; t += LANES) {
        const lanes logit = choose(slots < count - t, load_lanes(logits, t, 0), all(-INFINITY));
        greatest_of = maximum(greatest_of, logit);
    }
    *best = greatest(greatest_of);
    for (int t = 0; t < count; t += LANES) {
        const lanes share = exp2_lanes(load_lanes(logits, t, 0) - *best);
        const lanes there = choose(slots < count - t, share, all(0));
        store_lanes(logits, t, pairs, there);
        total += there;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    return sum;
}

// mixed[g * mixed_size] = the values, from `offset` in a row on, of all tokens, each times its share, for `heads`
// query heads of one KV head and `vectors` vectors, constants.
static inline __attribute__((always_inline)) void mix_values(const int heads, const int vectors, const int pairs,
                                                             const int stored, const cache_part *part,
                                                             int64_t offset, const float *shares, float *mixed,
                                                             int64_t mixed_size) {
    lanes sums[TOGETHER][WIDE] = {0};
    for (int first = 0; first < part->count; first += PAGE_TOKENS) {
        const int count = part->count - first < PAGE_TOKENS ? part->count - first : PAGE_TOKENS;
        const char *row = page_of(part, first) + offset;
        for (int t = 0; t < count; t += pairs ? 2 : 1, row += part->row_bytes * (pairs ? 2 : 1)) {
            // Behind the last token there may be anything, and its share is 0.
            const char *other = t + 1 < count ? row + part->row_bytes : row;
            lanes share[TOGETHER];
#pragma GCC unroll 3
            for (int g = 0; g < heads; g++)
                share[g] = all_words(shares + g * CHUNK + (pairs ? (first + t) / 2 : first + t));
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const lanes value = pairs ? load_pairs(row, other, v * LANES) : load_lanes(row, v * LANES, stored);
#pragma GCC unroll 3
                for (int g = 0; g < heads; g++) sums[g][v] = multiply(sums[g][v], share[g], value, pairs);
            }
        }
    }
#pragma GCC unroll 3
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store_lanes(mixed, g * mixed_size + v * LANES, 0, sums[g][v]);
}

// `heads` query heads, a constant: all their values.
static inline __attribute__((always_inline)) void mix_heads(const int heads, const int pairs, const int stored,
                                                            const cache_part *part, int64_t offset,
                                                            const float *shares, float *mixed, int64_t mixed_size) {
    const int itemsize = stored ? 2 : 4;
    int at = 0;
    for (; at + WIDE * LANES <= part->head_size; at += WIDE * LANES)
        mix_values(heads, WIDE, pairs, stored, part, offset + at * itemsize, shares, mixed + at, mixed_size);
    for (; at < part->head_size; at += LANES)
        mix_values(heads, 1, pairs, stored, part, offset + at * itemsize, shares, mixed + at, mixed_size);
}

// Carries out `call(n, pairs, stored)` with constants, for n = `count` heads, at most TOGETHER.
#define WITH_CONSTANTS(call, count)                                                      \
    switch (count) {                                                                     \
        case 1: if (bf16) call(1, 1, 1) else if (stored) call(1, 0, 1) else call(1, 0, 0) break; \
        case 2: if (bf16) call(2, 1, 1) else if (stored) call(2, 0, 1) else call(2, 0, 0) break; \
        case 3: if (bf16) call(3, 1, 1) else if (stored) call(3, 0, 1) else call(3, 0, 0) break; \
    }

// One query row a sequence over its own pages, and over those of what is spilled: see PagedBatch for the layout.
//
// query, out [sequences, heads, head_size], head_size a multiple of 16; rows of both [*, 2, kv_heads, head_size],
// pages [sequences, width], `chunks` of the longest, none where nothing is spilled; each sequence attends to one of its
// own tokens at least; partials: scratch, float [sequences, chunks of both, heads, head_size + 2]; logits: scratch,
// float [sequences, heads, tail]; shares: float [sequences, kv_heads, tail], the attention to the newest `tail` tokens
// that are not spilled, averaged over the heads of a KV head, 0 where there are fewer; lse: float [sequences, heads], the logarithm of the sum of
// exponentiated logits, where it is wanted.
void decode_attention_rows(const void *query, const paged_cache *own_cache, const paged_cache *spilled, void *out,
                           float *partials, float *logits, float *shares, float *lse, int64_t sequences,
                           int64_t tail, int heads, int kv_heads, int head_size, int bf16, int stored) {
    const int64_t chunks = own_cache->chunks + spilled->chunks;
    const int group = heads / kv_heads, itemsize = stored ? 2 : 4;
    const float scale = LOG2_E / sqrtf(head_size);
    const int64_t size = PART_SIZE(head_size), head_bytes = (int64_t)head_size * itemsize;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * chunks; task++) {
        const int64_t sequence = task / chunks, chunk = task % chunks;
        const int is_spilled = chunk >= own_cache->chunks;
        const paged_cache *cache = is_spilled ? spilled : own_cache;
        const int64_t begin = (is_spilled ? chunk - own_cache->chunks : chunk) * CHUNK;
        const int64_t length = cache->lengths[sequence], start = cache->starts ? cache->starts[sequence] : 0;
        if (begin >= length) continue;
        const cache_part part = {
            .rows = cache->rows,
            .table = cache->pages + sequence * cache->width + begin / PAGE_TOKENS,
            .count = length - begin < CHUNK ? length - begin : CHUNK,
            .head_size = head_size,
            .row_bytes = 2 * kv_heads * head_bytes,
        };
        const char *own_query = (const char *)query + sequence * heads * head_size * (bf16 ? 2 : 4);
        float own[heads * CHUNK], *sums = partials + task * heads * size;
        // Tokens before the first that is attended to.
        const int unseen = start < begin ? 0 : start - begin < part.count ? start - begin : part.count;
        for (int first = unseen / PAGE_TOKENS * PAGE_TOKENS; first < part.count; first += PAGE_TOKENS) {
            const int count = part.count - first < PAGE_TOKENS ? part.count - first : PAGE_TOKENS;
            const char *page = page_of(&part, first);
            const int more = first + PAGE_TOKENS < part.count;
            const char *next = more ? page_of(&part, first + PAGE_TOKENS) : page;
            for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
                int64_t share = more ? part.row_bytes / kv_heads : 0;
                const char *ahead = next + kv_head * PAGE_TOKENS * share;
                for (int head = kv_head * group, left = group; left > 0; head += TOGETHER, left -= TOGETHER) {
#define SCORE(n, pairs, half)                                                                              \
    score_page(n, pairs, half, &part, page + kv_head * head_bytes, count, ahead, share,                    \
               own_query + head * head_size * (pairs ? 2 : 4), scale, own + head * CHUNK + first);
                    WITH_CONSTANTS(SCORE, left < TOGETHER ? left : TOGETHER)
                    share = 0;
                }
            }
        }
        const int64_t to_column = begin - (length - tail), newest = to_column < 0 ? -to_column : 0;
        for (int head = 0; head < heads; head++) {
            for (int t = 0; t < unseen; t++) own[head * CHUNK + t] = -INFINITY;
            float *target = logits + (sequence * heads + head) * tail + to_column;
            for (int64_t t = newest; !is_spilled && t < part.count; t++) target[t] = own[head * CHUNK + t];
            float *sum = sums + head * size + head_size;
            sum[1] = -INFINITY;
            if (unseen < part.count) sum[0] = exponentiate(own + head * CHUNK, part.count, bf16, &sum[1]);
        }
        if (unseen == part.count) continue;
        for (int kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int head = kv_head * group, left = group; left > 0; head += TOGETHER, left -= TOGETHER) {
#define MIX(n, pairs, half)                                                                                \
    mix_heads(n, pairs, half, &part, (kv_heads + kv_head) * head_bytes, own + head * CHUNK, sums + head * size, size);
                WITH_CONSTANTS(MIX, left < TOGETHER ? left : TOGETHER)
            }
    }
#pragma omp for schedule(static)
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        const int64_t length = own_cache->lengths[sequence];
        const int64_t own_end = (length + CHUNK - 1) / CHUNK;
        const int64_t end = spilled->chunks ? own_cache->chunks + (spilled->lengths[sequence] + CHUNK - 1) / CHUNK : 0;
        const float *first = partials + sequence * chunks * heads * size;
        memset(shares + sequence * kv_heads * tail, 0, sizeof(float) * kv_heads * tail);
        for (int head = 0; head < heads; head++) {
            float mixed[head_size], best = -INFINITY, sum = 0;
            memset(mixed, 0, sizeof(float) * head_size);
            // Those of the sequence's own chunks, then of the spilled.
#define EACH_CHUNK for (int64_t c = 0; c < own_end || c < end; c = c + 1 == own_end ? own_cache->chunks : c + 1)
            EACH_CHUNK best = fmaxf(best, first[(c * heads + head) * size + head_size + 1]);
            EACH_CHUNK {
                const float *part = first + (c * heads + head) * size;
                if (part[head_size + 1] == -INFINITY) continue;  // nothing of it is attended to
                const float weight = exp2_lanes(all(part[head_size + 1] - best))[0];
                sum += weight * part[head_size];
                for (int i = 0; i < head_size; i++) mixed[i] += weight * part[i];
            }
            for (int i = 0; i < head_size; i++) mixed[i] /= sum;
            if (lse) lse[sequence * heads + head] = (best + log2f(sum)) / LOG2_E;
            store(out, (sequence * heads + head) * head_size, head_size, bf16, mixed);
            float *seen = shares + (sequence * kv_heads + head / group) * tail;
            const float *own = logits + (sequence * heads + head) * tail;
            int64_t column = tail > length ? tail - length : 0;
            for (; column + LANES <= tail; column += LANES) {
                const lanes share = exp2_lanes(load_lanes(own, column, 0) - best) / (sum * group);
                store_lanes(seen, column, 0, load_lanes(seen, column, 0) + share);
            }
            for (; column < tail; column++) seen[column] += exp2_lanes(all(own[column] - best))[0] / (sum * group);
        }
    }
}

void decode_attention(const void *query, const paged_cache *cache, const paged_cache *spilled, void *out,
                      float *partials, float *logits, float *shares, float *lse, int64_t sequences, int64_t tail,
                      int heads, int kv_heads, int head_size, int bf16, int stored, int threads) {
#pragma omp parallel num_threads(threads)
    decode_attention_rows(query, cache, spilled, out, partials, logits, shares, lse, sequences, tail, heads,
                          kv_heads, head_size, bf16, stored);
}
