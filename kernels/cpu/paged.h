/* Storing K and V into pages, and the division of attention's work. Included by `ops.c` once for every pair of
 * SCALAR, FN: the dtype of the activations and its functions, and
 * STORED, ST, KV, SCALED: the dtype of the cache, its functions, the pair's functions, and whether it has scales.
 *
 * Owns the layout of a page as it is written. Knows no owners of pages. Scales are bfloat16.
 */
#define ITEM_TOKENS 16 /* query tokens of one row in one work item */

#if SCALED
/* Stores from / scale, rounded to nearest even, and returns the bits of the scale: largest / 127, rounded up. NaN
 * for a vector that is not finite. `to` has room for whole vectors. */
static uint16_t KV(quantise)(const SCALAR *from, long dim, int8_t *to) {
    vf most = {};
    vi bad = {};
    for (long d = 0; d < dim; d += LANES) {
        vf x = FN(load_some)(from + d, dim - d);
        most = vmax(vmax(x, -x), most);
        bad |= x - x != (vf){}; /* NaN and infinity */
    }
    float largest = lane_max(most), by = largest / 127.0f;
    uint32_t bits;
    memcpy(&bits, &by, sizeof bits);
    bits = (bits + 0xffff) >> 16;
    if (largest > 0 && bits == 0) bits = 1; /* the division has lost it */
    for (int i = 0; i < LANES; i++) if (bad[i]) bits = 0x7fc0;
    memset(to, 0, dim);
    if (bits == 0 || bits == 0x7fc0) return bits;
    uint32_t wide = bits << 16;
    memcpy(&by, &wide, sizeof by);
    for (long d = 0; d < dim; d += LANES) {
        vf x = FN(load_some)(from + d, dim - d) / by;
        x = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: to the nearest even integer */
        vb b = __builtin_convertvector(__builtin_convertvector(x, vi), vb);
        memcpy(to + d, &b, sizeof b);
    }
    return bits;
}
#endif

void KV(store_kv)(long tokens, long kv_heads, long dim, long page_size, const SCALAR *k, long k_stride, const SCALAR *v,
                  long v_stride, STORED *k_cache, STORED *v_cache, uint16_t *k_scales, uint16_t *v_scales,
                  const int64_t *slots, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * kv_heads * dim > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        long page = slots[t] / page_size, offset = slots[t] % page_size;
        for (long h = 0; h < kv_heads; h++) {
            long slot = (page * kv_heads + h) * page_size + offset;
            STORED *to = k_cache + (page * kv_heads + h) * dim * page_size + offset;
            const SCALAR *key = k + t * k_stride + h * dim, *value = v + t * v_stride + h * dim;
#if SCALED
            int8_t row[dim + LANES];
            k_scales[slot] = KV(quantise)(key, dim, row);
            for (long d = 0; d < dim; d++) to[d * page_size] = row[d]; /* transposed inside the page */
            v_scales[slot] = KV(quantise)(value, dim, row);
            memcpy(v_cache + slot * dim, row, dim);
#else
            for (long d = 0; d < dim; d++) to[d * page_size] = key[d]; /* transposed inside the page */
            memcpy(v_cache + slot * dim, value, dim * sizeof(STORED));
#endif
        }
    }
}

int KV(paged_attention)(long rows, long kv_heads, long group, long dim, long page_size, const SCALAR *q, long q_stride,
                        const STORED *k_cache, const STORED *v_cache, const uint16_t *k_scales,
                        const uint16_t *v_scales, const int32_t *page_table, long table_stride,
                        const int32_t *query_start, const int32_t *context_lens, float scale, long window,
                        float softcap, const float *slopes, SCALAR *out, int threads) {
    /* window 0, softcap 0, slopes NULL: none. One item: ITEM_TOKENS query tokens of one row and one kv head;
     * item_start[r] counts those before row r */
    long *item_start = malloc((rows + 1) * sizeof(long));
    if (!item_start) return -1;
    item_start[0] = 0;
    long work = 0; /* products of a query channel with a key channel */
    for (long r = 0; r < rows; r++) {
        long count = query_start[r + 1] - query_start[r];
        item_start[r + 1] = item_start[r] + (count + ITEM_TOKENS - 1) / ITEM_TOKENS * kv_heads;
        long context = context_lens[r], seen = window && window < context ? window : context;
        work += count * seen * kv_heads * group * dim;
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
        head_context at = {
            .keys = k_cache, .values = v_cache, .key_scales = k_scales, .value_scales = v_scales,
            .pages = page_table + r * table_stride, .head = head, .kv_heads = kv_heads, .dim = dim,
            .page_size = page_size, .group = group, .start_position = context_lens[r] - count,
            .window = window ? window : context_lens[r], .softcap = softcap * LOG2E,
            .slopes = slopes ? slopes + head * group : NULL,
        };
        for (at.first = token * group; at.first < last; at.first += MAX_QUERIES) {
            int nq = last - at.first < MAX_QUERIES ? last - at.first : MAX_QUERIES;
            float queries[dim * nq], mixed[nq * dim], denominators[nq];
            for (int i = 0; i < nq; i++) {
                long token = (at.first + i) / group, vector = head * group + (at.first + i) % group;
                FN(spread)(row_q + token * q_stride + vector * dim, dim, scale * LOG2E, nq, queries + i);
            }
            ST(attend_any)(nq, &at, queries, mixed, denominators);
            for (int i = 0; i < nq; i++) {
                long token = (at.first + i) / group, vector = head * group + (at.first + i) % group;
                FN(divide)(mixed + i * dim, dim, denominators[i], row_out + token * out_stride + vector * dim);
            }
        }
    }
    free(item_start);
    return 0;
}

#undef STORED
#undef ST
#undef KV
#undef SCALED
#undef SCALAR
#undef FN
