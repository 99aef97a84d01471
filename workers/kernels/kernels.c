// The engine's own CPU kernels; each has a twin in torch_kernels.py, which is its reference.
//
// Values are float or bfloat16 in memory (`bf16` says which) and float in registers. Every function
// divides its rows among `threads` threads of the OpenMP runtime that torch has loaded.
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
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

// out[row] = x[row] / rms(x[row]) * weight, [rows, size].
void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t size, float epsilon,
              int bf16, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        float values[size], scales[size];
        load(x, row * size, size, bf16, values);
        load(weight, 0, size, bf16, scales);
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

// Two rows of weights times `count` rows of x, at most ROWS: sixteen running sums that stay in registers.
// The results go to the first two columns of `tile`, float [count, TILE].
#define COLUMNS 2
#define ROWS 8
#define TILE 32
static inline __attribute__((always_inline)) void linear_block(const float *x, const void *weight,
                                                               int64_t column, int64_t size, int count,
                                                               int bf16, float *tile) {
    lanes sums[LANES] = {0};
    int64_t first = 0;
    for (; first + LANES <= size; first += LANES) {
        lanes w[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) w[c] = load_lanes(weight, (column + c) * size + first, bf16);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            lanes value = load_lanes(x, r * size + first, 0);
            for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] += value * w[c];
        }
    }
    lanes totals = sums_of(sums);
    for (int r = 0; r < count; r++)
        for (int c = 0; c < COLUMNS; c++) {
            float total = totals[r * COLUMNS + c];
            for (int64_t i = first; i < size; i++) {
                int64_t at = (column + c) * size + i;
                float w = bf16 ? widen(((const uint16_t *)weight)[at]) : ((const float *)weight)[at];
                total += x[r * size + i] * w;
            }
            tile[r * TILE + c] = total;
        }
}

// out = x weight^T + bias for few rows: weights are read once, in the order in which they lie.
//
// x [rows, size], weight [columns, size], bias [columns] or null, out [rows, columns]; columns even.
// scratch: float [rows, size].
void linear(const void *x, const void *weight, const void *bias, void *out, float *scratch, int64_t rows,
            int64_t columns, int64_t size, int bf16, int threads) {
    load(x, 0, rows * size, bf16, scratch);
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < columns; first += TILE) {
        int width = columns - first < TILE ? columns - first : TILE;
        // Rows of `out` may lie a power of two apart, so results are stored a line at a time.
        float tile[rows * TILE], offsets[TILE] = {0};
        if (bias) load(bias, first, width, bf16, offsets);
        for (int column = 0; column < width; column += COLUMNS)
            for (int64_t row = 0; row < rows; row += ROWS) {
                const float *own = scratch + row * size;
                float *target = tile + row * TILE + column;
#define CASE(n, half)                                                              \
    case n:                                                                        \
        linear_block(own, weight, first + column, size, n, half, target);          \
        break;
#define CASES(half)                                                                \
    switch (rows - row < ROWS ? rows - row : ROWS) {                               \
        CASE(1, half) CASE(2, half) CASE(3, half) CASE(4, half)                    \
        CASE(5, half) CASE(6, half) CASE(7, half) CASE(8, half)                    \
    }
                if (bf16) CASES(1) else CASES(0)
            }
        for (int64_t row = 0; row < rows; row++) {
            for (int i = 0; i < width; i++) tile[row * TILE + i] += offsets[i];
            store(out, row * columns + first, width, bf16, tile + row * TILE);
        }
    }
}

// Splits projected [rows, heads + 2 * kv_heads, head_size] into rotated queries [rows, heads, head_size]
// and rotated keys and values [rows, 2, kv_heads, head_size]; cos and sin are float [rows, head_size / 2].
void rotate(const void *projected, const float *cos, const float *sin, void *query, void *kv, int64_t rows,
            int heads, int kv_heads, int head_size, int bf16, int threads) {
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
                store(kv, (row * 2 * kv_heads + head - heads) * head_size, head_size, bf16, out);
        }
    }
}

