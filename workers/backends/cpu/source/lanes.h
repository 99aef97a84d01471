// The engine's own CPU kernels; each has a twin in reference.py, which is its reference.
//
// Values are float or bfloat16 in memory: `bf16` says which it is of activations, `stored` of weights and KV.
// Sums are taken in float. A function named `..._rows` shares its work out among the threads of the parallel
// region that it is called in, and ends with a barrier; the others open a region of the OpenMP runtime that
// torch has loaded.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

// PAGE_TOKENS, CHUNK, LANES, PARTIAL and COLUMNS are those of shared.py.

// Sixteen values side by side; the compiler splits it where registers are smaller.
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t indices __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
_Static_assert(LANES * sizeof(float) == sizeof(lanes), "a vector has LANES values");

static inline lanes all(float value) { return value - (lanes){0}; }

// The same word, a float or two bfloat16 that lie side by side, sixteen times.
static inline lanes all_words(const float *word) {
    int32_t bits;
    memcpy(&bits, word, 4);
    return (lanes)(bits + (indices){0});
}

static inline lanes widen(halves bits) {
#ifdef __AVX512F__
    // One instruction, which the compiler does not find for itself.
    return (lanes)((indices)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
    return (lanes)(__builtin_convertvector(bits, indices) << 16);
#endif
}

// Rounds to nearest, ties to even, as torch does; what is too small for a normal number may become 0.
static inline halves narrow(lanes value) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const indices bits = (indices)value, is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const indices rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), halves);
#endif
}

static inline lanes load_lanes(const void *source, int64_t first, int bf16) {
    lanes value;
    if (bf16) {
        halves bits;
        memcpy(&bits, (const uint16_t *)source + first, sizeof bits);
        return widen(bits);
    }
    memcpy(&value, (const float *)source + first, sizeof value);
    return value;
}

static inline void store_lanes(void *target, int64_t first, int bf16, lanes value) {
    if (bf16) {
        const halves bits = narrow(value);
        memcpy((uint16_t *)target + first, &bits, sizeof bits);
    } else {
        memcpy((float *)target + first, &value, sizeof value);
    }
}

static inline void load(const void *source, int64_t first, int count, int bf16, float *out) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store_lanes(out, i, 0, load_lanes(source, first + i, bf16));
    for (; i < count; i++) {
        const uint32_t bits = bf16 ? (uint32_t)((const uint16_t *)source)[first + i] << 16 : 0;
        memcpy(out + i, bf16 ? (const void *)&bits : (const float *)source + first + i, 4);
    }
}

static inline void store(void *target, int64_t first, int count, int bf16, const float *in) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store_lanes(target, first + i, bf16, load_lanes(in, i, 0));
    for (; i < count; i++) {
        const halves bits = narrow(all(in[i]));
        if (bf16)
            memcpy((uint16_t *)target + first + i, &bits, 2);
        else
            ((float *)target)[first + i] = in[i];
    }
}

// Two bfloat16 a word, that of `low` first.
static inline lanes pair_up(lanes low, lanes high) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (lanes)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    const indices lower = __builtin_convertvector(narrow(low), indices);
    return (lanes)(lower | __builtin_convertvector(narrow(high), indices) << 16);
#endif
}

static inline lanes low_of(lanes words) { return (lanes)((indices)words << 16); }
static inline lanes high_of(lanes words) { return (lanes)((indices)words & ~0xffff); }

// sums + a * b, where words are floats, or of both values of a word where they are `pairs`.
static inline lanes multiply(lanes sums, lanes a, lanes b, int pairs) {
    if (!pairs) return sums + a * b;
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return sums + low_of(a) * low_of(b) + high_of(a) * high_of(b);
#endif
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

// Where `mask` is -1 the value of `yes`, where it is 0 that of `no`.
static inline lanes choose(indices mask, lanes yes, lanes no) {
    return (lanes)(((indices)yes & mask) | ((indices)no & ~mask));
}

static inline lanes maximum(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline float greatest(lanes v) {
    const indices order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int step = LANES / 2; step; step /= 2) v = maximum(__builtin_shuffle(v, order ^ step), v);
    return v[0];
}

// 2^x for x <= 0, to 1e-7 of it: 2^n * p(r), |r| <= 1/2; below -126 it is that of -126.
static inline lanes exp2_lanes(lanes x) {
    x = maximum(x, all(-126.0f));
#ifdef __AVX512F__
    const lanes n = (lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding 1.5 * 2^23 rounds to a whole number.
    const lanes n = (x + 12582912.0f) - 12582912.0f;
#endif
    const lanes r = x - n;
    lanes p = r * 1.3264727e-3f + 9.6715130e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (lanes)((__builtin_convertvector(n, indices) + 127) << 23);
#endif
}

#define LOG2_E 1.44269504f

static inline lanes exp_lanes(lanes x) { return exp2_lanes(x * LOG2_E); }

static inline float exp_negative(float x) { return exp_lanes(all(x))[0]; }
