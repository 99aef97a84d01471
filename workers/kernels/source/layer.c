#include "kernels.h"
#include "lanes.h"

// out[row] = x[row] / rms(x[row]) * weight, [rows, size].
void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon,
              int bf16, int stored, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        float values[size], scales[size];
        load(x, row * size, size, bf16, values);
        load(weight, 0, size, stored, scales);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += values[i] * values[i];
        float inverse = 1.0f / sqrtf(sum / size + epsilon);
        for (int64_t i = 0; i < size; i++) values[i] = values[i] * inverse * scales[i];
        store(out, row * size, size, bf16, values);
    }
}

// out = silu(gate) * up, of gate_up [rows, 2 * size] to [rows, size].
void silu_product(const void *gate_up, void *out, int64_t rows, int64_t size, int bf16, int threads) {
    const int64_t block = 512, blocks = (size + block - 1) / block;
#pragma omp parallel for num_threads(threads) if (rows * size > 16384)
    for (int64_t task = 0; task < rows * blocks; task++) {
        int64_t row = task / blocks, first = task % blocks * block;
        int count = size - first < block ? size - first : block;
        float gate[block + LANES], up[block];
        load(gate_up, row * 2 * size + first, count, bf16, gate);
        load(gate_up, row * 2 * size + size + first, count, bf16, up);
        for (int i = 0; i < count; i += LANES) {
            const lanes g = load_lanes(gate, i, 0);
            // exp of a number that is not positive, whatever the sign of the gate.
            const lanes e = exp_lanes((lanes)((indices)g | INT32_MIN));
            const lanes silu = g * choose(g < all(0), e, all(1)) / (e + 1.0f);
            memcpy(gate + i, &silu, sizeof silu);
        }
        for (int i = 0; i < count; i++) up[i] *= gate[i];
        store(out, row * size + first, count, bf16, up);
    }
}

// Splits projected [rows, heads + 2 * kv_heads, head_size] into rotated queries [rows, heads, head_size]
// and rotated keys and values [rows, 2, kv_heads, head_size]; cos and sin are float [rows, head_size / 2].
void rotate(const void *projected, const float *cos, const float *sin, void *query, void *kv, int64_t rows,
            int heads, int kv_heads, int head_size, int bf16, int stored, int threads) {
    const int64_t half = head_size / 2, width = (int64_t)(heads + 2 * kv_heads) * head_size;
#pragma omp parallel for num_threads(threads) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + row * half, *s = sin + row * half;
        for (int head = 0; head < heads + 2 * kv_heads; head++) {
            float in[head_size], out[head_size];
            load(projected, row * width + (int64_t)head * head_size, head_size, bf16, in);
            if (head < heads + kv_heads) {
                for (int64_t i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] - in[i + half] * s[i];
                    out[i + half] = in[i + half] * c[i] + in[i] * s[i];
                }
            } else {
                memcpy(out, in, sizeof(float) * head_size);
            }
            if (head < heads)
                store(query, (row * heads + head) * head_size, head_size, bf16, out);
            else
                store(kv, (row * 2 * kv_heads + head - heads) * head_size, head_size, stored, out);
        }
    }
}

