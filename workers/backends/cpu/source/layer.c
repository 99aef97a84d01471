#include "kernels.h"
#include "rows.h"

// Fewer values than this are not worth a second thread.
#define ALONE 16384

// 1 / rms(values), of `size` values that have room for LANES more behind them.
static inline float inverse_rms(float *values, int64_t size, float epsilon) {
    lanes sums = all(0);
    memset(values + size, 0, sizeof(float) * LANES);
    for (int64_t i = 0; i < size; i += LANES) {
        const lanes value = load_lanes(values, i, 0);
        sums += value * value;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return 1.0f / sqrtf(sum / size + epsilon);
}

// out[row] = x[row] / rms(x[row]) * weight, [rows, size].
void rms_norm_rows(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon,
                   int from_bf16, int bf16, int stored) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float values[size + LANES];
        load(x, row * size, size, from_bf16, values);
        const float inverse = inverse_rms(values, size, epsilon);
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            store_lanes(out, row * size + i, bf16,
                        load_lanes(values, i, 0) * inverse * load_lanes(weight, i, stored));
        float scales[LANES];
        load(weight, i, size - i, stored, scales);
        for (int64_t j = i; j < size; j++) values[j] *= inverse * scales[j - i];
        store(out, row * size + i, size - i, bf16, values + i);
    }
}

void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon, int bf16,
              int stored, int threads) {
#pragma omp parallel num_threads(threads) if (rows * size > ALONE)
    rms_norm_rows(x, weight, out, rows, size, epsilon, bf16, bf16, stored);
}

// out = silu(gate) * up, of gate_up [rows, 2 * size] to [rows, size].
void silu_product_rows(const void *gate_up, void *out, int64_t rows, int64_t size, int from_bf16, int bf16) {
    const int64_t block = 512, blocks = (size + block - 1) / block;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < rows * blocks; task++) {
        const int64_t row = task / blocks, first = task % blocks * block;
        const int count = size - first < block ? size - first : block;
        float gate[block + LANES], up[block + LANES];
        load(gate_up, row * 2 * size + first, count, from_bf16, gate);
        load(gate_up, row * 2 * size + size + first, count, from_bf16, up);
        for (int i = 0; i < count; i += LANES) {
            const lanes g = load_lanes(gate, i, 0);
            // exp of a number that is not positive, whatever the sign of the gate.
            const lanes e = exp_lanes((lanes)((indices)g | INT32_MIN));
            store_lanes(up, i, 0, g * choose(g < all(0), e, all(1)) / (e + 1.0f) * load_lanes(up, i, 0));
        }
        store(out, row * size + first, count, bf16, up);
    }
}

void silu_product(const void *gate_up, void *out, int64_t rows, int64_t size, int bf16, int threads) {
#pragma omp parallel num_threads(threads) if (rows * size > ALONE)
    silu_product_rows(gate_up, out, rows, size, bf16, bf16);
}

// Splits projected [rows, heads + 2 * kv_heads, head_size] into rotated queries [rows, heads, head_size] and
// rotated keys and values, which are written to both targets; cos and sin are float [rows, head_size / 2], null where
// nothing is rotated. Before that, each query and key is normed, where there are norms [head_size].
void rotate_rows(const void *projected, const head_norms *norms, const float *cos, const float *sin, void *query,
                 const kv_target *targets, int64_t rows, int heads, int kv_heads, int head_size, int from_bf16, int bf16,
                 int stored) {
    const int64_t half = head_size / 2, width = (int64_t)(heads + 2 * kv_heads) * head_size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + row * half, *s = sin + row * half;
        for (int head = 0; head < heads + 2 * kv_heads; head++) {
            float in[head_size + LANES], out[head_size];
            load(projected, row * width + (int64_t)head * head_size, head_size, from_bf16, in);
            const int is_value = head >= heads + kv_heads;
            if (norms->query && !is_value) {
                float scales[head_size];
                load(head < heads ? norms->query : norms->key, 0, head_size, stored, scales);
                const float inverse = inverse_rms(in, head_size, norms->epsilon);
                for (int64_t i = 0; i < head_size; i++) in[i] *= inverse * scales[i];
            }
            if (cos && !is_value) {
                for (int64_t i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] - in[i + half] * s[i];
                    out[i + half] = in[i + half] * c[i] + in[i] * s[i];
                }
            } else {
                memcpy(out, in, sizeof(float) * head_size);
            }
            if (head < heads) {
                store(query, (row * heads + head) * head_size, head_size, bf16, out);
                continue;
            }
            for (const kv_target *target = targets; target < targets + 2 && target->rows; target++) {
                const int64_t slot = target->slots ? target->slots[row] : row, bytes = head_bytes(target->format, head_size);
                char *place = (char *)target->rows + slot * target->row_bytes + (head - heads) * bytes;
                memcpy(in, out, sizeof(float) * head_size);
                store_head(target->format, place, head_size, in);
            }
        }
    }
}

void rotate(const void *projected, const head_norms *norms, const float *cos, const float *sin, void *query, void *kv,
            int64_t rows, int heads, int kv_heads, int head_size, int bf16, int stored, int threads) {
    const int format = stored ? BFLOAT16 : FLOAT32;
    const kv_target targets[2] = {{kv, 0, 2 * kv_heads * head_bytes(format, head_size), format}, {0, 0, 0, 0}};
#pragma omp parallel num_threads(threads) if (rows * (heads + 2 * kv_heads) * head_size > ALONE)
    rotate_rows(projected, norms, cos, sin, query, targets, rows, heads, kv_heads, head_size, bf16, bf16, stored);
}
