#include <float.h>

#include "kernels.h"
#include "panels.h"

// Tokens that queries attend to at a time: even, and a multiple of TILE_ROWS. Their keys and values are read
// by all panels of a task, of which there are at least PANELS where there are as many queries.
#define SPAN 240
#define PANELS 3

// What is the same for all panels. `pairs`: products are of two bfloat16 a word; then keys are words
// [tokens, head_size / 2] and values, of two tokens each, [tokens / 2, head_size]; else both are floats.
// `slots`: spans whose shares a panel keeps, which is all of them where the window's attention is wanted.
typedef struct {
    int pairs, heads, group, head_size, stack;
    float scale;  // of logits, which are powers of two
    int64_t tokens, padded, slots, slot_words, panel_words, seen_words, thread_words;
} prefill_shape;

// What a thread holds of PANEL queries of one head, all transposed, with what it has attended to so far: of tokens
// `begin`, where a span begins, to `end`, those from `starts` of each query on. `shares` are words of
// 2^(logit - best of the span).
typedef struct {
    int64_t first, count, begin, end;
    indices starts[2];
    int head, scored;
    float *query, *mixed, *best_of_span, *shares;
    lanes best[2], total[2];
} panel_state;

static prefill_shape shape_of(int64_t tokens, int64_t window, int heads, int kv_heads, int head_size, int bf16) {
    prefill_shape s = {.pairs = bf16, .heads = heads, .group = heads / kv_heads, .head_size = head_size};
    s.tokens = tokens, s.padded = (tokens + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    s.stack = (PANELS + s.group - 1) / s.group, s.scale = LOG2_E / sqrtf(head_size);
    s.slots = window ? (tokens + SPAN - 1) / SPAN : 1, s.slot_words = SPAN * PANEL / (bf16 ? 2 : 1);
    s.panel_words = (2 * head_size + s.slots) * PANEL + s.slots * s.slot_words;
    s.seen_words = (tokens + 1) * LANES;
    s.thread_words = SPAN * PANEL + s.group * s.stack * s.panel_words + (window ? kv_heads * s.seen_words : 0);
    return s;
}

// Words of scratch that `prefill_attention` needs.
int64_t prefill_scratch(int64_t tokens, int64_t window, int heads, int kv_heads, int head_size, int bf16,
                        int threads) {
    const prefill_shape s = shape_of(tokens, window, heads, kv_heads, head_size, bf16);
    return kv_heads * s.padded * 2 * head_size / (bf16 ? 2 : 1) + threads * s.thread_words;
}

// Lays out the keys and values of two tokens of one head; 0 for tokens that lack.
static inline void pack_tokens(const prefill_shape *s, const void *kv, int64_t token, int64_t row_size,
                               int64_t to_value, int stored, float *keys, float *values) {
    const int size = s->head_size;
    for (int i = 0; i < size; i += LANES) {
        lanes key[2] = {0}, value[2] = {0};
        for (int t = 0; t < 2 && token + t < s->tokens; t++) {
            key[t] = load_lanes(kv, (token + t) * row_size + i, stored);
            value[t] = load_lanes(kv, (token + t) * row_size + to_value + i, stored);
        }
        for (int t = 0; t < 2; t++) {
            store_lanes(keys, (token + t) * size + i, s->pairs, key[t]);
            if (!s->pairs) store_lanes(values, (token + t) * size + i, 0, value[t]);
        }
        if (s->pairs) store_lanes(values, token / 2 * size + i, 0, pair_up(value[0], value[1]));
    }
}

// Turns the logits of `count` tokens into shares. The first query may attend to `visible` of them, each
// further one to one more; none before their `starts`, counted from the first of these tokens on, the last query's being
// `most`. What was summed before shrinks to the new greatest logit.
static inline __attribute__((always_inline)) void exponentiate(const prefill_shape *s, panel_state *panel,
                                                               float *logits, float *words, int count,
                                                               int64_t visible, const indices starts[2],
                                                               int64_t most, const int pairs) {
    const indices query = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int even = count + count % 2;
    for (int half = 0; half < 2; half++) {
        float *in = logits + half * LANES, *out = words + half * LANES;
        for (int t = visible < 0 ? 0 : visible < count ? visible : count; t < even; t++) {
            const indices attends = query + half * LANES > (int32_t)(t < count ? t - visible : PANEL);
            store_lanes(in, t * PANEL, 0, choose(attends, load_lanes(in, t * PANEL, 0), all(-INFINITY)));
        }
        for (int t = 0; t < most && t < count; t++)
            store_lanes(in, t * PANEL, 0, choose(starts[half] > t, all(-INFINITY), load_lanes(in, t * PANEL, 0)));
        lanes best = all(-INFINITY), other = best, total = all(0);
        for (int t = 0; t < even; t += 2) {
            best = maximum(best, load_lanes(in, t * PANEL, 0));
            other = maximum(other, load_lanes(in, (t + 1) * PANEL, 0));
        }
        const lanes before = panel->best[half], now = maximum(before, maximum(best, other) * s->scale);
        for (int t = 0; t < even; t += 2) {
            const lanes low = exp2_lanes(load_lanes(in, t * PANEL, 0) * s->scale - now);
            const lanes high = exp2_lanes(load_lanes(in, (t + 1) * PANEL, 0) * s->scale - now);
            total += low + high;
            store_lanes(out, t * PANEL / (pairs ? 2 : 1), 0, pairs ? pair_up(low, high) : low);
            if (!pairs) store_lanes(out, (t + 1) * PANEL, 0, high);
        }
        if (memcmp(&now, &before, sizeof now)) {
            const lanes shrink = exp2_lanes(before - now);
            panel->best[half] = now, panel->total[half] *= shrink;
            for (int i = 0; i < s->head_size; i++) {
                float *mixed = panel->mixed + i * PANEL + half * LANES;
                store_lanes(mixed, 0, 0, load_lanes(mixed, 0, 0) * shrink);
            }
        }
        panel->total[half] += total;
    }
}

// Attends to tokens `start` to `start + SPAN`, as far as they go; the first query sees those before `visible`.
static inline __attribute__((always_inline)) void attend_span(const prefill_shape *s, panel_state *panel,
                                                              const float *keys, const float *values,
                                                              float *logits, int64_t start, int64_t visible,
                                                              const int pairs) {
    const int count = panel->end - start < SPAN ? panel->end - start : SPAN, size = s->head_size;
    const int depth = pairs ? size / 2 : size;
    const int64_t slot = panel->scored ? start / SPAN : 0;
    float *words = panel->shares + slot * s->slot_words, *mixed = panel->mixed;
    for (int t = 0; t < count; t += TILE_ROWS)
        multiply_tile(TILE_ROWS, keys + (start + t) * depth, depth, 1, panel->query, depth, 1, pairs,
                      logits + t * PANEL);
    const indices starts[2] = {panel->starts[0] - (int32_t)start, panel->starts[1] - (int32_t)start};
    exponentiate(s, panel, logits, words, count, visible, starts, starts[1][LANES - 1], pairs);
    memcpy(panel->best_of_span + slot * PANEL, panel->best, sizeof panel->best);
    const float *own = values + (pairs ? start / 2 : start) * size;
    const int tokens = pairs ? (count + 1) / 2 : count;
    int done = 0;
    for (; (size - done) % TILE_ROWS; done += 8)
        multiply_tile(8, own + done, 1, size, words, tokens, 0, pairs, mixed + done * PANEL);
    for (; done < size; done += TILE_ROWS)
        multiply_tile(TILE_ROWS, own + done, 1, size, words, tokens, 0, pairs, mixed + done * PANEL);
}

// Writes the panel's output, over what all shares come to.
static inline void store_panel(const prefill_shape *s, const panel_state *panel, void *out) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < s->head_size; i += LANES) {
            lanes v[LANES];
            for (int j = 0; j < LANES; j++)
                v[j] = load_lanes(panel->mixed, (i + j) * PANEL + half * LANES, 0) / panel->total[half];
            transpose(v);
            for (int j = 0; j < LANES && half * LANES + j < panel->count; j++) {
                const int64_t row = panel->first + half * LANES + j;
                store_lanes(out, (row * s->heads + panel->head) * s->head_size + i, s->pairs, v[j]);
            }
        }
}