// out[t] = query . keys[t], of the keys of a page, float [PAGE_TOKENS, head_size].
static inline lanes score_page(const float *query, const float *keys, int head_size) {
    lanes sums[LANES] = {0};
    for (int first = 0; first < head_size; first += LANES) {
        lanes q = load_lanes(query, first, 0);
#pragma GCC unroll 16
        for (int t = 0; t < PAGE_TOKENS; t++) sums[t] += q * load_lanes(keys, t * head_size + first, 0);
    }
    return sums_of(sums);
}

// sums += shares . values, of the values of a page, float [PAGE_TOKENS, head_size].
static inline void mix_page(lanes shares, const float *values, int head_size, float *sums) {
    for (int first = 0; first < head_size; first += LANES) {
        // Four sums that do not wait for each other.
        lanes mixed[4] = {load_lanes(sums, first, 0)};
#pragma GCC unroll 16
        for (int t = 0; t < PAGE_TOKENS; t++)
            mixed[t % 4] += shares[t] * load_lanes(values, t * head_size + first, 0);
        mixed[0] = (mixed[0] + mixed[1]) + (mixed[2] + mixed[3]);
        memcpy(sums + first, &mixed[0], sizeof(lanes));
    }
}

// The keys or values of one head in a page, as float [PAGE_TOKENS, head_size]; 0 beyond `count`.
static inline void load_page(const void *rows, int64_t page, int count, int64_t row_size, int64_t offset,
                             int head_size, int bf16, float *out) {
    for (int t = 0; t < count; t++) {
        int64_t row = (page * PAGE_TOKENS + t) * row_size + offset;
        for (int first = 0; first < head_size; first += LANES) {
            lanes part = load_lanes(rows, row + first, bf16);
            memcpy(out + t * head_size + first, &part, sizeof part);
        }
    }
    memset(out + count * head_size, 0, sizeof(float) * (PAGE_TOKENS - count) * head_size);
}

// Tokens that one thread attends to at a time; a long sequence is shared among threads.
#define CHUNK 256
// What a part of a sequence comes to, for each head: sums of values, sums of shares in sixteen parts, the
// greatest logit.
#define PARTIAL(head_size) ((head_size) + LANES + 1)

// One page of one KV head: its logits, and what they add to the running sums of the group's heads.
static inline void attend_page(const float *query, const float *keys, const float *values, int count,
                               int head_size, int group, float *logits, float *partials) {
    const indices slots = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const indices there = slots < count;
    for (int g = 0; g < group; g++) {
        float *own = logits + g * PAGE_TOKENS, *partial = partials + g * PARTIAL(head_size);
        const lanes scored = score_page(query + g * head_size, keys, head_size);
        memcpy(own, &scored, sizeof scored);
        const float before = partial[head_size + LANES];
        const float best = fmaxf(before, greatest(choose(there, scored, all(before))));
        if (best > before) {
            const float shrink = exp_negative(before - best);
            for (int i = 0; i < head_size + LANES; i++) partial[i] *= shrink;
            partial[head_size + LANES] = best;
        }
        const lanes shares = choose(there, exp_lanes(scored - all(best)), all(0));
        const lanes sums = load_lanes(partial, head_size, 0) + shares;
        memcpy(partial + head_size, &sums, sizeof sums);
        mix_page(shares, values, head_size, partial);
    }
}

