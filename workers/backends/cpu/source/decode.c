#include "kernels.h"
#include "rows.h"

// What a part of a sequence comes to, for each head: sums of values, the sum of shares, the greatest logit.
// Logits are powers of two.
#define PART_SIZE(head_size) ((head_size) + PARTIAL)

// Query heads that share the loads of a key and value, and vectors of a head that stay in registers.
#define TOGETHER 3
#define WIDE 4

// Where one thread finds its part of a sequence: `count` tokens on pages from `table` on, the first of which, if they are
// `unseen`, are not attended to, and may be anything.
typedef struct {
    const char *rows;
    const int32_t *table;
    int count, unseen, head_size, page_tokens;
    int64_t row_bytes;
} cache_part;

static inline const char *page_of(const cache_part *part, int token) {
    return part->rows + part->table[token / part->page_tokens] * part->page_tokens * part->row_bytes;
}

// The first token of the first page that has any that is attended to.
static inline int first_page(const cache_part *part) { return part->unseen / part->page_tokens * part->page_tokens; }

// logits[g * CHUNK + t] of `heads` query heads of one KV head, a constant, and the tokens of a page, whose
// keys begin at `row`; behind the last token there is 0. Queries are pairs of bf16, those of `pair_query` for 4 bits, or
// floats. Meanwhile `ahead_bytes` for each token are fetched from `ahead` on, which are soon needed: little by little, as
// only so many can be under way.
INLINE void score_page(const int heads, const int pairs, const int format, const cache_part *part, const char *row,
                       int count, const char *ahead, int64_t ahead_bytes, const char *query, float scale,
                       float *logits) {
    const int size = part->head_size, parts = format == INT4 ? 2 : 1, part_size = size / parts;
    lanes sums[TOGETHER][LANES], scales = all(scale);
    for (int t = 0; t < count; t++, row += part->row_bytes) {
        for (int64_t at = 0; at < ahead_bytes; at += 64) __builtin_prefetch(ahead + t * ahead_bytes + at);
        lanes own[TOGETHER] = {0};
        int at = 0;
        if (pairs) {
#pragma GCC unroll 4
            for (; at + 2 * LANES <= size; at += 2 * LANES) {
                const lanes key = format == INT4 ? code_pairs(row + at / 2) : load_lanes(row + 2 * at, 0, 0);
#pragma GCC unroll 3
                for (int g = 0; g < heads; g++)
                    own[g] = multiply(own[g], load_lanes(query + 2 * (g * size + at), 0, 0), key, 1);
            }
            if (at < size)  // half a vector of pairs
                for (int g = 0; g < heads; g++)
                    own[g] += load_lanes(query, g * size + at, 1) * load_lanes(row, at, 1);
        } else {
#pragma GCC unroll 2
            for (int upper = 0; upper < parts; upper++)
#pragma GCC unroll 4
                for (at = 0; at < part_size; at += LANES) {
                    const lanes key = load_numbers(format, row, at, upper);
#pragma GCC unroll 3
                    for (int g = 0; g < heads; g++)
                        own[g] += load_lanes(query, g * size + upper * part_size + at, 0) * key;
                }
        }
        if (has_scale(format)) scales[t] = scale * load_scale(format, row, size);
#pragma GCC unroll 3
        for (int g = 0; g < heads; g++) sums[g][t] = own[g];
    }
#pragma GCC unroll 3
    for (int g = 0; g < heads; g++) {
        for (int t = count; t < LANES; t++) sums[g][t] = all(0);
        store_lanes(logits, g * CHUNK, 0, sums_of(sums[g]) * scales);
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

// mixed[g * mixed_size] = numbers `at` and on of the values that begin at `offset` in a row, of all tokens, each
// times its share, for `heads` query heads of one KV head and `vectors` vectors, constants; of 4 bits, half of the
// vectors are the numbers in the upper halves of bytes.
INLINE void mix_values(const int heads, const int vectors, const int pairs, const int format, const cache_part *part,
                       int64_t offset, int at, const float *shares, float *mixed, int64_t mixed_size) {
    const int parts = format == INT4 ? 2 : 1, each = vectors / parts;
    lanes sums[TOGETHER][WIDE] = {0};
    for (int first = first_page(part); first < part->count; first += part->page_tokens) {
        const int count = part->count - first < part->page_tokens ? part->count - first : part->page_tokens;
        const int step = pairs ? 2 : 1, begin = part->unseen > first ? (part->unseen - first) / step * step : 0;
        const char *row = page_of(part, first) + offset + begin * part->row_bytes;
        for (int t = begin; t < count; t += step, row += part->row_bytes * step) {
            // Behind the last token there may be anything, and its share is 0.
            const char *other = t + 1 < count ? row + part->row_bytes : row;
            lanes share[TOGETHER];
#pragma GCC unroll 3
            for (int g = 0; g < heads; g++)
                share[g] = all_words(shares + g * CHUNK + (pairs ? (first + t) / 2 : first + t));
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const int from = at + v % each * LANES;
                const lanes value = pairs ? load_pairs(format, row, other, from, v / each)
                                          : load_numbers(format, row, from, v / each);
#pragma GCC unroll 3
                for (int g = 0; g < heads; g++) sums[g][v] = multiply(sums[g][v], share[g], value, pairs);
            }
        }
    }
#pragma GCC unroll 3
    for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store_lanes(mixed, g * mixed_size + v / each * (part->head_size / parts) + at + v % each * LANES, 0, sums[g][v]);
}

// `heads` query heads, a constant: all their values.
INLINE void mix_heads(const int heads, const int pairs, const int format, const cache_part *part, int64_t offset,
                      const float *shares, float *mixed, int64_t mixed_size) {
    const int parts = format == INT4 ? 2 : 1, size = part->head_size / parts;
    int at = 0;
    for (; at + WIDE / parts * LANES <= size; at += WIDE / parts * LANES)
        mix_values(heads, WIDE, pairs, format, part, offset, at, shares, mixed, mixed_size);
    for (; at < size; at += LANES) mix_values(heads, parts, pairs, format, part, offset, at, shares, mixed, mixed_size);
}

// Gives shares the scales of their values, which begin at `offset` in a row, for the `group` heads of a KV head; they
// become bf16 for `pairs`. Those of what is not attended to become 0.
static void scale_shares(const cache_part *part, int format, int64_t offset, int group, int pairs, float *shares) {
    float scales[CHUNK] = {0};
    for (int first = first_page(part); first < part->count; first += part->page_tokens) {
        const int begin = part->unseen > first ? part->unseen : first;
        const char *row = page_of(part, first) + offset + (begin - first) * part->row_bytes;
        for (int t = begin; t < part->count && t < first + part->page_tokens; t++, row += part->row_bytes)
            scales[t] = load_scale(format, row, part->head_size);
    }
    for (int g = 0; g < group; g++, shares += CHUNK)
        for (int t = 0; t < part->count; t += LANES)
            store_lanes(shares, t, pairs, load_lanes(shares, t, 0) * load_lanes(scales, t, 0));
}

// Carries out `call(n, pairs, format)` with constants, for n = `count` heads, at most TOGETHER.
#define WITH_PAIRS(call, n, format)                         \
    if (pairs) call(n, 1, format) else call(n, 0, format)
#define WITH_FORMATS(call, n)                               \
    switch (format) {                                       \
        case FLOAT32: call(n, 0, FLOAT32) break;            \
        case BFLOAT16: WITH_PAIRS(call, n, BFLOAT16) break; \
        case FLOAT16: call(n, 0, FLOAT16) break;            \
        case INT8: call(n, 0, INT8) break;                  \
        case INT4: WITH_PAIRS(call, n, INT4) break;         \
    }
#define WITH_CONSTANTS(call, count)            \
    switch (count) {                           \
        case 1: WITH_FORMATS(call, 1) break;   \
        case 2: WITH_FORMATS(call, 2) break;   \
        case 3: WITH_FORMATS(call, 3) break;   \
    }

// One query row a sequence over its own pages, over its newest tokens in a finer format, in the place of those, and over
// what is spilled: see PagedBatch for the layout.
//
// query, out [sequences, heads, head_size], head_size a multiple of 16, of 32 for rows of 4 bits; rows of each are
// [*, 2, kv_heads, head_bytes] in a format of their own, pages [sequences, width], `chunks` of the longest, none where
// there is nothing; each sequence attends to one token at least; partials: scratch, float [sequences, chunks of all,
// heads, head_size + 2]; logits: scratch, float [sequences, heads, tail]; shares: float [sequences, kv_heads, tail], the
// attention to the newest `tail` tokens that are not spilled, averaged over the heads of a KV head, 0 where there are
// fewer; lse: float [sequences, heads], the logarithm of the sum of exponentiated logits, where it is wanted.
void decode_attention_rows(const void *query, const paged_cache *own_cache, const paged_cache *recent,
                           const paged_cache *spilled, void *out, float *partials, float *logits, float *shares,
                           float *lse, int64_t sequences, int64_t tail, int heads, int kv_heads, int head_size, int bf16) {
    const int64_t chunks = own_cache->chunks + recent->chunks + spilled->chunks;
    const int group = heads / kv_heads;
    const float scale = LOG2_E / sqrtf(head_size);
    const int64_t size = PART_SIZE(head_size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * chunks; task++) {
        const int64_t sequence = task / chunks;
        const paged_cache *caches[] = {own_cache, recent, spilled}, **in = caches;
        int64_t chunk = task % chunks;
        for (; chunk >= (*in)->chunks; in++) chunk -= (*in)->chunks;
        const paged_cache *cache = *in;
        const int is_recent = cache == recent, is_spilled = cache == spilled;
        const int format = cache->format, pairs = bf16 && IN_PAIRS(format), page_tokens = cache->page_tokens;
        const int64_t bytes = head_bytes(format, head_size), begin = chunk * CHUNK;
        const int64_t start = cache->starts ? cache->starts[sequence] : 0;
        int64_t length = cache->lengths[sequence];
        // Where in the sequence, of its tokens that are not spilled, the first slot of the cache would lie.
        const int64_t origin = is_recent ? own_cache->lengths[sequence] - length : 0;
        if (cache == own_cache && recent->chunks) length -= recent->lengths[sequence] - recent->starts[sequence];
        float *sums = partials + task * heads * size;
        if (begin >= length) {
            for (int head = 0; head < heads; head++) sums[head * size + head_size + 1] = -INFINITY;
            continue;
        }
        const int count = length - begin < CHUNK ? length - begin : CHUNK;
        const cache_part part = {
            .rows = cache->rows,
            .table = cache->pages + sequence * cache->width + begin / page_tokens,
            .count = count,
            .unseen = start < begin ? 0 : start - begin < count ? start - begin : count,
            .head_size = head_size,
            .page_tokens = page_tokens,
            .row_bytes = cache->row_bytes,
        };
        const char *own_query = (const char *)query + sequence * heads * head_size * (bf16 ? 2 : 4);
        float own[heads * CHUNK], asked[heads * head_size];
        uint16_t paired[heads * head_size];
        if (!pairs || format == INT4) {
            load(own_query, 0, heads * head_size, bf16, asked);
            own_query = (const char *)asked;
        }
        for (int first = 0; format == INT4 && first < heads * head_size; first += head_size) {
            hadamard(asked + first, head_size);
            if (pairs) pair_query(asked + first, head_size, paired + first);
        }
        if (pairs && format == INT4) own_query = (const char *)paired;
        const int unseen = part.unseen;
        for (int first = first_page(&part); first < part.count; first += page_tokens) {
            const int count = part.count - first < page_tokens ? part.count - first : page_tokens;
            const char *page = page_of(&part, first);
            const int more = first + page_tokens < part.count;
            const char *next = more ? page_of(&part, first + page_tokens) : page;
            for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
                int64_t share = more ? part.row_bytes / kv_heads : 0;
                const char *ahead = next + kv_head * page_tokens * share;
                for (int head = kv_head * group, left = group; left > 0; head += TOGETHER, left -= TOGETHER) {
#define SCORE(n, pairs, format)                                                                            \
    score_page(n, pairs, format, &part, page + kv_head * bytes, count, ahead, share,                       \
               own_query + head * head_size * (pairs ? 2 : 4), scale, own + head * CHUNK + first);
                    WITH_CONSTANTS(SCORE, left < TOGETHER ? left : TOGETHER)
                    share = 0;
                }
            }
        }
        const int64_t to_column = origin + begin - (own_cache->lengths[sequence] - tail);
        const int64_t newest = -to_column > (is_recent ? unseen : 0) ? -to_column : is_recent ? unseen : 0;
        for (int head = 0; head < heads; head++) {
            for (int t = 0; t < unseen; t++) own[head * CHUNK + t] = -INFINITY;
            float *target = logits + (sequence * heads + head) * tail + to_column;
            for (int64_t t = newest; !is_spilled && t < part.count; t++) target[t] = own[head * CHUNK + t];
            float *sum = sums + head * size + head_size;
            sum[1] = -INFINITY;
            if (unseen < part.count)
                sum[0] = exponentiate(own + head * CHUNK, part.count, pairs && !has_scale(format), &sum[1]);
        }
        if (unseen == part.count) continue;
        for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
            const int64_t values = (kv_heads + kv_head) * bytes;
            if (has_scale(format)) scale_shares(&part, format, values, group, pairs, own + kv_head * group * CHUNK);
            for (int head = kv_head * group, left = group; left > 0; head += TOGETHER, left -= TOGETHER) {
#define MIX(n, pairs, format) \
    mix_heads(n, pairs, format, &part, values, own + head * CHUNK, sums + head * size, size);
                WITH_CONSTANTS(MIX, left < TOGETHER ? left : TOGETHER)
            }
        }
        for (int head = 0; format == INT4 && head < heads; head++) hadamard(sums + head * size, head_size);
    }
#pragma omp for schedule(static)
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        const int64_t length = own_cache->lengths[sequence];
        const float *first = partials + sequence * chunks * heads * size;
        memset(shares + sequence * kv_heads * tail, 0, sizeof(float) * kv_heads * tail);
        for (int head = 0; head < heads; head++) {
            float mixed[head_size], best = -INFINITY, sum = 0;
            memset(mixed, 0, sizeof(float) * head_size);
            for (int64_t c = 0; c < chunks; c++) best = fmaxf(best, first[(c * heads + head) * size + head_size + 1]);
            for (int64_t c = 0; c < chunks; c++) {
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

void decode_attention(const void *query, const paged_cache *cache, const paged_cache *recent,
                      const paged_cache *spilled, void *out, float *partials, float *logits, float *shares, float *lse,
                      int64_t sequences, int64_t tail, int heads, int kv_heads, int head_size, int bf16, int threads) {
#pragma omp parallel num_threads(threads)
    decode_attention_rows(query, cache, recent, spilled, out, partials, logits, shares, lse, sequences, tail, heads,
                          kv_heads, head_size, bf16);
}