// What is seen before and what comes to it: their sum, or the greater.
static inline __attribute__((always_inline)) lanes joined(lanes before, lanes more, const int greatest) {
    return greatest ? maximum(before, more) : before + more;
}

// seen [context, LANES] is joined by the attention of the panel's queries that are of the window, each by its weight.
// What they do not see has no part in it.
static inline __attribute__((always_inline)) void score_panel(const prefill_shape *s, const panel_state *panel,
                                                              const lanes weights[2], int64_t context, float *seen,
                                                              const int greatest) {
    if (context > panel->end) context = panel->end;
    for (int64_t start = panel->begin; start < context; start += SPAN) {
        const int64_t slot = start / SPAN;
        const float *shares = panel->shares + slot * s->slot_words, *best = panel->best_of_span + slot * PANEL;
        const int width = context - start < SPAN ? context - start : SPAN;
        lanes factor[2];
        for (int half = 0; half < 2; half++)
            factor[half] = weights[half] / panel->total[half] *
                           exp2_lanes(load_lanes(best, half * LANES, 0) - panel->best[half]);
        for (int t = 0; t < width; t += 2) {
            float *sums = seen + (start + t) * LANES;
            lanes low = load_lanes(sums, 0, 0), high = load_lanes(sums, LANES, 0);
            for (int half = 0; half < 2; half++) {
                const float *own = shares + half * LANES;
                if (s->pairs) {
                    const lanes words = load_lanes(own, t / 2 * PANEL, 0);
                    low = joined(low, low_of(words) * factor[half], greatest);
                    high = joined(high, high_of(words) * factor[half], greatest);
                } else {
                    low = joined(low, load_lanes(own, t * PANEL, 0) * factor[half], greatest);
                    high = joined(high, load_lanes(own, (t + 1) * PANEL, 0) * factor[half], greatest);
                }
            }
            store_lanes(sums, 0, 0, low), store_lanes(sums, LANES, 0, high);
        }
    }
}

