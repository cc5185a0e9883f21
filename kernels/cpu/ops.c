/* The six operations on a CPU, for bf16 and fp32 storage, computed in fp32.
 *
 * Owns arithmetic on plain arrays. Knows no tensors: `kernels/cpu/__init__.py` checks shapes and passes pointers
 * and strides (counted in elements). Generic vectors of 16 floats (GCC vector extensions) become AVX-512, AVX2
 * or NEON by the compiler; there are no intrinsics. This file includes itself once per storage type.
 *
 * Order of summation: every result is summed in an order fixed by its own token alone (16 lanes by index, blocks
 * of BLOCK context tokens from position 0), so neither chunking nor other rows nor threads change a bit of it.
 * Masked scores are -inf, whose weight is exactly 0, and are left out of all products with stored values.
 */
#ifndef SCALAR

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 256 /* context tokens per round of the online softmax (Milakov and Gimelshein 2018) */
#define MAX_QUERIES 6 /* query vectors that share one pass over K and V: 6 x 4 accumulators fit 32 registers */
#define ITEM_TOKENS 16 /* query tokens of one row in one work item */
#define PARALLEL_WORK 16384 /* elements below which waking a second thread costs more than it saves */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE vf splat(float x) { return x - (vf){}; }

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }

INLINE float lane_sum(vf v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

INLINE float lane_max(vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* 2^x, relative error below 2e-7; exactly 1 at 0, exactly 0 below -126 (so at -inf too); NaN stays NaN. */
INLINE vf vexp2(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
    vf low = splat(-126.0f), high = splat(127.0f);
    vf y = choose(x < low, low, choose(x > high, high, x));
    vf n = y + shift;
    vi exponent = ((vi)n << 23) + (127 << 23);
    vf f = y - (n - shift); /* in [-1/2, 1/2] */
    vf p = splat(1.5252734e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return choose(x < low, (vf){}, p * (vf)exponent);
}

#define SCALAR uint16_t
#define FN(name) name##_bf16
#include "ops.c"
#undef SCALAR
#undef FN
#define SCALAR float
#define FN(name) name##_f32
#define WIDE 1
#include "ops.c"

#else /* once per storage type */

#ifdef WIDE
INLINE vf FN(load)(const SCALAR *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void FN(store)(SCALAR *p, vf v) { memcpy(p, &v, sizeof v); }
#else
INLINE vf FN(load)(const SCALAR *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE void FN(store)(SCALAR *p, vf v) { /* rounds to nearest even; NaN becomes the quiet NaN */
    vu u = (vu)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = v != v;
    u = (u & ~(vu)nan) | (0x7fc0 & (vu)nan);
    vh h = __builtin_convertvector(u, vh);
    memcpy(p, &h, sizeof h);
}
#endif

/* The last n < 16 elements of something: missing lanes are 0. */
INLINE vf FN(load_some)(const SCALAR *p, long n) {
    if (n >= LANES) return FN(load)(p);
    SCALAR padded[LANES] = {0};
    memcpy(padded, p, n * sizeof *p);
    return FN(load)(padded);
}

INLINE void FN(store_some)(SCALAR *p, vf v, long n) {
    if (n >= LANES) {
        FN(store)(p, v);
        return;
    }
    SCALAR padded[LANES];
    FN(store)(padded, v);
    memcpy(p, padded, n * sizeof *p);
}

/* out[t] = norm(x[t] (+ residual[t])) * weight; residual is overwritten by the rounded sum. residual may be NULL. */
void FN(rms_norm)(long tokens, long width, const SCALAR *x, long x_stride, SCALAR *residual, long r_stride,
                  const SCALAR *weight, float eps, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * x_stride;
        vf squares = {};
        if (residual) {
            SCALAR *sum = residual + t * r_stride;
            for (long i = 0; i < width; i += LANES) {
                vf a = FN(load_some)(row + i, width - i) + FN(load_some)(sum + i, width - i);
                FN(store_some)(sum + i, a, width - i);
            }
            row = sum;
        }
        for (long i = 0; i < width; i += LANES) {
            vf a = FN(load_some)(row + i, width - i);
            squares += a * a;
        }
        float scale = 1.0f / sqrtf(lane_sum(squares) / width + eps);
        for (long i = 0; i < width; i += LANES) {
            vf a = FN(load_some)(row + i, width - i) * scale;
            FN(store_some)(out + t * width + i, a * FN(load_some)(weight + i, width - i), width - i);
        }
    }
}

INLINE void FN(rotate)(SCALAR *head, long half, const float *cos, const float *sin) {
    for (long i = 0; i < half; i += LANES) {
        long n = half - i < LANES ? half - i : LANES;
        vf c = {}, s = {};
        memcpy(&c, cos + i, n * sizeof(float));
        memcpy(&s, sin + i, n * sizeof(float));
        vf a = FN(load_some)(head + i, n), b = FN(load_some)(head + half + i, n);
        FN(store_some)(head + i, a * c - b * s, n);
        FN(store_some)(head + half + i, b * c + a * s, n);
    }
}

void FN(rope)(long tokens, long heads, long kv_heads, long dim, SCALAR *q, long q_stride, SCALAR *k, long k_stride,
              const float *cos, const float *sin, int threads) {
    long half = dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads; h++) FN(rotate)(q + t * q_stride + h * dim, half, cos + t * half, sin + t * half);
        for (long h = 0; h < kv_heads; h++) FN(rotate)(k + t * k_stride + h * dim, half, cos + t * half, sin + t * half);
    }
}

void FN(store_kv)(long tokens, long kv_heads, long dim, long page_size, const SCALAR *k, long k_stride, const SCALAR *v,
                  long v_stride, SCALAR *k_cache, SCALAR *v_cache, const int64_t *slots, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * kv_heads * dim > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        long page = slots[t] / page_size, offset = slots[t] % page_size;
        for (long h = 0; h < kv_heads; h++) {
            SCALAR *to = k_cache + (page * kv_heads + h) * dim * page_size + offset;
            const SCALAR *from = k + t * k_stride + h * dim;
            for (long d = 0; d < dim; d++) to[d * page_size] = from[d]; /* transposed inside the page */
            memcpy(v_cache + ((page * kv_heads + h) * page_size + offset) * dim, v + t * v_stride + h * dim,
                   dim * sizeof(SCALAR));
        }
    }
}

void FN(silu_mul)(long tokens, long width, const SCALAR *gate_up, long stride, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *gate = gate_up + t * stride, *up = gate + width;
        for (long i = 0; i < width; i += LANES) {
            vf g = FN(load_some)(gate + i, width - i);
            vf silu = g / (1.0f + vexp2(g * -1.44269504f));
            FN(store_some)(out + t * width + i, silu * FN(load_some)(up + i, width - i), width - i);
        }
    }
}

