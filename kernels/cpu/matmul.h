/* Products with a weight: y = x . weight^T (+ bias). Included by `ops.c` once per dtype of the activations: SCALAR, FN.
 *
 * Owns the order in which a weight is kept for them, and the division of their work. Knows no layer.
 *
 * A packed weight is a row of panels: PANEL outputs, and for each input, one after the other, their PANEL weights. In
 * bf16 two outputs lie in one word, NATIVE outputs apart, so that a shift and a mask make two vectors of one load.
 * A tile of the product, up to TILE tokens by a panel, or fewer tokens by several panels, stays in registers over
 * all inputs; a panel stays in a cache while the tokens of a block, whose x was widened to fp32 once,
 * pass by it. So few rows read a weight about as fast as memory gives it, and many rows do little beside multiplying.
 * Measured on two cores of an EPYC with AVX2 (`python -m tests.bench.bench_matmul`): 100 to 170 GFLOP/s in bf16 from
 * 16 rows on, as busy as the machine was, where torch 2.13 has 16: without AVX-512 no library of its own multiplies
 * bf16. fp32 is on a par with MKL's with many rows, and two to four times as fast with few.
 *
 * Order of summation: each result is one chain of fused multiply-adds from the first input to the last, whatever the
 * tile, so neither other rows nor threads change a bit of it.
 */
#ifndef PANEL
#if NATIVE == 16
#define TILE 12 /* tokens: 12 x 2 sums, 2 weights and an x fit 32 registers */
#else
#define TILE 6 /* 6 x 2 sums, 2 weights and an x fit 16 registers */
#endif
#if TILE == 12
#define ALL_TILES                                                                                             \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define ALL_TILES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#define PANEL (2 * NATIVE) /* outputs */
#define MOST_PANELS 4 /* in one tile */
#define MOST_ROWS 192 /* tokens in a block */
#define BLOCK_BYTES (3072 * 1024) /* of its x: more rows read a weight less often, and any cache feeds a tile */
#define PANEL_BYTES (16 * 1024) /* of a panel at a time: it and its part of x stay in the first cache */
#define PARALLEL_PRODUCTS (1 << 18) /* below which a second thread costs more than it saves */
#define SHARES 8 /* of a thread's part: one whose core is slower leaves more of its own to the others */
#define SUMS (MOST_ROWS * PANEL) /* of a block and its panels: more than those of few tokens by several panels */

/* How many panels a tile of so many tokens has: sums enough to wait for none, and no more than there are registers. */
INLINE int panels_for(int tokens) {
    const int most = (TILE == 12 ? 31 : 15) / (2 * (tokens + 1));
    return tokens == 1 ? MOST_PANELS : most < 1 ? 1 : most > MOST_PANELS ? MOST_PANELS : most;
}

/* How many of `groups` a thread takes at a time. */
INLINE long share_of(long groups, int threads) {
    const long share = groups / (SHARES * (long)threads);
    return share > 1 ? share : 1;
}

/* Into how many tokens a block is cut. */
INLINE long block_rows(long tokens, long inputs) {
    long rows = BLOCK_BYTES / (inputs * (long)sizeof(float));
    if (rows < 4 * TILE) rows = 4 * TILE;
    if (rows > MOST_ROWS) rows = MOST_ROWS;
    return rows < tokens ? rows : tokens;
}

/* Of the calling thread, for the x of a block; NULL where there is no memory. */
static float *matmul_scratch(long floats) {
    static _Thread_local float *scratch;
    static _Thread_local long size;
    if (!scratch || size < floats) { /* also for no tokens: NULL means something else */
        free(scratch);
        scratch = aligned_alloc(64, (floats * sizeof(float) + 64) / 64 * 64);
        size = scratch ? floats : 0;
    }
    return scratch;
}
#endif

/* A token's x as column of `to`, in fp32; and of `panel`, the two vectors of weights of one input. */
#ifdef WIDE
INLINE void FN(widen)(const SCALAR *x, long inputs, long columns, float *to) {
    for (long i = 0; i < inputs; i++) to[i * columns] = x[i];
}
INLINE void FN(load_panel)(const SCALAR *panel, vn *low, vn *high) {
    memcpy(low, panel, sizeof *low);
    memcpy(high, panel + NATIVE, sizeof *high);
}
#else
INLINE void FN(widen)(const SCALAR *x, long inputs, long columns, float *to) {
    for (long i = 0; i < inputs; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(to + i * columns, &bits, sizeof bits);
    }
}
INLINE void FN(load_panel)(const SCALAR *panel, vn *low, vn *high) {
    vnu words;
    memcpy(&words, panel, sizeof words);
    *low = (vn)(words << 16);
    *high = (vn)(words & 0xffff0000u);
}
#endif

/* packed[panels * inputs * PANEL], from weight [outputs, inputs]; outputs that do not exist are 0. */
void FN(pack)(long outputs, long inputs, const SCALAR *weight, long stride, SCALAR *packed, int threads) {
    const long panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (outputs * inputs > PARALLEL_WORK)
    for (long p = 0; p < panels; p++) {
        SCALAR *panel = packed + p * inputs * PANEL;
        for (long j = 0; j < PANEL; j++) {
            const long output = p * PANEL + j, at = sizeof(SCALAR) == 4 ? j : j % NATIVE * 2 + j / NATIVE;
            const SCALAR *row = weight + output * stride;
            for (long i = 0; i < inputs; i++) panel[i * PANEL + at] = output < outputs ? row[i] : 0;
        }
    }
}

