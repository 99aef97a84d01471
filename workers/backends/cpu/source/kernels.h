// What the kernels are to each other; each is described where it is defined.
#pragma once

#include <stdint.h>

// KV of several sequences: pages [sequences, width], lengths [sequences], the first token of each that is attended to
// [sequences], null for 0, parts of the longest; bytes from row to row, the format of what is in them, see rows.h, and
// rows of a page.
typedef struct {
    void *rows;
    const int32_t *pages, *lengths, *starts;
    int64_t width, chunks, row_bytes;
    int format, page_tokens;
} paged_cache;

// Weights of the norms of queries and keys, each [head_size]; null where there are none.
typedef struct {
    const void *query, *key;
    float epsilon;
} head_norms;

// Where new keys and values are written: those of row i to row slots[i], or row i without slots, of [*, 2, kv_heads,
// head_bytes], with so many bytes from row to row; nowhere without rows.
typedef struct {
    void *rows;
    const int64_t *slots;
    int64_t row_bytes;
    int format;
} kv_target;

void linear_rows(const void *x, const void *weight, const void *bias, float *out, int64_t rows, int64_t columns,
                 int64_t size, int add, int bf16, int stored);
void rms_norm_rows(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon,
                   int from_bf16, int bf16, int stored);
void silu_product_rows(const void *gate_up, void *out, int64_t rows, int64_t size, int from_bf16, int bf16);
void rotate_rows(const void *projected, const head_norms *norms, const float *cos, const float *sin, void *query,
                 const kv_target *targets, int64_t rows, int heads, int kv_heads, int head_size, int from_bf16, int bf16,
                 int stored);
void decode_attention_rows(const void *query, const paged_cache *own_cache, const paged_cache *recent,
                           const paged_cache *spilled, void *out, float *partials, float *logits, float *shares,
                           float *lse, int64_t sequences, int64_t tail, int heads, int kv_heads, int head_size, int bf16);