/* scores[q][at + tile*16 + lane] = query q . key of that token, for `tiles` tiles of 16 tokens. queries: [dim][nq]. */
INLINE void FN(score_tiles)(const int nq, const int tiles, const float *queries, long dim, const SCALAR *const *keys,
                            long page_size, float (*scores)[BLOCK], long at) {
    vf sum[MAX_QUERIES][4] = {};
    for (long d = 0; d < dim; d++) {
        vf key[4];
        UNROLL for (int t = 0; t < tiles; t++) key[t] = FN(load)(keys[t] + d * page_size);
        UNROLL for (int q = 0; q < nq; q++) {
            vf x = splat(queries[d * nq + q]);
            UNROLL for (int t = 0; t < tiles; t++) sum[q][t] += x * key[t];
        }
    }
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int t = 0; t < tiles; t++)
        memcpy(scores[q] + at + t * LANES, &sum[q][t], sizeof(vf));
}

/* mixed[q][c..] = mixed[q][c..] * rescale[q] + sum over tokens of weight * value, for `parts` vectors of channels,
 * the last of which may be short (n channels in all). */
INLINE void FN(mix_values)(const int nq, const int parts, float (*weights)[BLOCK], long tokens,
                           const SCALAR *const *values, long dim, long n, const float *rescale, float *mixed) {
    vf sum[MAX_QUERIES][4];
    const int whole = n >= parts * LANES;
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int c = 0; c < parts; c++) {
        vf v = {};
        memcpy(&v, mixed + q * dim + c * LANES, whole ? sizeof v : n * sizeof(float));
        sum[q][c] = v * rescale[q];
    }
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = values[t / LANES] + (t % LANES) * dim;
        vf value[4];
        UNROLL for (int c = 0; c < parts; c++)
            value[c] = whole ? FN(load)(row + c * LANES) : FN(load_some)(row + c * LANES, n);
        UNROLL for (int q = 0; q < nq; q++) {
            vf w = splat(weights[q][t]);
            UNROLL for (int c = 0; c < parts; c++) sum[q][c] += w * value[c];
        }
    }
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int c = 0; c < parts; c++)
        memcpy(mixed + q * dim + c * LANES, &sum[q][c], whole ? sizeof(vf) : n * sizeof(float));
}

