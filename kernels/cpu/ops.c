/* The operations on a CPU, for bf16 and fp32 storage, computed in fp32; `paged.h`, `shared.h` and `attention.h`
 * hold the two on pages, `matmul.h` and `matmul_i8.h` products with weights, `sampling.h` draws tokens, `blocks.h` calls
 * many of the others one after another, `vectors.h` is what all are written in.
 *
 * Owns arithmetic on plain arrays. Knows no tensors: `kernels/cpu/__init__.py` checks shapes and passes pointers
 * and strides (counted in elements). Generic vectors of 16 floats (GCC vector extensions) become AVX-512, AVX2
 * or NEON by the compiler; the only intrinsics are in `matmul_i8.h`. This file includes itself once per dtype of the
 * activations, `attention.h` once per dtype of a cache, and `paged.h` once per pair that goes together.
 *
 * Order of summation: every result is summed in an order fixed by its own token alone (16 lanes by index), so
 * neither other rows nor threads change a bit of it.
 */
#ifndef SCALAR

#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

#define PARALLEL_WORK 16384 /* elements below which waking a second thread costs more than it saves */

/* The activations of the contract, by the numbers that kernels/cpu/tensors.py has for them. */
enum { SILU, GELU, GELU_TANH, RELU, SWIGLU_OAI };

INLINE vn activated(int how, vn x) {
    if (how == RELU) return nchoose(x < (vn){}, (vn){}, x); /* NaN stays NaN */
    if (how == SILU) return x / (1.0f + nexp2(x * -LOG2E));
    if (how == GELU_TANH) { /* (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) */
        vn u = 0.797884561f * x * (1.0f + 0.044715f * x * x);
        return x / (1.0f + nexp2(u * (-2.0f * LOG2E)));
    }
    /* GELU: x * Phi(x), where Phi(-|x|) = exp(-x*x/2) * t * polynomial(t), t = 1 / (1 + 0.2687 |x|); the polynomial
     * is a minimax fit of our own, relative error 2e-8 up to |x| = 14, where Phi is nothing to an fp32 */
    vn t = 1.0f / (1.0f + 0.268700577f * nmax(x, -x));
    vn p = nsplat(2.94825796e-2f);
    p = p * t - 0.131135744f;
    p = p * t + 0.181919201f;
    p = p * t - 8.07142970e-2f;
    p = p * t + 0.115000302f;
    p = p * t + 6.93309872e-2f;
    p = p * t + 0.101951585f;
    p = p * t + 0.106959930f;
    p = p * t + 0.107205466f;
    vn tail = p * t * nexp2(x * x * (-0.5f * LOG2E));
    return x * nchoose(x < (vn){}, tail, 1.0f - tail);
}

INLINE vn gated(int how, vn x, vn up) {
    if (how != SWIGLU_OAI) return activated(how, x) * up;
    vn most = nsplat(7.0f), least = nsplat(-7.0f); /* NaN stays NaN */
    x = nchoose(x > most, most, x);
    up = nchoose(up > most, most, nchoose(up < least, least, up));
    return x / (1.0f + nexp2(x * (-1.702f * LOG2E))) * (up + 1.0f);
}

#define SCALAR float
#define FN(name) name##_f32
#define WIDE 1
#include "ops.c"
#undef SCALAR
#undef FN
#undef WIDE
#define SCALAR uint16_t
#define FN(name) name##_bf16
#include "ops.c"
#undef SCALAR
#undef FN

#define STORED uint16_t
#define ST(name) name##_bf16
#define SCALED 0
#include "attention.h"
#define STORED float
#define ST(name) name##_f32
#define SCALED 0
#include "attention.h"
#define STORED int8_t
#define ST(name) name##_i8
#define SCALED 1
#include "attention.h"

#include "shared.h"

#define SCALAR uint16_t
#define FN(name) name##_bf16
#define STORED uint16_t
#define ST(name) name##_bf16
#define KV(name) name##_bf16
#define SCALED 0
#include "paged.h"
#define SCALAR float
#define FN(name) name##_f32
#define STORED float
#define ST(name) name##_f32
#define KV(name) name##_f32
#define SCALED 0
#include "paged.h"
#define SCALAR uint16_t
#define FN(name) name##_bf16
#define STORED int8_t
#define ST(name) name##_i8
#define KV(name) name##_bf16_i8
#define SCALED 1
#include "paged.h"
#define SCALAR float
#define FN(name) name##_f32
#define STORED int8_t
#define ST(name) name##_i8
#define KV(name) name##_f32_i8
#define SCALED 1
#include "paged.h"

#include "blocks.h"

/* How many outputs a panel of a packed weight has. */
long panel_outputs(void) { return PANEL; }

#else /* once per dtype of the activations */

