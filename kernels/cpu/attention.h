/* Attention over the pages of a row, or of rows that share them. Included by `ops.c` once per dtype of a cache:
 * STORED, ST (its functions) and SCALED (whether it has bfloat16 scales).
 *
 * Owns the layout of a page as it is read, and the order of attention's sums. Queries come and results go in fp32,
 * so the dtype of the activations is not known here.
 *
 * Order of summation: blocks of BLOCK context tokens from position 0, inside a block by 16 lanes for the softmax
 * and by token for the values. It is fixed by the query token alone, so neither chunking nor other rows nor threads
 * change a bit of it. Masked scores are -inf, whose weight is exactly 0. Tiles of 16 tokens that lie before the windows
 * of all queries are not read, nor are the page numbers of whole pages there.
 * Between two blocks all that is known of a query is its `softmax_state`, so it may walk on anywhere, bit for bit.
 */
#ifndef BLOCK
#define BLOCK 256 /* context tokens per round of the online softmax (Milakov and Gimelshein 2018) */
#define MAX_QUERIES 6 /* query vectors that share one pass over K and V */

/* Sums of one pass of the two products, in registers: as many as leave some for what is added. */
#if NATIVE == 16
#define SCORE_SUMS 12
#define MIX_SUMS 24
#elif NATIVE == 8
#define SCORE_SUMS 12
#define MIX_SUMS 12
#else
#define SCORE_SUMS 24
#define MIX_SUMS 24
#endif

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
    for (long t = begin * LANES; t < first; t++) scores[t] = -INFINITY;
    for (long t = last; t < end * LANES; t++) scores[t] = -INFINITY;
    vn most[PARTS], sum[PARTS], s;
    UNROLL for (int p = 0; p < PARTS; p++) most[p] = nsplat(-INFINITY);
    for (int t = begin; t < end; t++) UNROLL for (int p = 0; p < PARTS; p++)
        most[p] = nmax(most[p], native_f32(scores + t * LANES + p * NATIVE));
    vf each;
    memcpy(&each, most, sizeof each);
    float before = *largest, now = lane_max(each);
    now = now > before ? now : before;
    *largest = now;
    float rescale = nexp2_below(nsplat(before - now))[0];
    memcpy(sum, total, sizeof sum);
    UNROLL for (int p = 0; p < PARTS; p++) sum[p] *= rescale;
    for (int t = begin; t < end; t++) UNROLL for (int p = 0; p < PARTS; p++) {
        float *at = scores + t * LANES + p * NATIVE;
        s = nexp2_below(native_f32(at) - now);
        sum[p] += s;
        if (scales) s *= native_bf16(scales[t] + p * NATIVE);
        memcpy(at, &s, sizeof s);
    }
    memcpy(total, sum, sizeof sum);
    return rescale;
}
#endif

/* scores[q][at + tile*16 + lane] = query q . key of that token (times its scale), for `tiles` tiles of 16 tokens.
 * queries: [dim][nq]. `values` of the same tiles are fetched meanwhile: few queries would wait for them, since pages
 * lie anywhere. */
INLINE void ST(score_tiles)(const int nq, const int tiles, const float *queries, long dim, const STORED *const *keys,
                            const uint16_t *const *scales, long page_size, float (*scores)[BLOCK], long at,
                            const STORED *const *values) {
    vn sum[MAX_QUERIES][4 * PARTS];
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int i = 0; i < tiles * PARTS; i++) sum[q][i] = (vn){};
    for (long d = 0; d < dim; d++) {
        vn key[4 * PARTS];
        if (nq < MAX_QUERIES)
            UNROLL for (int t = 0; t < tiles; t++) __builtin_prefetch(values[t] + d * LANES);
        UNROLL for (int t = 0; t < tiles; t++) ST(tile)(keys[t] + d * page_size, key + t * PARTS);
        UNROLL for (int q = 0; q < nq; q++) {
            float x = queries[d * nq + q];
            UNROLL for (int i = 0; i < tiles * PARTS; i++) sum[q][i] += x * key[i];
        }
    }
    UNROLL for (int t = 0; t < tiles; t++) UNROLL for (int q = 0; q < nq; q++) {
        vn *tile = sum[q] + t * PARTS;
        ST(merge)(tile);
        if (SCALED)
            UNROLL for (int p = 0; p < PARTS; p++) tile[p] *= native_bf16(scales[t] + p * NATIVE);
        memcpy(scores[q] + at + t * LANES, tile, LANES * sizeof(float));
    }
}