/* nq query vectors of one kv head against its context. Vector j belongs to token j / group of the row's queries. */
INLINE void FN(attend)(const int nq, long first, long group, long head, long dim, long page_size, long kv_heads,
                       const SCALAR *q, long q_stride, const SCALAR *k_cache, const SCALAR *v_cache,
                       const int32_t *pages, long start_position, float scale, SCALAR *out, long out_stride) {
    float queries[dim * nq], mixed[nq * dim], scores[nq][BLOCK], largest[nq], rescale[nq];
    vf total[MAX_QUERIES] = {};
    for (int i = 0; i < nq; i++) {
        const SCALAR *from = q + (first + i) / group * q_stride + (head * group + (first + i) % group) * dim;
        float row[LANES];
        for (long d = 0; d < dim; d += LANES) {
            vf v = FN(load_some)(from + d, dim - d) * (scale * 1.44269504f); /* scores count in powers of two */
            memcpy(row, &v, sizeof v);
            for (long j = 0; j < LANES && d + j < dim; j++) queries[(d + j) * nq + i] = row[j];
        }
        largest[i] = -INFINITY;
    }
    memset(mixed, 0, sizeof mixed);
    long end = start_position + (first + nq - 1) / group + 1; /* the last of these queries sees so many tokens */
    for (long from = 0; from < end; from += BLOCK) {
        long tokens = end - from < BLOCK ? end - from : BLOCK;
        int tiles = (tokens + LANES - 1) / LANES, t = 0;
        const SCALAR *keys[BLOCK / LANES], *values[BLOCK / LANES];
        for (int i = 0; i < tiles; i++) {
            long token = from + i * LANES, page = pages[token / page_size], offset = token % page_size;
            keys[i] = k_cache + (page * kv_heads + head) * dim * page_size + offset;
            values[i] = v_cache + ((page * kv_heads + head) * page_size + offset) * dim;
        }
        for (; nq <= 3 && t + 4 <= tiles; t += 4)
            FN(score_tiles)(nq, 4, queries, dim, keys + t, page_size, scores, t * LANES);
        for (; t + 2 <= tiles; t += 2)
            FN(score_tiles)(nq, 2, queries, dim, keys + t, page_size, scores, t * LANES);
        for (; t < tiles; t++)
            FN(score_tiles)(nq, 1, queries, dim, keys + t, page_size, scores, t * LANES);
        UNROLL for (int i = 0; i < nq; i++) {
            long position = start_position + (first + i) / group;
            vf most = splat(-INFINITY), s;
            for (t = 0; t < tiles; t++) {
                memcpy(&s, scores[i] + t * LANES, sizeof s);
                long visible = position - (from + t * LANES); /* last lane that this query may see */
                if (visible < LANES - 1) {
                    s = choose(LANE > (int32_t)(visible < -1 ? -1 : visible), splat(-INFINITY), s);
                    memcpy(scores[i] + t * LANES, &s, sizeof s);
                }
                most = vmax(most, s);
            }
            float before = largest[i], now = lane_max(most);
            now = now > before ? now : before;
            largest[i] = now;
            rescale[i] = vexp2(splat(before - now))[0];
            vf sum = total[i] * rescale[i];
            for (t = 0; t < tiles; t++) {
                memcpy(&s, scores[i] + t * LANES, sizeof s);
                s = vexp2(s - now);
                sum += s;
                memcpy(scores[i] + t * LANES, &s, sizeof s);
            }
            total[i] = sum;
        }
        long c = 0;
        const SCALAR *shifted[BLOCK / LANES];
        for (; c < dim; c += dim - c >= 4 * LANES ? 4 * LANES : LANES) {
            for (int i = 0; i < tiles; i++) shifted[i] = values[i] + c;
            if (dim - c >= 4 * LANES)
                FN(mix_values)(nq, 4, scores, tokens, shifted, dim, 4 * LANES, rescale, mixed + c);
            else if (dim - c >= LANES)
                FN(mix_values)(nq, 1, scores, tokens, shifted, dim, LANES, rescale, mixed + c);
            else
                FN(mix_values)(nq, 1, scores, tokens, shifted, dim, dim - c, rescale, mixed + c);
        }
    }
    for (int i = 0; i < nq; i++) {
        SCALAR *to = out + (first + i) / group * out_stride + (head * group + (first + i) % group) * dim;
        float denominator = lane_sum(total[i]);
        for (long d = 0; d < dim; d += LANES) {
            vf v = {};
            memcpy(&v, mixed + i * dim + d, (dim - d < LANES ? dim - d : LANES) * sizeof(float));
            FN(store_some)(to + d, v / denominator, dim - d);
        }
    }
}

