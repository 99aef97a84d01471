// Rows of a KV pool, [2, kv_heads, head_bytes]: workers/kv/rows.py says how numbers lie in them. FLOAT32, BFLOAT16,
// FLOAT16, INT8 and INT4 are those of shared.py; where a function takes a format as a constant, it is compiled for each.
#pragma once

#include "lanes.h"

// The greatest code of 8 bits, and what those of 4 stand for.
#define GREATEST 127.0f
static const float LEVELS[] = {-256, -197, -154, -119, -89, -62, -37, -12, 12, 37, 62, 89, 119, 154, 197, 256};

#define INLINE static inline __attribute__((always_inline))

INLINE int has_scale(int format) { return format == INT8 || format == INT4; }

// Bytes of the numbers of a head's key, or value; behind them lies its scale, if it has one.
INLINE int64_t code_bytes(int format, int head_size) {
    return format == FLOAT32 ? 4 * head_size : format == INT8 ? head_size : format == INT4 ? head_size / 2 : 2 * head_size;
}

INLINE int64_t head_bytes(int format, int head_size) {
    return code_bytes(format, head_size) + (has_scale(format) ? 2 : 0);
}

INLINE lanes widen_float16(halves bits) {
#ifdef __AVX512F__
    return _mm512_cvtph_ps((__m256i)bits);
#else
    const indices wide = __builtin_convertvector(bits, indices);
    const lanes size = (lanes)((wide & 0x7fff) << 13) * 0x1p112f;
    return (lanes)((indices)size | (wide & 0x8000) << 16);
#endif
}

// Rounds to nearest, ties to even.
INLINE halves narrow_float16(lanes value) {
    const indices sign = (indices)value & INT32_MIN, bits = (indices)((lanes)((indices)value ^ sign) * 0x1p-112f);
    const indices rounded = (bits + 0xfff + ((bits >> 13) & 1)) >> 13, infinite = rounded > 0x7c00;
    return __builtin_convertvector((((rounded & ~infinite) | (0x7c00 & infinite)) | (sign >> 16)) & 0xffff, halves);
}

// Whether numbers of a format are multiplied in pairs of bfloat16 where activations are bfloat16. Codes of 4 bits are
// exact in it, and one permutation of 32 words makes them of it.
#ifdef __AVX512BF16__
#define IN_PAIRS(format) ((format) == BFLOAT16 || (format) == INT4)

// Bfloat16 of what the lowest 4 bits of each word stand for.
INLINE lanes code_words(__m512i words) {
    const __m512 levels = _mm512_loadu_ps(LEVELS);
    // Twice: five bits of a word are looked at.
    return (lanes)_mm512_permutexvar_epi16(words, (__m512i)_mm512_cvtne2ps_pbh(levels, levels));
}
#else
#define IN_PAIRS(format) ((format) == BFLOAT16)
#endif

// Thirty-two numbers from the sixteen bytes of codes at `codes` on, bfloat16, in the order of `pair_query`.
INLINE lanes code_pairs(const char *codes) {
#ifdef __AVX512BF16__
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
    const __m512i bits = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi16(4), _mm_set1_epi16(0))),
                                            _mm256_set_m128i(_mm_set1_epi16(12), _mm_set1_epi16(8)), 1);
    return code_words(_mm512_srlv_epi16(words, bits));
#else
    __builtin_trap();  // not IN_PAIRS
#endif
}

// Writes a head of a query as bfloat16, the numbers side by side that `code_pairs` has so: of every two bytes of
// codes the lower and upper halves of the first, then of the second.
INLINE void pair_query(const float *query, int head_size, uint16_t *target) {
    const indices even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int at = 0; at < head_size / 2; at += LANES) {
        const lanes lower = load_lanes(query, at, 0), upper = load_lanes(query, head_size / 2 + at, 0);
        store_lanes(target, 2 * at, 1, __builtin_shuffle(lower, upper, even));
        store_lanes(target, 2 * at + LANES, 1, __builtin_shuffle(lower, upper, even + 1));
    }
}

// What the lowest 4 bits of each byte stand for.
typedef uint8_t codes __attribute__((vector_size(LANES)));
INLINE lanes levels_of(codes code) {
#ifdef __AVX512F__
    return (lanes)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32((__m128i)code), _mm512_loadu_ps(LEVELS));
#elif defined(__AVX2__)
    lanes level;
    for (int i = 0; i < LANES; i += 8) {
        // Of the upper half of the levels, and the negative of one for codes that are below 8.
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)&code + i)));
        const __m256i below = _mm256_cmpeq_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(8)), _mm256_setzero_si256());
        const __m256 size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS + 8), _mm256_xor_si256(wide, below));
        const __m256 sign = _mm256_and_ps((__m256)below, _mm256_set1_ps(-0.0f));
        const __m256 signed_size = _mm256_xor_ps(size, sign);
        memcpy((char *)&level + 4 * i, &signed_size, sizeof signed_size);
    }
    return level;
#else
    lanes level;
    for (int i = 0; i < LANES; i++) level[i] = LEVELS[code[i] & 15];
    return level;
