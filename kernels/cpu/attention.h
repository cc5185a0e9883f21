/* Attention over the pages of a row, or of rows that share them. Included by `ops.c` once per dtype of a cache: STORED, ST (its functions)
 * and SCALED (whether it has bfloat16 scales).
 *
 * Owns the layout of a page as it is read, and the order of attention's sums. Queries come and results go in fp32,
 * so the dtype of the activations is not known here.
 *
 * Order of summation: blocks of BLOCK context tokens from position 0, inside a block by 16 lanes for the softmax
 * and by token for the values. It is fixed by the query token alone, so neither chunking nor other rows nor threads
 * change a bit of it. Masked scores are -inf, whose weight is exactly 0; their values are never multiplied. Tiles of
 * 16 tokens that lie before the windows of all queries are not read, nor are the page numbers of whole pages there.
 * Between two blocks all that is known of a query is its `softmax_state`, so where it is walked on changes no bit.
 */
#ifndef BLOCK
#define BLOCK 256 /* context tokens per round of the online softmax (Milakov and Gimelshein 2018) */
#define MAX_QUERIES 6 /* query vectors that share one pass over K and V: 6 x 4 accumulators fit 32 registers */

/* One kv head: where its pages lie, and the query vectors that ask, at most MAX_QUERIES. */
typedef struct {
    const void *keys, *values;
    const uint16_t *key_scales, *value_scales;
    const int32_t *pages;
    long head, kv_heads, dim, page_size;
    long positions[MAX_QUERIES]; /* of the query vectors: ascending where not all of them see all that is walked */
    long window; /* how many tokens a query sees at most */
    float softcap; /* in powers of two; 0: none */
    float slopes[MAX_QUERIES]; /* of the query vectors' heads; 0: none */
} head_context;

/* What query vectors know of the blocks behind them: arrays of one entry (of mixed: dim) per vector. */
typedef struct {
    float *largest; /* score; at first -infinity */
    vf *total; /* of weights, per lane; at first 0 */
    float *mixed; /* sums of weight * value; at first 0 */
} softmax_state;

INLINE long within(long token, long tokens) { return token < 0 ? 0 : token < tokens ? token : tokens; }

/* Of the `tokens` tokens of a block that begins at token `from`, query vector i sees those from first_visible on,
 * before last_visible. */
INLINE long first_visible(const head_context *at, int i, long from, long tokens) {
    return within(at->positions[i] - at->window + 1 - from, tokens);
}

INLINE long last_visible(const head_context *at, int i, long from, long tokens) {
    return within(at->positions[i] + 1 - from, tokens);
}

/* What query vector i adds to the scores of a block's tokens first..last beyond the product: cap, then slope. */
static __attribute__((noinline)) void bend_scores(const head_context *at, int i, long from, long first, long last,
                                                  float *scores) {
    float slope = at->slopes[i] * LOG2E;
    vf s;
    for (long t = first - first % LANES; t < last; t += LANES) {
        memcpy(&s, scores + t, sizeof s);
        if (at->softcap) s = at->softcap * vtanh(s / at->softcap);
        if (slope) s += slope * __builtin_convertvector(LANE + (int32_t)(from + t - at->positions[i]), vf);
        memcpy(scores + t, &s, sizeof s);
    }
}

/* One query's scores of a block become weights, of which those of tokens first..last count. Moves the running maximum
 * and the running sum per lane, and returns the factor for what was mixed before. With scales, the weights that are
 * left in `scores` are those of stored values; the sum counts them without. */