// Causal attention of `queries` rows, the last of `tokens` tokens, and what the last `window` of them attend
// to in the first `context` tokens: their shares, averaged over heads, weighted by `weights` [window] and
// summed; or, of all heads and queries, the `greatest`. `starts` [queries], ascending: the first token that each
// attends to; null for 0.
//
// query, out [queries, heads, head_size], head_size a multiple of 16; kv [tokens, 2, kv_heads, head_size];
// scores: float [kv_heads, context], written if there is a window. scratch: words, see `prefill_scratch`.
void prefill_attention(const void *query, const void *kv, const float *weights, const int32_t *starts, void *out,
                       float *scratch, float *scores, int64_t queries, int64_t tokens, int64_t window, int64_t context,
                       int heads, int kv_heads, int head_size, int greatest, int bf16, int stored, int threads) {
    const prefill_shape shape = shape_of(tokens, window, heads, kv_heads, head_size, bf16), *s = &shape;
    const int64_t row_size = (int64_t)2 * kv_heads * head_size, before = tokens - queries;
    const int64_t stacks = (queries + s->stack * PANEL - 1) / (s->stack * PANEL);
    const int depth = s->pairs ? head_size / 2 : head_size;
    float *keys = scratch, *values = keys + kv_heads * s->padded * depth;
    float *threads_own = values + kv_heads * s->padded * depth;
#pragma omp parallel num_threads(threads)
    {
        float *logits = threads_own + omp_get_thread_num() * s->thread_words, *own = logits + SPAN * PANEL;
        float *seen = own + s->group * s->stack * s->panel_words;
        panel_state panels[s->group * s->stack];
        if (window) memset(seen, 0, sizeof(float) * kv_heads * s->seen_words);
#pragma omp for collapse(2)
        for (int kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int64_t token = 0; token < s->padded; token += 2)
                pack_tokens(s, (const char *)kv + (int64_t)kv_head * head_size * (stored ? 2 : 4), token,
                            row_size, (int64_t)kv_heads * head_size, stored,
                            keys + kv_head * s->padded * depth, values + kv_head * s->padded * depth);
        // Dealt out in turn, not as threads are free: sums are then the same in every run.
#pragma omp for schedule(static, 1)
        for (int64_t task = 0; task < stacks * kv_heads; task++) {
            const int64_t from = task / kv_heads * s->stack * PANEL;
            const int kv_head = task % kv_heads;
            int used = 0;
            for (int64_t first = from; first < queries && first < from + s->stack * PANEL; first += PANEL)
                for (int head = kv_head * s->group; head < (kv_head + 1) * s->group; head++) {
                    panel_state *panel = &panels[used];
                    panel->first = first, panel->head = head;
                    panel->count = queries - first < PANEL ? queries - first : PANEL;
                    panel->end = before + first + panel->count;
                    panel->scored = first + panel->count > queries - window;
                    panel->query = own + used++ * s->panel_words;
                    panel->mixed = panel->query + head_size * PANEL;
                    panel->best_of_span = panel->mixed + head_size * PANEL;
                    panel->shares = panel->best_of_span + s->slots * PANEL;
                    for (int j = 0; j < PANEL; j++)
                        panel->starts[j / LANES][j % LANES] =
                            starts ? starts[first + (j < panel->count ? j : panel->count - 1)] : 0;
                    panel->begin = panel->starts[0][0] / SPAN * SPAN;
                    for (int half = 0; half < 2; half++)
                        panel->best[half] = all(-FLT_MAX), panel->total[half] = all(0);
                    const float *words = (const float *)query + (first * heads + head) * depth;
                    pack_panel(words, heads * depth, panel->count, depth, panel->query);
                    memset(panel->mixed, 0, sizeof(float) * head_size * PANEL);
                }
            const float *own_keys = keys + kv_head * s->padded * depth;
            const float *own_values = values + kv_head * s->padded * depth;
            for (int64_t start = panels[0].begin; start < panels[used - 1].end; start += SPAN)
                for (int i = 0; i < used; i++) {
                    const int64_t visible = before + panels[i].first + 1 - start;
                    if (start < panels[i].begin || start >= panels[i].end) continue;
                    if (s->pairs)
                        attend_span(s, &panels[i], own_keys, own_values, logits, start, visible, 1);
                    else
                        attend_span(s, &panels[i], own_keys, own_values, logits, start, visible, 0);
                }
            for (int i = 0; i < used; i++) {
                store_panel(s, &panels[i], out);
                if (!panels[i].scored) continue;
                lanes each[2];
                for (int j = 0; j < PANEL; j++) {
                    const int64_t row = panels[i].first + j - (queries - window);
                    const int counts = row >= 0 && j < panels[i].count;
                    each[j / LANES][j % LANES] = counts ? weights[row] / (greatest ? 1 : s->group) : 0;
                }
                if (greatest)
                    score_panel(s, &panels[i], each, context, seen + kv_head * s->seen_words, 1);
                else
                    score_panel(s, &panels[i], each, context, seen + kv_head * s->seen_words, 0);
            }
        }
#pragma omp for
        for (int64_t place = 0; place < (window ? kv_heads * context : 0); place++) {
            const int64_t kv_head = place / context, token = place % context;
            lanes whole = all(0);
            for (int thread = 0; thread < omp_get_num_threads(); thread++) {
                const float *own = threads_own + (thread + 1) * s->thread_words - (kv_heads - kv_head) * s->seen_words;
                whole = joined(whole, load_lanes(own, token * LANES, 0), greatest);
            }
            float score = 0;
            for (int i = 0; i < LANES; i++) score = greatest ? fmaxf(score, whole[i]) : score + whole[i];
            scores[place] = score;
        }
    }
}
