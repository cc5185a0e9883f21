/* Products with a weight of 8-bit integers. Included by `ops.c` once per dtype of the activations: SCALAR, FN.
 *
 * Owns the order in which such a weight is kept, how x is rounded to integers, and the product. Knows no layer; cuts
 * the work as `matmul.h` does, whose panels and tiles these are. Of two neighbouring inputs a panel has their weights
 * for each of its outputs side by side, so that one instruction multiplies two pairs and adds them (`madd`). Sums are
 * integers, so no order of them changes a bit.
 */
#ifndef PAIR
#define PAIR 2 /* inputs */

typedef int16_t vns __attribute__((vector_size(4 * NATIVE)));
typedef uint64_t vnd __attribute__((vector_size(4 * NATIVE)));
typedef int8_t vnc __attribute__((vector_size(2 * NATIVE)));

/* Of each pair of 16-bit numbers the sum of the two products. */
INLINE vni madd(vns a, vns b) {
#if NATIVE == 16 && defined(__AVX512BW__)
    return (vni)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif NATIVE == 8 && defined(__AVX2__)
    return (vni)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    vni x = (vni)a, y = (vni)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

INLINE vns load_pairs(const int8_t *p) {
#if NATIVE == 16 && defined(__AVX512BW__)
    return (vns)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif NATIVE == 8 && defined(__AVX2__)
    return (vns)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); /* the line below takes GCC 12 four of them */
#else
    vnc b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vns);
#endif
}

/* packed[panels * pairs * PANEL * PAIR], from weight [outputs, inputs]; what does not exist is 0. */
void pack_i8(long outputs, long inputs, const int8_t *weight, int8_t *packed, int threads) {
    const long panels = (outputs + PANEL - 1) / PANEL, padded = (inputs + 1) / PAIR * PAIR;
#pragma omp parallel for num_threads(threads) if (outputs * inputs > PARALLEL_WORK)
    for (long p = 0; p < panels; p++)
        for (long j = 0; j < PANEL; j++)
            for (long i = 0; i < padded; i++) {
                long output = p * PANEL + j, there = output < outputs && i < inputs;
                packed[p * padded * PANEL + i / PAIR * PANEL * PAIR + j * PAIR + i % PAIR] =
                    there ? weight[output * inputs + i] : 0;
            }
}