#ifdef WIDE
INLINE vn FN(load)(const SCALAR *p) { return native_f32(p); }
INLINE void FN(store)(SCALAR *p, vn v) { memcpy(p, &v, sizeof v); }
INLINE void FN(untile)(SCALAR *p, const vn *tile) { memcpy(p, tile, LANES * sizeof *p); }
#else
INLINE vn FN(load)(const SCALAR *p) { return native_bf16(p); }
/* The bits of a bf16 in the high half of each lane: rounded to nearest even; NaN becomes the quiet NaN. */
INLINE vnu FN(rounded)(vn v) {
    vnu u = (vnu)v;
    u += 0x7fff + ((u >> 16) & 1);
    vni nan = v != v;
    return (u & ~(vnu)nan) | (0x7fc00000 & (vnu)nan);
}
INLINE void FN(store)(SCALAR *p, vn v) {
    vnh h = __builtin_convertvector(FN(rounded)(v) >> 16, vnh);
    memcpy(p, &h, sizeof h);
}
/* LANES elements in the order of `tile`. */
INLINE void FN(untile)(SCALAR *p, const vn *tile) {
#ifdef PAIRED
    vnu pairs = (FN(rounded)(tile[0]) >> 16) | (FN(rounded)(tile[1]) & 0xffff0000u);
    memcpy(p, &pairs, sizeof pairs);
#else
    UNROLL for (int i = 0; i < PARTS; i++) FN(store)(p + i * NATIVE, tile[i]);
#endif
}
#endif

/* A vector where only n elements exist, or all of them if n is more: missing lanes are 0. */
INLINE vn FN(load_some)(const SCALAR *p, long n) {
    if (n >= NATIVE) return FN(load)(p);
    SCALAR padded[NATIVE] = {0};
    if (n > 0) memcpy(padded, p, n * sizeof *p);
    return FN(load)(padded);
}

INLINE void FN(store_some)(SCALAR *p, vn v, long n) {
    if (n >= NATIVE) {
        FN(store)(p, v);
        return;
    }
    SCALAR padded[NATIVE];
    FN(store)(padded, v);
    if (n > 0) memcpy(p, padded, n * sizeof *p);
}

/* The largest |x| of a row; NaN where one of them is NaN or infinite. */
INLINE float FN(largest)(const SCALAR *x, long width) {
    vn most = {};
    vni bad = {};
    for (long i = 0; i < width; i += NATIVE) {
        vn a = FN(load_some)(x + i, width - i);
        most = nmax(nmax(a, -a), most);
        bad |= a - a != (vn){};
    }
    float largest = 0;
    for (int i = 0; i < NATIVE; i++) {
        if (bad[i]) return NAN;
        if (most[i] > largest) largest = most[i];
    }
    return largest;
}

/* sum = the rounded sum of both, of `width` elements. */
INLINE void FN(add_row)(const SCALAR *x, long width, SCALAR *sum) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vn a[PARTS], b[PARTS];
        FN(tile)(x + i, a), FN(tile)(sum + i, b);
        UNROLL for (int p = 0; p < PARTS; p++) b[p] += a[p];
        FN(untile)(sum + i, b);
    }
    for (; i < width; i += NATIVE) {
        vn a = FN(load_some)(x + i, width - i) + FN(load_some)(sum + i, width - i);
        FN(store_some)(sum + i, a, width - i);
    }
}

/* The sum of a row, or of the squared distances of its elements from `mean`, by 16 lanes, as `tile` has them. */
INLINE float FN(row_sum)(const SCALAR *x, long width) {
    vn part[PARTS] = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vn a[PARTS];
        FN(tile)(x + i, a);
        UNROLL for (int p = 0; p < PARTS; p++) part[p] += a[p];
    }
    for (int p = 0; i < width; i += NATIVE, p++) part[p] += FN(load_some)(x + i, width - i);
    vf sum;
    memcpy(&sum, part, sizeof sum);
    return lane_sum(sum);
}

INLINE float FN(row_squares)(const SCALAR *x, long width, float mean) {
    vn part[PARTS] = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vn a[PARTS];
        FN(tile)(x + i, a);
        UNROLL for (int p = 0; p < PARTS; p++) a[p] -= mean, part[p] += a[p] * a[p];
    }
    for (int p = 0; i < width; i += NATIVE, p++) {
        vn a = FN(load_some)(x + i, width - i) - mean;
        for (long lane = width - i; lane < NATIVE; lane++) a[lane] = 0; /* lanes behind the row are not of it */
        part[p] += a * a;
    }
    vf sum;
    memcpy(&sum, part, sizeof sum);
    return lane_sum(sum);
}

/* out[t] = norm(x[t] (+ residual[t])) * (weight + offset); residual is overwritten by the rounded sum. residual may be NULL. */
void FN(rms_norm)(long tokens, long width, const SCALAR *x, long x_stride, SCALAR *residual, long r_stride,
                  const SCALAR *weight, float eps, float offset, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * x_stride;
        if (residual) {
            FN(add_row)(row, width, residual + t * r_stride);
            row = residual + t * r_stride;
        }
        float scale = 1.0f / sqrtf(FN(row_squares)(row, width, 0) / width + eps);
        SCALAR *to = out + t * width;
        long i = 0;
        for (; i + LANES <= width; i += LANES) {
            vn a[PARTS], w[PARTS];
            FN(tile)(row + i, a), FN(tile)(weight + i, w);
            UNROLL for (int p = 0; p < PARTS; p++) a[p] = a[p] * scale * (w[p] + offset);
            FN(untile)(to + i, a);
        }
        for (; i < width; i += NATIVE) {
            vn a = FN(load_some)(row + i, width - i) * scale;
            FN(store_some)(to + i, a * (FN(load_some)(weight + i, width - i) + offset), width - i);
        }
    }
}

