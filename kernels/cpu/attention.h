/* Attention over the pages of one row. Included by `ops.c` once per dtype of a cache: STORED, ST (its functions)
 * and SCALED (whether it has bfloat16 scales).
 *
 * Owns the layout of a page as it is read, and the order of attention's sums. Queries come and results go in fp32,
 * so the dtype of the activations is not known here.
 *
 * Order of summation: blocks of BLOCK context tokens from position 0, inside a block by 16 lanes for the softmax
 * and by token for the values. It is fixed by the query token alone, so neither chunking nor other rows nor threads
 * change a bit of it. Masked scores are -inf, whose weight is exactly 0; their values are never multiplied.
 */
#ifndef BLOCK
#define BLOCK 256 /* context tokens per round of the online softmax (Milakov and Gimelshein 2018) */
#define MAX_QUERIES 6 /* query vectors that share one pass over K and V: 6 x 4 accumulators fit 32 registers */

/* One kv head of one row: where its pages lie and which query vectors ask. */
typedef struct {
    const void *keys, *values;
    const uint16_t *key_scales, *value_scales;
    const int32_t *pages;
    long head, kv_heads, dim, page_size;
    long first, group, start_position; /* vector i belongs to token (first + i) / group of the row's queries */
} head_context;

/* How many of a block's tokens query vector i sees, when the block begins at token `from`. */
INLINE long visible_tokens(const head_context *at, int i, long from, long tokens) {
    long seen = at->start_position + (at->first + i) / at->group + 1 - from;
    return seen < 0 ? 0 : seen < tokens ? seen : tokens;
}

/* One query's scores of a block become weights, of which the first `seen` count. Moves the running maximum and the
 * running sum per lane, and returns the factor for what was mixed before. With scales, the weights that are left in
 * `scores` are those of stored values; the sum counts them without. */
static __attribute__((noinline)) float weigh_block(float *scores, int tiles, long seen, const uint16_t *const *scales,
                                                   float *largest, vf *total) {
    vf most = splat(-INFINITY), s;
    for (int t = 0; t < tiles; t++) {
        memcpy(&s, scores + t * LANES, sizeof s);
        long lanes = seen - t * LANES;
        if (lanes < LANES) {
            s = choose(LANE >= (int32_t)(lanes < 0 ? 0 : lanes), splat(-INFINITY), s);
            memcpy(scores + t * LANES, &s, sizeof s);
        }
        most = vmax(most, s);
    }
    float before = *largest, now = lane_max(most);
    now = now > before ? now : before;
    *largest = now;
    float rescale = vexp2(splat(before - now))[0];
    vf sum = *total * rescale;
    for (int t = 0; t < tiles; t++) {
        memcpy(&s, scores + t * LANES, sizeof s);
        s = vexp2(s - now);
        sum += s;
        if (scales) s *= load_bf16(scales[t]);
        memcpy(scores + t * LANES, &s, sizeof s);
    }
    *total = sum;
    return rescale;
}
#endif

/* scores[q][at + tile*16 + lane] = query q . key of that token (times its scale), for `tiles` tiles of 16 tokens.
 * queries: [dim][nq]. */
INLINE void ST(score_tiles)(const int nq, const int tiles, const float *queries, long dim, const STORED *const *keys,
                            const uint16_t *const *scales, long page_size, float (*scores)[BLOCK], long at) {
    vf sum[MAX_QUERIES][4] = {};
    for (long d = 0; d < dim; d++) {
        vf key[4];
        UNROLL for (int t = 0; t < tiles; t++) key[t] = ST(load)(keys[t] + d * page_size);
        UNROLL for (int q = 0; q < nq; q++) {
            vf x = splat(queries[d * nq + q]);
            UNROLL for (int t = 0; t < tiles; t++) sum[q][t] += x * key[t];
        }
    }
    UNROLL for (int t = 0; t < tiles; t++) {
        vf by = SCALED ? load_bf16(scales[t]) : (vf){};
        UNROLL for (int q = 0; q < nq; q++) {
            if (SCALED) sum[q][t] *= by;
            memcpy(scores[q] + at + t * LANES, &sum[q][t], sizeof(vf));
        }
    }
}

/* mixed[q][c..] = mixed[q][c..] * rescale[q] + sum over tokens first..last of weight * value, for `parts` vectors of
 * channels from c on, the last of which may be short (n channels in all). */
INLINE void ST(mix_channels)(const int nq, const int parts, float (*weights)[BLOCK], long first, long last,
                             const STORED *const *values, long dim, long c, long n, const float *rescale,
                             float *mixed) {
    vf sum[MAX_QUERIES][4];
    const int whole = n >= parts * LANES;
    mixed += c;
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int p = 0; p < parts; p++) {
        vf v = {};
        memcpy(&v, mixed + q * dim + p * LANES, whole ? sizeof v : n * sizeof(float));
        sum[q][p] = v * rescale[q];
    }
    for (long t = first; t < last; t++) {
        const STORED *row = values[t / LANES] + (t % LANES) * dim + c;
        vf value[4];
        UNROLL for (int p = 0; p < parts; p++)
            value[p] = whole ? ST(load)(row + p * LANES) : ST(load_some)(row + p * LANES, n);
        UNROLL for (int q = 0; q < nq; q++) {
            vf w = splat(weights[q][t]);
            UNROLL for (int p = 0; p < parts; p++) sum[q][p] += w * value[p];
        }
    }
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int p = 0; p < parts; p++)
        memcpy(mixed + q * dim + p * LANES, &sum[q][p], whole ? sizeof(vf) : n * sizeof(float));
}

