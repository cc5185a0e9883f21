/* The operations on a CPU, for bf16 and fp32 storage, computed in fp32; `paged.h`, `shared.h` and `attention.h`
 * hold the two on pages, `matmul.h` and `matmul_i8.h` products with weights, `vectors.h` what all are written in.
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

/* The activations of the contract, by the numbers that kernels/cpu/__init__.py passes. */
enum { SILU, GELU, GELU_TANH, RELU };

INLINE vf activated(int how, vf x) {
    const float log2_e = 1.44269504f;
    if (how == RELU) return choose(x < (vf){}, (vf){}, x); /* NaN stays NaN */
    if (how == SILU) return x / (1.0f + vexp2(x * -log2_e));
    if (how == GELU_TANH) { /* (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) */
        vf u = 0.797884561f * x * (1.0f + 0.044715f * x * x);
        return x / (1.0f + vexp2(u * (-2.0f * log2_e)));
    }
    /* GELU: x * Phi(x), where Phi(-|x|) = exp(-x*x/2) * t * polynomial(t), t = 1 / (1 + 0.2687 |x|); the polynomial
     * is a minimax fit of our own, relative error 2e-8 up to |x| = 14, where Phi is nothing to an fp32 */
    vf t = 1.0f / (1.0f + 0.268700577f * vmax(x, -x));
    vf p = splat(2.94825796e-2f);
    p = p * t - 0.131135744f;
    p = p * t + 0.181919201f;
    p = p * t - 8.07142970e-2f;
    p = p * t + 0.115000302f;
    p = p * t + 6.93309872e-2f;
    p = p * t + 0.101951585f;
    p = p * t + 0.106959930f;
    p = p * t + 0.107205466f;
    vf tail = p * t * vexp2(x * x * (-0.5f * log2_e));
    return x * choose(x < (vf){}, tail, 1.0f - tail);
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

/* How many outputs a panel of a packed weight has. */
long panel_outputs(void) { return PANEL; }

#else /* once per dtype of the activations */

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

/* out[t] = norm(x[t] (+ residual[t])) * (weight + offset); residual is overwritten by the rounded sum. residual may be NULL. */
void FN(rms_norm)(long tokens, long width, const SCALAR *x, long x_stride, SCALAR *residual, long r_stride,
                  const SCALAR *weight, float eps, float offset, SCALAR *out, int threads) {
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
            FN(store_some)(out + t * width + i, a * (FN(load_some)(weight + i, width - i) + offset), width - i);
        }
    }
}

/* out[t] = (x[t] (+ residual[t]) - mean) / deviation * weight (+ bias), as rms_norm; residual and bias may be NULL. */
void FN(layer_norm)(long tokens, long width, const SCALAR *x, long x_stride, SCALAR *residual, long r_stride,
                    const SCALAR *weight, const SCALAR *bias, float eps, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * x_stride;
        vf total = {}, squares = {};
        if (residual) {
            SCALAR *sum = residual + t * r_stride;
            for (long i = 0; i < width; i += LANES) {
                vf a = FN(load_some)(row + i, width - i) + FN(load_some)(sum + i, width - i);
                FN(store_some)(sum + i, a, width - i);
            }
            row = sum;
        }
        for (long i = 0; i < width; i += LANES) total += FN(load_some)(row + i, width - i);
        float mean = lane_sum(total) / width;
        for (long i = 0; i < width; i += LANES) {
            vf a = FN(load_some)(row + i, width - i) - mean;
            a = choose(LANE < (int32_t)(width - i), a, (vf){}); /* lanes behind the row are not of it */
            squares += a * a;
        }
        float scale = 1.0f / sqrtf(lane_sum(squares) / width + eps);
        for (long i = 0; i < width; i += LANES) {
            vf a = (FN(load_some)(row + i, width - i) - mean) * scale * FN(load_some)(weight + i, width - i);
            if (bias) a += FN(load_some)(bias + i, width - i);
            FN(store_some)(out + t * width + i, a, width - i);
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
    for (long i = 0; i < width; i += LANES) {
        vf a = activated(how, FN(load_some)(x + i, width - i));
        if (up) a *= FN(load_some)(up + i, width - i);
        FN(store_some)(out + i, a, width - i);
    }
}

/* out[t] = act(x[t]) (* up[t]); up may be NULL. */
void FN(act)(long tokens, long width, const SCALAR *x, const SCALAR *up, long stride, SCALAR *out, int how, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        const SCALAR *row = x + t * stride, *by = up ? up + t * stride : NULL;
        SCALAR *to = out + t * width;
        if (how == SILU) FN(act_row)(SILU, width, row, by, to);
        else if (how == GELU) FN(act_row)(GELU, width, row, by, to);
        else if (how == GELU_TANH) FN(act_row)(GELU_TANH, width, row, by, to);
        else FN(act_row)(RELU, width, row, by, to);
    }
}

/* out[t] = cap * tanh(x[t] / cap) */
void FN(softcap)(long tokens, long width, const SCALAR *x, long stride, float cap, SCALAR *out, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            vf a = cap * vtanh(FN(load_some)(x + t * stride + i, width - i) / cap);
            FN(store_some)(out + t * width + i, a, width - i);
        }
}

/* A row as column of `to`: to[d * columns] = from[d] * by. */
INLINE void FN(spread)(const SCALAR *from, long dim, float by, int columns, float *to) {
    float row[LANES];
    for (long d = 0; d < dim; d += LANES) {
        vf v = FN(load_some)(from + d, dim - d) * by;
        memcpy(row, &v, sizeof v);
        for (long j = 0; j < LANES && d + j < dim; j++) to[(d + j) * columns] = row[j];
    }
}

INLINE void FN(divide)(const float *from, long dim, float by, SCALAR *to) {
    for (long d = 0; d < dim; d += LANES) {
        vf v = {};
        memcpy(&v, from + d, (dim - d < LANES ? dim - d : LANES) * sizeof(float));
        FN(store_some)(to + d, v / by, dim - d);
    }
}

#include "matmul.h"
#include "matmul_i8.h"

#endif