/* As `multiply` of matmul.h: x [pairs][tokens], a pair in each word. */
INLINE void multiply_i8(const int tokens, const int panels, long pairs, const int32_t *x, const int8_t *packed,
                        long stride, int32_t *sums) {
    const long width = panels * PANEL;
    vni sum[TILE][2 * MOST_PANELS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int j = 0; j < 2 * panels; j++)
        memcpy(&sum[t][j], sums + t * width + j * NATIVE, sizeof(vni));
    for (const int32_t *end = x + pairs * tokens; x < end; x += tokens, packed += PANEL * PAIR) {
        vns weight[2 * MOST_PANELS];
        UNROLL for (int j = 0; j < 2 * panels; j++)
            weight[j] = load_pairs(packed + j / 2 * stride + j % 2 * NATIVE * PAIR);
        UNROLL for (int t = 0; t < tokens; t++) {
            vns by = (vns)(x[t] - (vni){});
            UNROLL for (int j = 0; j < 2 * panels; j++) sum[t][j] += madd(weight[j], by);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int j = 0; j < 2 * panels; j++)
        memcpy(sums + t * width + j * NATIVE, &sum[t][j], sizeof(vni));
}

static void multiply_any_i8(int tokens, int panels, long pairs, const int32_t *x, const int8_t *packed, long stride,
                            int32_t *sums) {
#define CASE(n)                                                                                                       \
    case n:                                                                                                           \
        if (panels_for(n) > 1 && panels > 1) multiply_i8(n, panels_for(n), pairs, x, packed, stride, sums);           \
        else multiply_i8(n, 1, pairs, x, packed, stride, sums);                                                       \
        break;
    switch (tokens) { ALL_TILES }
#undef CASE
}
#endif

/* A row as column of `to`: words of two integers each, to[i * columns], which times the returned scale are the row;
 * rounded to nearest even. The scale is the largest |x| / 127; NaN for a row that is not finite, whose integers are 0. */
static float FN(quantise_row)(const SCALAR *from, long inputs, long columns, int32_t *to) {
    const float scale = FN(largest)(from, inputs) / 127.0f;
    const float by = scale > 0 ? scale : 1.0f;
    for (long i = 0; i < inputs; i += NATIVE) {
        vn x = nround(FN(load_some)(from + i, inputs - i) / by);
        if (scale != scale) x = (vn){};
        vnd pairs = (vnd)__builtin_convertvector(x, vni);
        pairs = (pairs & 0xffff) | (pairs >> 16 & 0xffff0000u); /* in the low half of each */
        const long some = inputs - i < NATIVE ? (inputs - i + 1) / PAIR : NATIVE / PAIR;
        for (long j = 0; j < some; j++) to[(i / PAIR + j) * columns] = (int32_t)pairs[j];
    }
    return scale;
}

/* As `multiply_block` of matmul.h, for integers: x_scales [rows], scales [outputs]. */
INLINE void FN(multiply_block_i8)(long rows, long tiles, int panels, long pairs, const int32_t *x,
                                  const float *x_scales, const int8_t *packed, const float *scales,
                                  const SCALAR *bias, long outputs, SCALAR *out, long out_stride) {
    const long width = panels * PANEL, depth = PANEL_BYTES / (PANEL * PAIR);
    int32_t sums[SUMS + NATIVE]; /* a last vector may reach beyond a narrow row */
    memset(sums, 0, rows * width * sizeof *sums);
    for (long from = 0; from < pairs; from += depth)
        for (long tile = 0; tile < tiles; tile++) {
            const long first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
            multiply_any_i8(count, panels, pairs - from < depth ? pairs - from : depth,
                            x + first * pairs + from * count, packed + from * PANEL * PAIR, pairs * PANEL * PAIR,
                            sums + first * width);
        }
    for (long t = 0; t < rows; t++)
        for (long j = 0; j < outputs; j += NATIVE) {
            vni whole;
            memcpy(&whole, sums + t * width + j, sizeof whole);
            vn v = __builtin_convertvector(whole, vn) * (some_f32(scales + j, outputs - j) * x_scales[t]);
            if (bias) v += FN(load_some)(bias + j, outputs - j);
            FN(store_some)(out + t * out_stride + j, v, outputs - j);
        }
}

/* out[t] = x[t] . weight^T (+ bias), x rounded as `quantise_row` does; bias may be NULL. -1 where there is no memory. */
int FN(matmul_i8)(long tokens, long outputs, long inputs, const SCALAR *x, long x_stride, const int8_t *packed,
                  const float *scales, const SCALAR *bias, SCALAR *out, int threads) {
    const long pairs = (inputs + 1) / PAIR, block = block_rows(tokens, pairs), panels = (outputs + PANEL - 1) / PANEL;
    int32_t *whole = (int32_t *)matmul_scratch(block * (pairs + 1));
    if (!whole) return -1;
    float *x_scales = (float *)(whole + block * pairs);
    for (long from = 0; from < tokens; from += block) {
        const long rows = tokens - from < block ? tokens - from : block, tiles = (rows + TILE - 1) / TILE;
        const long together = tiles == 1 ? panels_for(rows) : 1, groups = (panels + together - 1) / together;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * inputs > PARALLEL_WORK)
        for (long tile = 0; tile < tiles; tile++) {
            const long first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
            for (long t = first; t < first + count; t++)
                x_scales[t] = FN(quantise_row)(x + (from + t) * x_stride, inputs, count,
                                               whole + first * pairs + t - first);
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic, share_of(groups, threads)) \
    if (rows * outputs * inputs > PARALLEL_PRODUCTS)
        for (long group = 0; group < groups; group++)
            for (long p = group * together, some; p < panels && p < (group + 1) * together; p += some) {
                some = p + together <= panels ? together : 1;
                const long begin = p * PANEL, left = outputs - begin;
                FN(multiply_block_i8)(rows, tiles, some, pairs, whole, x_scales, packed + begin * pairs * PAIR,
                                      scales + begin, bias ? bias + begin : NULL,
                                      left < some * PANEL ? left : some * PANEL, out + from * outputs + begin, outputs);
            }
    }
    return 0;
}