/* Adds to the sums of `tokens` tokens, a row of PANEL * panels each, the products of `inputs` inputs: x [inputs][tokens],
 * and of each panel, `stride` weights after the one before, as many inputs. */
INLINE void FN(multiply)(const int tokens, const int panels, long inputs, const float *x, const SCALAR *packed,
                         long stride, float *sums) {
    const long width = panels * PANEL;
    vn sum[TILE][2 * MOST_PANELS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int j = 0; j < 2 * panels; j++)
        memcpy(&sum[t][j], sums + t * width + j * NATIVE, sizeof(vn));
    for (const float *end = x + inputs * tokens; x < end; x += tokens, packed += PANEL) {
        vn weight[2 * MOST_PANELS];
        UNROLL for (int p = 0; p < panels; p++)
            FN(load_panel)(packed + p * stride, weight + 2 * p, weight + 2 * p + 1);
        UNROLL for (int t = 0; t < tokens; t++) {
            vn by = nsplat(x[t]);
            UNROLL for (int j = 0; j < 2 * panels; j++) sum[t][j] += by * weight[j];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int j = 0; j < 2 * panels; j++)
        memcpy(sums + t * width + j * NATIVE, &sum[t][j], sizeof(vn));
}

/* `panels`: 1 or `panels_for(tokens)`. */
static void FN(multiply_any)(int tokens, int panels, long inputs, const float *x, const SCALAR *packed, long stride,
                             float *sums) {
#define CASE(n)                                                                                                       \
    case n:                                                                                                           \
        if (panels_for(n) > 1 && panels > 1) FN(multiply)(n, panels_for(n), inputs, x, packed, stride, sums);         \
        else FN(multiply)(n, 1, inputs, x, packed, stride, sums);                                                     \
        break;
    switch (tokens) { ALL_TILES }
#undef CASE
}

/* What a block of `rows` tokens has to do with `panels` panels that hold `outputs` outputs: out [rows, out_stride]. */
INLINE void FN(multiply_block)(long rows, long tiles, int panels, long inputs, const float *x, const SCALAR *packed,
                               const SCALAR *bias, long outputs, SCALAR *out, long out_stride) {
    const long width = panels * PANEL, depth = PANEL_BYTES / (PANEL * sizeof(SCALAR));
    float sums[SUMS + NATIVE]; /* a last vector may reach beyond a narrow row */
    memset(sums, 0, rows * width * sizeof *sums);
    for (long from = 0; from < inputs; from += depth)
        for (long tile = 0; tile < tiles; tile++) {
            const long first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
            FN(multiply_any)(count, panels, inputs - from < depth ? inputs - from : depth,
                             x + first * inputs + from * count, packed + from * PANEL, inputs * PANEL,
                             sums + first * width);
        }
    for (long t = 0; t < rows; t++)
        for (long j = 0; j < outputs; j += NATIVE) {
            vn v = native_f32(sums + t * width + j);
            if (bias) v += FN(load_some)(bias + j, outputs - j);
            FN(store_some)(out + t * out_stride + j, v, outputs - j);
        }
}

/* out[t] = x[t] . weight^T (+ bias), out [tokens, outputs]; bias may be NULL. -1 where there is no memory. */
int FN(matmul)(long tokens, long outputs, long inputs, const SCALAR *x, long x_stride, const SCALAR *packed,
               const SCALAR *bias, SCALAR *out, int threads) {
    const long block = block_rows(tokens, inputs), panels = (outputs + PANEL - 1) / PANEL;
    float *wide = matmul_scratch(block * inputs);
    if (!wide) return -1;
    for (long from = 0; from < tokens; from += block) {
        const long rows = tokens - from < block ? tokens - from : block, tiles = (rows + TILE - 1) / TILE;
        const long together = tiles == 1 ? panels_for(rows) : 1, groups = (panels + together - 1) / together;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * inputs > 4 * PARALLEL_WORK)
        for (long tile = 0; tile < tiles; tile++) {
            const long first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
            for (long t = 0; t < count; t++)
                FN(widen)(x + (from + first + t) * x_stride, inputs, count, wide + first * inputs + t);
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic, share_of(groups, threads)) \
    if (rows * outputs * inputs > PARALLEL_PRODUCTS)
        for (long group = 0; group < groups; group++)
            for (long p = group * together, some; p < panels && p < (group + 1) * together; p += some) {
                some = p + together <= panels ? together : 1;
                const long begin = p * PANEL, left = outputs - begin;
                FN(multiply_block)(rows, tiles, some, inputs, wide, packed + begin * inputs,
                                   bias ? bias + begin : NULL, left < some * PANEL ? left : some * PANEL,
                                   out + (from * outputs) + begin, outputs);
            }
    }
    return 0;
}
