#include <omp.h>
#include <string.h>

#include "kernels.h"

// The weights of a layer, each [columns, size]; biases may be null.
typedef struct {
    const void *input_norm, *qkv, *qkv_bias, *output, *output_bias, *mlp_norm, *gate_up, *gate_up_bias, *down,
        *down_bias;
} layer_weights;

typedef struct {
    int64_t layers, hidden, intermediate;
    int heads, kv_heads, head_size;
    float epsilon;
} layer_shape;

static void add(float *to, const float *what, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += what[i];
}

// One new token of each sequence through all layers: a whole decode step in one call.
//
// hidden: float [sequences, hidden], changed; rows: the KV pool, into whose rows slots [layers, sequences]
// the new tokens' keys and values are written; pages [layers, sequences, width], lengths [layers, sequences]
// count them already; shares: float [layers, sequences, tail]. See `decode_attention`. scratch: as many
// floats as fused.py says. seconds: what products and attention took is added to its two.
void decode_layers(const layer_weights *weights, const layer_shape *shape, float *hidden, const float *cos,
                   const float *sin, void *rows, const int64_t *slots, const int32_t *pages,
                   const int32_t *lengths, float *scratch, float *shares, double *seconds, int64_t sequences,
                   int64_t width, int64_t chunks, int64_t tail, int stored, int threads) {
    const int64_t size = shape->hidden, own = (int64_t)shape->heads * shape->head_size;
    const int64_t kv_size = (int64_t)2 * shape->kv_heads * shape->head_size, projected_size = own + kv_size;
    const int64_t row_bytes = kv_size * (stored ? 2 : 4);
    float *normed = scratch, *projected = normed + sequences * size;
    float *query = projected + sequences * projected_size, *kv = query + sequences * own;
    float *attended = kv + sequences * kv_size, *added = attended + sequences * own;
    float *gate_up = added + sequences * size, *product = gate_up + sequences * 2 * shape->intermediate;
    float *logits = product + sequences * shape->intermediate;
    float *partials = logits + sequences * shape->heads * tail;
    for (int64_t layer = 0; layer < shape->layers; layer++) {
        const layer_weights *w = weights + layer;
        const int64_t first = layer * sequences;
        rms_norm(hidden, w->input_norm, normed, sequences, size, shape->epsilon, 0, stored, threads);
        double began = omp_get_wtime();
        linear(normed, w->qkv, w->qkv_bias, projected, sequences, projected_size, size, stored, threads);
        seconds[0] += omp_get_wtime() - began;
        rotate(projected, cos, sin, query, kv, sequences, shape->heads, shape->kv_heads, shape->head_size, 0,
               stored, threads);
        for (int64_t i = 0; i < sequences; i++)
            memcpy((char *)rows + slots[first + i] * row_bytes, (char *)kv + i * row_bytes, row_bytes);
        began = omp_get_wtime();
        decode_attention(query, rows, pages + first * width, lengths + first, attended, partials, logits,
                         shares + first * tail, sequences, width, chunks, tail, shape->heads, shape->kv_heads,
                         shape->head_size, 0, stored, threads);
        seconds[1] += omp_get_wtime() - began, began = omp_get_wtime();
        linear(attended, w->output, w->output_bias, added, sequences, size, own, stored, threads);
        seconds[0] += omp_get_wtime() - began;
        add(hidden, added, sequences * size);
        rms_norm(hidden, w->mlp_norm, normed, sequences, size, shape->epsilon, 0, stored, threads);
        began = omp_get_wtime();
        linear(normed, w->gate_up, w->gate_up_bias, gate_up, sequences, 2 * shape->intermediate, size, stored,
               threads);
        seconds[0] += omp_get_wtime() - began;
        silu_product(gate_up, product, sequences, shape->intermediate, 0, threads);
        began = omp_get_wtime();
        linear(product, w->down, w->down_bias, added, sequences, size, shape->intermediate, stored, threads);
        seconds[0] += omp_get_wtime() - began;
        add(hidden, added, sequences * size);
    }
}
