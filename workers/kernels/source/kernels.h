// What the kernels are to each other; each is described where it is defined.
#pragma once

#include <stdint.h>

void linear(const float *x, const void *weight, const void *bias, float *out, int64_t rows, int64_t columns,
            int64_t size, int stored, int threads);
void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon,
              int bf16, int stored, int threads);
void silu_product(const void *gate_up, void *out, int64_t rows, int64_t size, int bf16, int threads);
void rotate(const void *projected, const float *cos, const float *sin, void *query, void *kv, int64_t rows,
            int heads, int kv_heads, int head_size, int bf16, int stored, int threads);
void decode_attention(const void *query, const void *rows, const int32_t *pages, const int32_t *lengths,
                      void *out, float *partials, float *logits, float *shares, int64_t sequences,
                      int64_t width, int64_t chunks, int64_t tail, int heads, int kv_heads, int head_size,
                      int bf16, int stored, int threads);
