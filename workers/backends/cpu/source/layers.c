#include <omp.h>

#include "kernels.h"

// The weights of a layer, each [columns, size]; biases may be null, and norms of heads. `rotates`: by position.
typedef struct {
    const void *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *output, *output_bias, *mlp_norm, *gate_up,
        *gate_up_bias, *down, *down_bias;
    int64_t rotates;
} layer_weights;

typedef struct {
    int64_t layers, hidden, intermediate;
    int heads, kv_heads, head_size;
    float epsilon;
} layer_shape;

// Adds the time since `began` to `sum`, in the first thread alone; it is now that something else begins.
static void clock_to(double *sum, double *began) {
    if (omp_get_thread_num()) return;
    const double now = omp_get_wtime();
    *sum += now - *began, *began = now;
}

static paged_cache layer_of(const paged_cache *all, int64_t layer, int64_t sequences) {
    paged_cache one = *all;
    one.pages += layer * sequences * all->width;
    one.lengths += layer * sequences;
    if (all->starts) one.starts += layer * sequences;
    return one;
}

// One new token of each sequence through all layers: a whole decode step in one call.
//
// hidden: float [sequences, hidden], changed; cache: the first layer's, which others follow, its rows the KV pool,
// into which slots [layers, sequences] the new tokens' keys and values are written, its pages
// [layers, sequences, width], starts and lengths [layers, sequences] counting them already; recent, recent_slots and spilled:
// likewise; shares: float [layers, sequences, kv_heads, tail]. See `decode_attention`. scratch: as many floats as fused.py says. seconds: what
// products, attention and the rest took is added to its three.
void decode_layers(const layer_weights *weights, const layer_shape *shape, float *hidden, const float *cos,
                   const float *sin, const paged_cache *cache, const paged_cache *recent, const paged_cache *spilled,
                   const int64_t *slots, const int64_t *recent_slots, float *scratch, float *shares, double *seconds, int64_t sequences, int64_t tail, int bf16,
                   int stored, int threads) {
    const int64_t n = sequences, size = shape->hidden, inner = shape->intermediate;
    const int heads = shape->heads, kv_heads = shape->kv_heads, head_size = shape->head_size;
    const int64_t own = (int64_t)heads * head_size, projected_size = own + 2 * kv_heads * head_size;
    float *normed = scratch, *projected = normed + n * size, *query = projected + n * projected_size;
    float *attended = query + n * own, *gate_up = attended + n * own, *product = gate_up + n * 2 * inner;
    float *logits = product + n * inner, *partials = logits + n * heads * tail;
#pragma omp parallel num_threads(threads)
    {
        double began = omp_get_wtime();
        for (int64_t layer = 0; layer < shape->layers; layer++) {
            const layer_weights *w = weights + layer;
            const int64_t first = layer * n;
            rms_norm_rows(hidden, w->input_norm, normed, n, size, shape->epsilon, 0, bf16, stored);
            clock_to(&seconds[2], &began);
            linear_rows(normed, w->qkv, w->qkv_bias, projected, n, projected_size, size, 0, bf16, stored);
            clock_to(&seconds[0], &began);
            const head_norms norms = {w->query_norm, w->key_norm, shape->epsilon};
            const kv_target targets[2] = {
                {cache->rows, slots + first, cache->row_bytes, cache->format},
                {recent->rows, recent_slots + first, recent->row_bytes, recent->format},
            };
            rotate_rows(projected, &norms, w->rotates ? cos : 0, w->rotates ? sin : 0, query,
                        targets, n, heads, kv_heads, head_size, 0, bf16, stored);
            clock_to(&seconds[2], &began);
            const paged_cache here = layer_of(cache, layer, n), newest = layer_of(recent, layer, n);
            const paged_cache there = layer_of(spilled, layer, n);
            decode_attention_rows(query, &here, &newest, &there, attended, partials, logits,
                                  shares + first * kv_heads * tail, 0, n, tail, heads, kv_heads, head_size, bf16);
            clock_to(&seconds[1], &began);
            linear_rows(attended, w->output, w->output_bias, hidden, n, size, own, 1, bf16, stored);
            clock_to(&seconds[0], &began);
            rms_norm_rows(hidden, w->mlp_norm, normed, n, size, shape->epsilon, 0, bf16, stored);
            clock_to(&seconds[2], &began);
            linear_rows(normed, w->gate_up, w->gate_up_bias, gate_up, n, 2 * inner, size, 0, bf16, stored);
            clock_to(&seconds[0], &began);
            silu_product_rows(gate_up, product, n, inner, 0, bf16);
            clock_to(&seconds[2], &began);
            linear_rows(product, w->down, w->down_bias, hidden, n, size, inner, 1, bf16, stored);
            clock_to(&seconds[0], &began);
        }
    }
}