/* mixed[q][c..] = mixed[q][c..] * rescale[q] + sum over tokens first..last of weight * value, for `tiles` times 16
 * channels from c on, the last of which may be fewer (n channels in all). */
INLINE void ST(mix_channels)(const int nq, const int tiles, float (*weights)[BLOCK], long first, long last,
                             const STORED *const *values, long dim, long c, long n, const float *rescale,
                             float *mixed) {
    vn sum[MAX_QUERIES][4 * PARTS];
    const int whole = n >= tiles * LANES;
    mixed += c;
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int t = 0; t < tiles; t++) {
        vn *tile = sum[q] + t * PARTS;
        memcpy(tile, mixed + q * dim + t * LANES, whole ? LANES * sizeof(float) : n * sizeof(float));
        UNROLL for (int p = 0; p < PARTS; p++) tile[p] *= rescale[q];
        ST(split)(tile);
    }
    for (long i = first, end; i < last; i = end) {
        end = i / LANES * LANES + LANES < last ? i / LANES * LANES + LANES : last; /* of the tile of 16 tokens */
        const STORED *row = values[i / LANES] + i % LANES * dim + c;
        for (const float *w = weights[0] + i, *stop = weights[0] + end; w < stop; w++, row += dim) {
            STORED padded[LANES] = {0};
            if (!whole) memcpy(padded, row, n * sizeof *row);
            vn value[4 * PARTS];
            UNROLL for (int t = 0; t < tiles; t++) ST(tile)(whole ? row + t * LANES : padded, value + t * PARTS);
            UNROLL for (int q = 0; q < nq; q++)
                UNROLL for (int p = 0; p < tiles * PARTS; p++) sum[q][p] += w[q * BLOCK] * value[p];
        }
    }
    UNROLL for (int q = 0; q < nq; q++) UNROLL for (int t = 0; t < tiles; t++) {
        vn *tile = sum[q] + t * PARTS;
        ST(merge)(tile);
        memcpy(mixed + q * dim + t * LANES, tile, whole ? LANES * sizeof(float) : n * sizeof(float));
    }
}

/* The same for all channels. */
INLINE void ST(mix_values)(const int nq, float (*weights)[BLOCK], long first, long last, const STORED *const *values,
                           long dim, const float *rescale, float *mixed) {
    const int most = 4 * nq * PARTS <= MIX_SUMS ? 4 : 2 * nq * PARTS <= MIX_SUMS ? 2 : 1;
    long c = 0;
    for (; dim - c >= most * LANES; c += most * LANES)
        ST(mix_channels)(nq, most, weights, first, last, values, dim, c, most * LANES, rescale, mixed);
    for (; dim - c >= LANES; c += LANES)
        ST(mix_channels)(nq, 1, weights, first, last, values, dim, c, LANES, rescale, mixed);
    if (c < dim) ST(mix_channels)(nq, 1, weights, first, last, values, dim, c, dim - c, rescale, mixed);
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
        for (; nq * 4 * PARTS <= SCORE_SUMS && t + 4 <= tiles; t += 4)
            ST(score_tiles)(nq, 4, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES, values + t);
        for (; nq * 2 * PARTS <= SCORE_SUMS && t + 2 <= tiles; t += 2)
            ST(score_tiles)(nq, 2, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES, values + t);
        for (; t < tiles; t++)
            ST(score_tiles)(nq, 1, queries, dim, keys + t, key_scales + t, page_size, scores, t * LANES, values + t);
        /* Of the block's tokens, those that some query sees. What one of them does not see weighs nothing for it:
         * values are finite, by `store_kv`. */
        const long some = first_visible(at, 0, from, tokens), some_end = last_visible(at, nq - 1, from, tokens);
        for (int i = 0; i < nq; i++) {
            const long first = first_visible(at, i, from, tokens), last = last_visible(at, i, from, tokens);
            rescale[i] = 1.0f;
            if (first < last) {
                if (at->softcap || at->slopes[i]) bend_scores(at, i, from, first, last, scores[i]);
                rescale[i] = weigh_block(scores[i], first, last, SCALED ? value_scales : NULL, state.largest + i,
                                         state.total + i);
            }
            for (long token = some; token < first; token++) scores[i][token] = 0;
            for (long token = last > some ? last : some; token < some_end; token++) scores[i][token] = 0;
        }
        ST(mix_values)(nq, scores, some, some_end, values, dim, rescale, mixed);
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