#endif
}

// The codes of what is nearest to numbers beside their scale.
INLINE indices level_codes(lanes number) {
    indices code = {0};
#pragma GCC unroll 15
    for (int i = 0; i < 15; i++) code -= number > (LEVELS[i] + LEVELS[i + 1]) / 2;
    return code;
}

// Sixteen numbers of a head from `at` on, without their scale. Of 4 bits: those in the lower halves of bytes from
// there on, or in the `upper`, which are head_size / 2 numbers further.
INLINE lanes load_numbers(const int format, const char *head, int at, const int upper) {
    typedef int8_t signed_codes __attribute__((vector_size(LANES)));
    halves bits;
    signed_codes code;
    codes pair;
    switch (format) {
        case FLOAT32: return load_lanes(head, at, 0);
        case BFLOAT16: return load_lanes(head, at, 1);
        case FLOAT16:
            memcpy(&bits, head + 2 * at, sizeof bits);
            return widen_float16(bits);
        case INT8:
            memcpy(&code, head + at, sizeof code);
#ifdef __AVX512F__
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)code));
#else
            return __builtin_convertvector(__builtin_convertvector(code, indices), lanes);
#endif
        default:
            memcpy(&pair, head + at, sizeof pair);
            return levels_of(upper ? pair >> 4 : pair);
    }
}

// Words of sixteen numbers of the rows `low` and `high`, bfloat16, as `load_numbers` has them.
INLINE lanes load_pairs(const int format, const char *low, const char *high, int at, const int upper) {
    if (format == BFLOAT16) return (lanes)((words)load_lanes(high, at, 1) | ((words)load_lanes(low, at, 1) >> 16));
#ifdef __AVX512BF16__
    const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(low + at)));
    const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(high + at)));
    const __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    return code_words(upper ? _mm512_srli_epi16(both, 4) : both);
#else
    __builtin_trap();  // not IN_PAIRS
#endif
}

INLINE float load_scale(const int format, const char *head, int head_size) {
    uint16_t bits;
    memcpy(&bits, head + code_bytes(format, head_size), 2);
    const uint32_t word = (uint32_t)bits << 16;
    float scale;
    memcpy(&scale, &word, 4);
    return scale;
}

// Multiplies with an orthogonal matrix that is its own inverse: Hadamard's, of each part of the greatest power of
// two that divides `size`, at least LANES.
static inline void hadamard(float *values, int size) {
    const int block = size & -size;
    const float norm = 1.0f / sqrtf(block);
    const indices slots = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int at = 0; at < size; at += LANES) {
        lanes own = load_lanes(values, at, 0);
#pragma GCC unroll 4
        for (int step = 1; step < LANES; step *= 2) {
            const lanes other = __builtin_shuffle(own, slots ^ step);
            own = choose((slots & step) != 0, other - own, own + other);
        }
        store_lanes(values, at, 0, own);
    }
    for (int step = LANES; step < block; step *= 2)
        for (int first = 0; first < size; first += 2 * step)
            for (int i = first; i < first + step; i += LANES) {
                const lanes a = load_lanes(values, i, 0), b = load_lanes(values, i + step, 0);
                store_lanes(values, i, 0, a + b);
                store_lanes(values, i + step, 0, a - b);
            }
    for (int i = 0; i < size; i++) values[i] *= norm;
}

// Writes a head's key or value; changes `values`.
static inline void store_head(int format, char *target, int head_size, float *values) {
    if (format == FLOAT32 || format == BFLOAT16) {
        store(target, 0, head_size, format == BFLOAT16, values);
        return;
    }
    if (format == FLOAT16) {
        for (int i = 0; i < head_size; i++) {
            const halves bits = narrow_float16(all(values[i]));
            memcpy(target + 2 * i, &bits, 2);
        }
        return;
    }
    if (format == INT4) hadamard(values, head_size);
    float most = 0;
    for (int i = 0; i < head_size; i++) most = fmaxf(most, fabsf(values[i]));
    const halves bits = narrow(all(most / (format == INT8 ? GREATEST : LEVELS[15])));
    memcpy(target + code_bytes(format, head_size), &bits, 2);
    const float scale = load_scale(format, target, head_size), divisor = scale == 0 ? 1 : scale;
    if (format == INT4) {
        for (int i = 0; i < head_size / 2; i += LANES) {
            const indices low = level_codes(load_lanes(values, i, 0) / divisor);
            const indices high = level_codes(load_lanes(values, head_size / 2 + i, 0) / divisor);
            const codes pair = __builtin_convertvector(low | high << 4, codes);
            memcpy(target + i, &pair, sizeof pair);
        }
        return;
    }
    for (int i = 0; i < head_size; i++) {
        // Comparisons with what is not a number are false: it may become any code, and its scale says what it is.
        const float code = values[i] / divisor;
        values[i] = code < -GREATEST ? -GREATEST : code > GREATEST ? GREATEST : code == code ? code : 0;
    }
    for (int i = 0; i < head_size; i++) ((int8_t *)target)[i] = (int8_t)rintf(values[i]);
}