/* The same for all channels. */
INLINE void ST(mix_values)(const int nq, float (*weights)[BLOCK], long first, long last, const STORED *const *values,
                           long dim, const float *rescale, float *mixed) {
    long c = 0;
    for (; dim - c >= 4 * LANES; c += 4 * LANES)
        ST(mix_channels)(nq, 4, weights, first, last, values, dim, c, 4 * LANES, rescale, mixed);
    for (; dim - c >= LANES; c += LANES)
        ST(mix_channels)(nq, 1, weights, first, last, values, dim, c, LANES, rescale, mixed);
    if (c < dim) ST(mix_channels)(nq, 1, weights, first, last, values, dim, c, dim - c, rescale, mixed);
}

/* The few tokens that one query of a group sees and the first one does not. */
static __attribute__((noinline)) void ST(mix_rest)(float (*weights)[BLOCK], long first, long last,
                                                   const STORED *const *values, long dim, float *mixed) {
    const float one = 1.0f;
    ST(mix_values)(1, weights, first, last, values, dim, &one, mixed);
}

/* nq query vectors against one kv head's context. queries: [dim][nq], already scaled. Leaves the sums of
 * weight * value in mixed [nq][dim] and those of the weights in denominators [nq]. */
INLINE void ST(attend)(const int nq, const head_context *at, const float *queries, float *mixed, float *denominators) {
    const long dim = at->dim, page_size = at->page_size;
    float scores[nq][BLOCK], largest[nq], rescale[nq];
    vf total[MAX_QUERIES] = {};
    for (int i = 0; i < nq; i++) largest[i] = -INFINITY;
    memset(mixed, 0, nq * dim * sizeof(float));
    long end = at->start_position + (at->first + nq - 1) / at->group + 1; /* the last query sees so many tokens */
    for (long from = 0; from < end; from += BLOCK) {
        long tokens = end - from < BLOCK ? end - from : BLOCK;
        int tiles = (tokens + LANES - 1) / LANES, t = 0;
        const STORED *keys[BLOCK / LANES], *values[BLOCK / LANES];
        const uint16_t *key_scales[BLOCK / LANES], *value_scales[BLOCK / LANES];
        for (int i = 0; i < tiles; i++) {
            long token = from + i * LANES, offset = token % page_size;
            long page = at->pages[token / page_size] * at->kv_heads + at->head;
            keys[i] = (const STORED *)at->keys + page * dim * page_size + offset;
            values[i] = (const STORED *)at->values + (page * page_size + offset) * dim;
            if (SCALED) {
                key_scales[i] = at->key_scales + page * page_size + offset;
                value_scales[i] = at->value_scales + page * page_size + offset;
            }
        }
        for (; nq <= 3 && t + 4 <= tiles; t += 4)
            ST(score_tiles)(nq, 4, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES);
        for (; t + 2 <= tiles; t += 2)
            ST(score_tiles)(nq, 2, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES);
        for (; t < tiles; t++)
            ST(score_tiles)(nq, 1, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES);
        for (int i = 0; i < nq; i++)
            rescale[i] = weigh_block(scores[i], tiles, visible_tokens(at, i, from, tokens),
                                     SCALED ? value_scales : NULL, largest + i, total + i);
        /* What not every query may see could be NaN, and 0 * NaN is NaN: the queries share the tokens that the first
         * of them sees, and each goes on alone with its rest. That is the same sum in the same order. */
        long shared = visible_tokens(at, 0, from, tokens);
        ST(mix_values)(nq, scores, 0, shared, values, dim, rescale, mixed);
        for (int i = 0; i < nq; i++) {
            long seen = visible_tokens(at, i, from, tokens);
            if (seen > shared) ST(mix_rest)(scores + i, shared, seen, values, dim, mixed + i * dim);
        }
    }
    for (int i = 0; i < nq; i++) denominators[i] = lane_sum(total[i]);
}

static void ST(attend_any)(int nq, const head_context *at, const float *queries, float *mixed, float *denominators) {
    switch (nq) {
    case 1: ST(attend)(1, at, queries, mixed, denominators); break;
    case 2: ST(attend)(2, at, queries, mixed, denominators); break;
    case 3: ST(attend)(3, at, queries, mixed, denominators); break;
    case 4: ST(attend)(4, at, queries, mixed, denominators); break;
    case 5: ST(attend)(5, at, queries, mixed, denominators); break;
    case MAX_QUERIES: ST(attend)(MAX_QUERIES, at, queries, mixed, denominators); break;
    }
}

#undef STORED
#undef ST
#undef SCALED