int FN(paged_attention)(long rows, long kv_heads, long group, long dim, long page_size, const SCALAR *q, long q_stride,
                        const SCALAR *k_cache, const SCALAR *v_cache, const int32_t *page_table, long table_stride,
                        const int32_t *query_start, const int32_t *context_lens, float scale, SCALAR *out, int threads) {
    /* one item: ITEM_TOKENS query tokens of one row and one kv head; item_start[r] counts those before row r */
    long *item_start = malloc((rows + 1) * sizeof(long));
    if (!item_start) return -1;
    item_start[0] = 0;
    long work = 0; /* products of a query channel with a key channel */
    for (long r = 0; r < rows; r++) {
        long count = query_start[r + 1] - query_start[r];
        item_start[r + 1] = item_start[r] + (count + ITEM_TOKENS - 1) / ITEM_TOKENS * kv_heads;
        work += count * context_lens[r] * kv_heads * group * dim;
    }
    long out_stride = kv_heads * group * dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (work > 4 * PARALLEL_WORK)
    for (long item = 0; item < item_start[rows]; item++) {
        long r = 0, above = rows;
        while (above - r > 1) { /* the row whose items include this one */
            long middle = (r + above) / 2;
            if (item_start[middle] <= item) r = middle;
            else above = middle;
        }
        while (item_start[r + 1] <= item) r++; /* rows without tokens own no item */
        long head = (item - item_start[r]) % kv_heads, token = (item - item_start[r]) / kv_heads * ITEM_TOKENS;
        long count = query_start[r + 1] - query_start[r];
        long last = (token + ITEM_TOKENS < count ? token + ITEM_TOKENS : count) * group;
        const SCALAR *row_q = q + query_start[r] * q_stride;
        SCALAR *row_out = out + query_start[r] * out_stride;
        for (long j = token * group; j < last; j += MAX_QUERIES) {
#define CASE(n)                                                                                                      \
    case n:                                                                                                          \
        FN(attend)(n, j, group, head, dim, page_size, kv_heads, row_q, q_stride, k_cache, v_cache,                   \
                   page_table + r * table_stride, context_lens[r] - count, scale, row_out, out_stride);              \
        break;
            switch (last - j < MAX_QUERIES ? last - j : MAX_QUERIES) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            }
#undef CASE
        }
    }
    free(item_start);
    return 0;
}

#endif
