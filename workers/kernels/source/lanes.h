// The engine's own CPU kernels; each has a twin in torch_kernels.py, which is its reference.
//
// Values are float or bfloat16 in memory and float in registers: `bf16` says which it is of activations,
// `stored` of weights and KV. Every function divides its rows among `threads` threads of the OpenMP runtime
// that torch has loaded.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define PAGE_TOKENS 16

static inline float widen(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// Rounds to nearest, ties to even, as torch does.
static inline uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Sixteen values side by side; the compiler splits it where registers are smaller.
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t indices __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
#define LANES 16

static inline lanes load_lanes(const void *source, int64_t first, int bf16) {
    lanes value;
    if (bf16) {
        halves bits;
        memcpy(&bits, (const uint16_t *)source + first, sizeof bits);
#ifdef __AVX512F__
        // One instruction, which the compiler does not find for itself.
        value = (lanes)((indices)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
        value = (lanes)(__builtin_convertvector(bits, indices) << 16);
#endif
    } else {
        memcpy(&value, (const float *)source + first, sizeof value);
    }
    return value;
}

// The sums of sixteen vectors, in order: pairs are added until one vector is left. Changes `v`.
static inline lanes sums_of(lanes v[LANES]) {
    const indices even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const indices odd = even + 1;
#pragma GCC unroll 4
    for (int count = LANES / 2; count; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) +
                   __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    return v[0];
}

static inline lanes all(float value) { return value - (lanes){0}; }

// Where `mask` is -1 the value of `yes`, where it is 0 that of `no`.
static inline lanes choose(indices mask, lanes yes, lanes no) {
    return (lanes)(((indices)yes & mask) | ((indices)no & ~mask));
}

static inline float greatest(lanes v) {
    const indices order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int step = LANES / 2; step; step /= 2) {
        const lanes other = __builtin_shuffle(v, order ^ step);
        v = choose(v > other, v, other);
    }
    return v[0];
}

// exp(x) for x <= 0 to about 2 units in the last place: 2^n * p(r), |r| <= ln(2) / 2; below -87 it is that
// of -87.
static inline lanes exp_lanes(lanes x) {
    x = choose(x < all(-87.0f), all(-87.0f), x);
    // Adding 1.5 * 2^23 rounds to a whole number.
    const lanes n = (x * 1.44269504089f + 12582912.0f) - 12582912.0f;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (lanes)((__builtin_convertvector(n, indices) + 127) << 23);
}

static inline float exp_negative(float x) { return exp_lanes(all(x))[0]; }

static inline void load(const void *source, int64_t first, int count, int bf16, float *out) {
    if (bf16) {
        const uint16_t *values = (const uint16_t *)source + first;
        for (int i = 0; i < count; i++) out[i] = widen(values[i]);
    } else {
        memcpy(out, (const float *)source + first, sizeof(float) * count);
    }
}

static inline void store(void *target, int64_t first, int count, int bf16, const float *in) {
    if (bf16) {
        uint16_t *values = (uint16_t *)target + first;
        for (int i = 0; i < count; i++) values[i] = narrow(in[i]);
    } else {
        memcpy((float *)target + first, in, sizeof(float) * count);
    }
}
