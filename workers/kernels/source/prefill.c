#include "panels.h"

// Tokens that queries attend to at a time: a multiple of TILE_ROWS. Their keys and values are read from the
// cache by all panels of a task, of which there are at least PANELS where there are as many queries.
#define SPAN 120
#define PANELS 3

// What a thread holds of PANEL queries of one head, all transposed, with what it has attended to so far.
// `shares` are exp(logit - best of the span), of all spans while the window's attention is wanted, else of
// the last.
typedef struct {
    int64_t first, count, end;
    int head, scored;
    float *query, *mixed, *best_of_span, *shares;
    lanes best[2], total[2];
} panel_state;

static inline lanes maximum(lanes a, lanes b) { return choose(a > b, a, b); }

// Turns the logits of `count` tokens into shares. The first query may attend to `visible` of them, each
// further one to one more. What was summed before shrinks to the new greatest logit.
static inline void exponentiate(panel_state *panel, float *shares, int count, int64_t visible, int head_size) {
    const indices query = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int half = 0; half < 2; half++) {
        float *own = shares + half * LANES;
        for (int t = visible < 0 ? 0 : visible; t < count; t++) {
            const indices attends = query + half * LANES > (int32_t)(t - visible);
            const lanes logit = choose(attends, load_lanes(own, t * PANEL, 0), all(-INFINITY));
            memcpy(own + t * PANEL, &logit, sizeof logit);
        }
        lanes best = panel->best[half], total = all(0);
        for (int t = 0; t < count; t++) best = maximum(best, load_lanes(own, t * PANEL, 0));
        for (int t = 0; t < count; t++) {
            const lanes share = exp_lanes(load_lanes(own, t * PANEL, 0) - best);
            memcpy(own + t * PANEL, &share, sizeof share);
            total += share;
        }
        const lanes shrink = exp_lanes(panel->best[half] - best);
        panel->best[half] = best;
        panel->total[half] = panel->total[half] * shrink + total;
        for (int i = 0; i < head_size; i++) {
            const lanes before = load_lanes(panel->mixed, i * PANEL + half * LANES, 0) * shrink;
            memcpy(panel->mixed + i * PANEL + half * LANES, &before, sizeof before);
        }
    }
}

// Attends to tokens `start` to `start + SPAN`, as far as they go.
static inline void attend_span(panel_state *panel, const float *keys, const float *values, int64_t start,
                               int64_t before, int head_size) {
    const int count = panel->end - start < SPAN ? panel->end - start : SPAN;
    const int64_t slot = panel->scored ? start / SPAN : 0;
    float *shares = panel->shares + slot * SPAN * PANEL, *mixed = panel->mixed;
    for (int t = 0; t < count; t += TILE_ROWS)
        multiply_tile(TILE_ROWS, keys + (start + t) * head_size, head_size, 1, panel->query, head_size, 1,
                      shares + t * PANEL);
    exponentiate(panel, shares, count, before + panel->first + 1 - start, head_size);
    memcpy(panel->best_of_span + slot * PANEL, panel->best, sizeof panel->best);
    const float *own = values + start * head_size;
    int done = 0;
    for (; (head_size - done) % TILE_ROWS; done += 8)
        multiply_tile(8, own + done, 1, head_size, shares, count, 0, mixed + done * PANEL);
    for (; done < head_size; done += TILE_ROWS)
        multiply_tile(TILE_ROWS, own + done, 1, head_size, shares, count, 0, mixed + done * PANEL);
}

// Writes the panel's output, over what all shares come to.
static inline void store_panel(const panel_state *panel, void *out, int heads, int head_size, int bf16) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < head_size; i += LANES) {
            lanes v[LANES];
            for (int j = 0; j < LANES; j++)
                v[j] = load_lanes(panel->mixed, (i + j) * PANEL + half * LANES, 0) / panel->total[half];
            transpose(v);
            for (int j = 0; j < LANES && half * LANES + j < panel->count; j++) {
                const int64_t row = panel->first + half * LANES + j;
                store(out, (row * heads + panel->head) * head_size + i, LANES, bf16, (float *)&v[j]);
            }
        }
}

// seen [context, LANES] += the attention of the panel's queries that are of the window, each by its weight.
static inline void score_panel(const panel_state *panel, const lanes weights[2], int64_t context, float *seen) {
    for (int64_t start = 0; start < context; start += SPAN) {
        const float *shares = panel->shares + start * PANEL, *best = panel->best_of_span + start / SPAN * PANEL;
        const int width = context - start < SPAN ? context - start : SPAN;
        lanes factor[2];
        for (int half = 0; half < 2; half++)
            factor[half] = weights[half] / panel->total[half] *
                           exp_lanes(load_lanes(best, half * LANES, 0) - panel->best[half]);
        for (int t = 0; t < width; t++) {
            lanes sum = load_lanes(seen, (start + t) * LANES, 0);
            for (int half = 0; half < 2; half++)
                sum += load_lanes(shares, t * PANEL + half * LANES, 0) * factor[half];
            memcpy(seen + (start + t) * LANES, &sum, sizeof sum);
        }
    }
}