// One query row a sequence over its own pages: see PagedBatch for the layout.
//
// query, out [sequences, heads, head_size], head_size a multiple of 16; rows [*, 2, kv_heads, head_size];
// pages [sequences, width]; partials: scratch, float [sequences, chunks of the longest, heads,
// head_size + 17]; logits: scratch, float [sequences, heads, tail]; shares: float [sequences, tail], the
// attention to the newest `tail` tokens, averaged over heads, 0 where there are fewer.
void decode_attention(const void *query, const void *rows, const int32_t *pages, const int32_t *lengths,
                      void *out, float *partials, float *logits, float *shares, int64_t sequences,
                      int64_t width, int64_t chunks, int64_t tail, int heads, int kv_heads, int head_size,
                      int bf16, int threads) {
    const int group = heads / kv_heads, itemsize = bf16 ? 2 : 4;
    const float scale = 1.0f / sqrtf(head_size);
    const int64_t row_size = (int64_t)2 * kv_heads * head_size, size = PARTIAL(head_size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < sequences * chunks; task++) {
            const int64_t sequence = task / chunks, begin = task % chunks * CHUNK;
            const int64_t length = lengths[sequence], end = begin + CHUNK < length ? begin + CHUNK : length;
            const int32_t *table = pages + sequence * width;
            float q[heads * head_size], own[group * PAGE_TOKENS], *sums = partials + task * heads * size;
            float keys[PAGE_TOKENS * head_size], values[PAGE_TOKENS * head_size];
            load(query, sequence * heads * head_size, heads * head_size, bf16, q);
            for (int i = 0; i < heads * head_size; i++) q[i] *= scale;
            memset(sums, 0, sizeof(float) * heads * size);
            for (int head = 0; head < heads; head++) sums[head * size + size - 1] = -INFINITY;
            for (int64_t slot = begin; slot < end; slot += PAGE_TOKENS) {
                const int count = end - slot < PAGE_TOKENS ? end - slot : PAGE_TOKENS;
                const int64_t page = table[slot / PAGE_TOKENS];
                if (slot + PAGE_TOKENS < end) {
                    const char *next = (const char *)rows +
                                       table[slot / PAGE_TOKENS + 1] * PAGE_TOKENS * row_size * itemsize;
                    for (int64_t at = 0; at < PAGE_TOKENS * row_size * itemsize; at += 64)
                        __builtin_prefetch(next + at);
                }
                for (int head = 0; head < kv_heads; head++) {
                    load_page(rows, page, count, row_size, head * head_size, head_size, bf16, keys);
                    load_page(rows, page, count, row_size, (kv_heads + head) * head_size, head_size, bf16,
                              values);
                    attend_page(q + head * group * head_size, keys, values, count, head_size, group, own,
                                sums + head * group * size);
                    for (int64_t t = 0; t < count; t++) {
                        int64_t column = slot + t - (length - tail);
                        for (int g = 0; g < group && column >= 0; g++)
                            logits[(sequence * heads + head * group + g) * tail + column] =
                                own[g * PAGE_TOKENS + t];
                    }
                }
            }
        }
#pragma omp for
        for (int64_t sequence = 0; sequence < sequences; sequence++) {
            const int64_t length = lengths[sequence], used = (length + CHUNK - 1) / CHUNK;
            float *first = partials + sequence * chunks * heads * size, *seen = shares + sequence * tail;
            memset(seen, 0, sizeof(float) * tail);
            for (int head = 0; head < heads; head++) {
                float mixed[head_size], best = -INFINITY, sum = 0;
                for (int i = 0; i < head_size; i++) mixed[i] = 0;
                for (int64_t c = 0; c < used; c++) {
                    const float other = first[(c * heads + head) * size + size - 1];
                    best = other > best ? other : best;
                }
                for (int64_t c = 0; c < used; c++) {
                    const float *part = first + (c * heads + head) * size;
                    const float weight = exp_negative(part[size - 1] - best);
                    for (int i = 0; i < LANES; i++) sum += weight * part[head_size + i];
                    for (int i = 0; i < head_size; i++) mixed[i] += weight * part[i];
                }
                for (int i = 0; i < head_size; i++) mixed[i] /= sum;
                store(out, (sequence * heads + head) * head_size, head_size, bf16, mixed);
                const float *own = logits + (sequence * heads + head) * tail;
                for (int64_t column = tail > length ? tail - length : 0; column < tail; column++)
                    seen[column] += exp_negative(own[column] - best) / (sum * heads);
            }
        }
    }
}