/* out[t] = (x[t] (+ residual[t]) - mean) / deviation * weight (+ bias), as rms_norm; residual and bias may be NULL. */
void FN(layer_norm)(long tokens, long width, const SCALAR *x, long x_stride, SCALAR *residual, long r_stride,
                    const SCALAR *weight, const SCALAR *bias, float eps, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * x_stride;
        if (residual) {
            FN(add_row)(row, width, residual + t * r_stride);
            row = residual + t * r_stride;
        }
        float mean = FN(row_sum)(row, width) / width;
        float scale = 1.0f / sqrtf(FN(row_squares)(row, width, mean) / width + eps);
        for (long i = 0; i < width; i += NATIVE) {
            vn a = (FN(load_some)(row + i, width - i) - mean) * scale * FN(load_some)(weight + i, width - i);
            if (bias) a += FN(load_some)(bias + i, width - i);
            FN(store_some)(out + t * width + i, a, width - i);
        }
    }
}

INLINE void FN(rotate)(SCALAR *head, long half, const float *cos, const float *sin) {
    for (long i = 0; i < half; i += NATIVE) {
        const long n = half - i;
        vn c = some_f32(cos + i, n), s = some_f32(sin + i, n);
        vn a = FN(load_some)(head + i, n), b = FN(load_some)(head + half + i, n);
        FN(store_some)(head + i, a * c - b * s, n);
        FN(store_some)(head + half + i, b * c + a * s, n);
    }
}

void FN(rope)(long tokens, long heads, long kv_heads, long dim, SCALAR *q, long q_stride, long q_head_stride, SCALAR *k,
              long k_stride, long k_head_stride, const float *cos, const float *sin, int threads) {
    long half = dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (long h = 0; h < heads; h++) FN(rotate)(q + t * q_stride + h * q_head_stride, half, c, s);
        for (long h = 0; h < kv_heads; h++) FN(rotate)(k + t * k_stride + h * k_head_stride, half, c, s);
    }
}

INLINE void FN(act_row)(int how, long width, const SCALAR *x, const SCALAR *up, SCALAR *out) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vn a[PARTS], b[PARTS];
        FN(tile)(x + i, a);
        if (up) FN(tile)(up + i, b);
        UNROLL for (int p = 0; p < PARTS; p++) a[p] = up ? gated(how, a[p], b[p]) : activated(how, a[p]);
        FN(untile)(out + i, a);
    }
    for (; i < width; i += NATIVE) {
        vn a = FN(load_some)(x + i, width - i);
        a = up ? gated(how, a, FN(load_some)(up + i, width - i)) : activated(how, a);
        FN(store_some)(out + i, a, width - i);
    }
}

/* out[t] = act(x[t]) (* up[t]); up may be NULL, but not for SWIGLU_OAI. */
void FN(act)(long tokens, long width, const SCALAR *x, const SCALAR *up, long stride, SCALAR *out, int how, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * stride, *by = up ? up + t * stride : NULL;
        SCALAR *to = out + t * width;
        if (how == SILU) FN(act_row)(SILU, width, row, by, to);
        else if (how == GELU) FN(act_row)(GELU, width, row, by, to);
        else if (how == GELU_TANH) FN(act_row)(GELU_TANH, width, row, by, to);
        else if (how == RELU) FN(act_row)(RELU, width, row, by, to);
        else FN(act_row)(SWIGLU_OAI, width, row, by, to);
    }
}

/* out[t] = cap * tanh(x[t] / cap) */
void FN(softcap)(long tokens, long width, const SCALAR *x, long stride, float cap, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += NATIVE) {
            vn a = cap * ntanh(FN(load_some)(x + t * stride + i, width - i) / cap);
            FN(store_some)(out + t * width + i, a, width - i);
        }
}

/* A row as column of `to`: to[d * columns] = from[d] * by. */
INLINE void FN(spread)(const SCALAR *from, long dim, float by, int columns, float *to) {
    for (long d = 0; d < dim; d += NATIVE) {
        vn v = FN(load_some)(from + d, dim - d) * by;
        for (long j = 0; j < NATIVE && d + j < dim; j++) to[(d + j) * columns] = v[j];
    }
}

INLINE void FN(divide)(const float *from, long dim, float by, SCALAR *to) {
    for (long d = 0; d < dim; d += NATIVE)
        FN(store_some)(to + d, some_f32(from + d, dim - d) / by, dim - d);
}

#include "matmul.h"
#include "matmul_i8.h"
#include "sampling.h"

#endif