static __attribute__((noinline)) float weigh_block(float *scores, long first, long last, const uint16_t *const *scales,
                                                   float *largest, vf *total) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES; /* the tiles that hold them */
    vf most = splat(-INFINITY), s;
    for (long t = begin * LANES; t < first; t++) scores[t] = -INFINITY;
    for (long t = last; t < end * LANES; t++) scores[t] = -INFINITY;
    for (int t = begin; t < end; t++) {
        memcpy(&s, scores + t * LANES, sizeof s);
        most = vmax(most, s);
    }
    float before = *largest, now = lane_max(most);
    now = now > before ? now : before;
    *largest = now;
    float rescale = vexp2(splat(before - now))[0];
    vf sum = *total * rescale;
    for (int t = begin; t < end; t++) {
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

/* The few tokens that one query of a group sees and not all do. */
static __attribute__((noinline)) void ST(mix_rest)(float (*weights)[BLOCK], long first, long last,
                                                   const STORED *const *values, long dim, float rescale,
                                                   float *mixed) {
    ST(mix_values)(1, weights, first, last, values, dim, &rescale, mixed);
}

/* nq query vectors against one kv head's tokens from..end, whole blocks but for the last one, which all of them see in
 * part at least. queries: [dim][nq], already scaled. Moves their state on. */
INLINE void ST(attend)(const int nq, const head_context *at, const float *queries, long from, long end,
                       softmax_state state) {
    const long dim = at->dim, page_size = at->page_size;
    float scores[nq][BLOCK], rescale[nq], *mixed = state.mixed;
    const long begin = first_visible(at, 0, 0, LONG_MAX);
    if (from < begin) from = begin / BLOCK * BLOCK;
    for (; from < end; from += BLOCK) {
        const long tokens = end - from < BLOCK ? end - from : BLOCK;
        const int tiles = (tokens + LANES - 1) / LANES;
        int t = begin > from ? (begin - from) / LANES : 0; /* the first tile that any of them sees */
        const STORED *keys[BLOCK / LANES], *values[BLOCK / LANES];
        const uint16_t *key_scales[BLOCK / LANES], *value_scales[BLOCK / LANES];
        for (int i = t; i < tiles; i++) {
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
        long first[nq], last[nq]; /* of the block's tokens, those that each query sees */
        for (int i = 0; i < nq; i++) {
            first[i] = first_visible(at, i, from, tokens), last[i] = last_visible(at, i, from, tokens);
            rescale[i] = 1.0f;
            if (first[i] >= last[i]) continue;
            if (at->softcap || at->slopes[i]) bend_scores(at, i, from, first[i], last[i], scores[i]);
            rescale[i] = weigh_block(scores[i], first[i], last[i], SCALED ? value_scales : NULL, state.largest + i,
                                     state.total + i);
        }
        /* What not every query may see could be NaN, and 0 * NaN is NaN: the queries share the tokens that all of them
         * see, and each goes alone through its rest before and behind. That is the same sum in the same order. */
        const long shared = first[nq - 1], shared_end = last[0] > shared ? last[0] : shared;
        for (int i = 0; i < nq; i++) {
            long rest = last[i] < shared ? last[i] : shared;
            if (first[i] >= rest) continue;
            ST(mix_rest)(scores + i, first[i], rest, values, dim, rescale[i], mixed + i * dim);
            rescale[i] = 1.0f;
        }
        ST(mix_values)(nq, scores, shared, shared_end, values, dim, rescale, mixed);
        for (int i = 0; i < nq; i++)
            if (shared_end < last[i])
                ST(mix_rest)(scores + i, shared_end, last[i], values, dim, 1.0f, mixed + i * dim);
    }
}

static void ST(attend_any)(int nq, const head_context *at, const float *queries, long from, long end,
                           softmax_state state) {
    switch (nq) {
    case 1: ST(attend)(1, at, queries, from, end, state); break;
    case 2: ST(attend)(2, at, queries, from, end, state); break;
    case 3: ST(attend)(3, at, queries, from, end, state); break;
    case 4: ST(attend)(4, at, queries, from, end, state); break;
    case 5: ST(attend)(5, at, queries, from, end, state); break;
    case MAX_QUERIES: ST(attend)(MAX_QUERIES, at, queries, from, end, state); break;
    }
}

#undef STORED
#undef ST
#undef SCALED