// Causal attention of `queries` rows, the last of `tokens` tokens, and what the last `window` of them attend
// to before the window: their shares, averaged over heads, weighted by `weights` [window] and summed.
//
// query, out [queries, heads, head_size], head_size a multiple of 16; kv [tokens, 2, kv_heads, head_size];
// scores: float [tokens - window], written if there is a window. scratch: as many floats as native.py says.
void prefill_attention(const void *query, const void *kv, const float *weights, void *out, float *scratch,
                       float *scores, int64_t queries, int64_t tokens, int64_t window, int heads,
                       int kv_heads, int head_size, int bf16, int stored, int threads) {
    const int group = heads / kv_heads, stack = (PANELS + group - 1) / group;
    const float scale = 1.0f / sqrtf(head_size);
    const int64_t padded = (tokens + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS, context = tokens - window;
    const int64_t row_size = (int64_t)2 * kv_heads * head_size, before = tokens - queries;
    const int64_t slots = window ? (tokens + SPAN - 1) / SPAN : 1;
    const int64_t panel_size = (2 * head_size + slots * (SPAN + 1)) * PANEL;
    const int64_t thread_size = group * stack * panel_size + (window ? tokens * LANES : 0);
    const int64_t tasks = (queries + stack * PANEL - 1) / (stack * PANEL);
    float *keys = scratch, *values = keys + padded * head_size, *threads_own = values + padded * head_size;
#pragma omp parallel num_threads(threads)
    {
        float *own = threads_own + omp_get_thread_num() * thread_size;
        float *seen = own + group * stack * panel_size;
        panel_state panels[group * stack];
        if (window) memset(seen, 0, sizeof(float) * tokens * LANES);
        for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
#pragma omp for
            for (int64_t token = 0; token < padded; token++) {
                const int64_t from = token * row_size + kv_head * head_size, to = token * head_size;
                if (token < tokens) {
                    load(kv, from, head_size, stored, keys + to);
                    load(kv, from + kv_heads * head_size, head_size, stored, values + to);
                } else {
                    memset(keys + to, 0, sizeof(float) * head_size);
                }
            }
            // Dealt out in turn, not as threads are free: sums are then the same in every run.
#pragma omp for schedule(static, 1)
            for (int64_t task = 0; task < tasks; task++) {
                int used = 0;
                for (int64_t first = task * stack * PANEL;
                     first < queries && first < (task + 1) * stack * PANEL; first += PANEL)
                    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                        panel_state *panel = &panels[used];
                        panel->first = first, panel->head = head;
                        panel->count = queries - first < PANEL ? queries - first : PANEL;
                        panel->end = before + first + panel->count;
                        panel->scored = window && panel->end > context;
                        panel->query = own + used++ * panel_size;
                        panel->mixed = panel->query + head_size * PANEL;
                        panel->best_of_span = panel->mixed + head_size * PANEL;
                        panel->shares = panel->best_of_span + slots * PANEL;
                        for (int half = 0; half < 2; half++)
                            panel->best[half] = all(-INFINITY), panel->total[half] = all(0);
                        const char *rows = (const char *)query + first * heads * head_size * (bf16 ? 2 : 4);
                        pack_panel(rows, heads * head_size, panel->count, head * head_size, head_size, bf16,
                                   panel->query);
                        for (int i = 0; i < head_size * PANEL; i++) panel->query[i] *= scale;
                        memset(panel->mixed, 0, sizeof(float) * head_size * PANEL);
                    }
                for (int64_t start = 0; start < panels[used - 1].end; start += SPAN)
                    for (int i = 0; i < used; i++)
                        if (start < panels[i].end)
                            attend_span(&panels[i], keys, values, start, before, head_size);
                for (int i = 0; i < used; i++) {
                    store_panel(&panels[i], out, heads, head_size, bf16);
                    if (!panels[i].scored) continue;
                    lanes each[2];
                    for (int j = 0; j < PANEL; j++) {
                        const int64_t row = panels[i].first + j - (queries - window);
                        const int counts = row >= 0 && j < panels[i].count;
                        each[j / LANES][j % LANES] = counts ? weights[row] / heads : 0;
                    }
                    score_panel(&panels[i], each, context, seen);
                }
            }
        }
#pragma omp for
        for (int64_t token = 0; token < (window ? context : 0); token++) {
            lanes sum = all(0);
            for (int thread = 0; thread < omp_get_num_threads(); thread++)
                sum += load_lanes(threads_own + (thread + 1) * thread_size, (token - tokens) * LANES, 0);
            scores[token] = 0;
            for (int i = 0; i < LANES; i++) scores[token] += sum[i];
        }
    }
}
