/* Storing K and V into pages, and the work items of attention. Included by `ops.c` once for every pair of
 * SCALAR, FN: the dtype of the activations and its functions, and
 * STORED, ST, KV, SCALED: the dtype of the cache, its functions, the pair's functions, and whether it has scales.
 *
 * Owns the layout of a page as it is written. Knows no owners of pages, and of shared prefixes only what `shared.h`
 * has made of them. Scales are bfloat16.
 */
#define ITEM_TOKENS 16 /* query tokens of one row in one work item */

#if SCALED
/* Stores from / scale, rounded to nearest even, and returns the bits of the scale: largest / 127, rounded up. NaN
 * for a vector that is not finite. `to` has room for whole vectors. */
static uint16_t KV(quantise)(const SCALAR *from, long dim, int8_t *to) {
    float largest = FN(largest)(from, dim), by = largest / 127.0f;
    uint32_t bits;
    memcpy(&bits, &by, sizeof bits);
    bits = (bits + 0xffff) >> 16;
    if (largest > 0 && bits == 0) bits = 1; /* the division has lost it */
    if (largest != largest) bits = 0x7fc0;
    memset(to, 0, dim);
    if (bits == 0 || bits == 0x7fc0) return bits;
    uint32_t wide = bits << 16;
    memcpy(&by, &wide, sizeof by);
    for (long d = 0; d < dim; d += NATIVE) {
        vn x = nround(FN(load_some)(from + d, dim - d) / by);
        vnb b = __builtin_convertvector(__builtin_convertvector(x, vni), vnb);
        memcpy(to + d, &b, sizeof b);
    }
    return bits;
}
#endif

void KV(store_kv)(long tokens, long kv_heads, long dim, long page_size, const SCALAR *k, long k_stride, const SCALAR *v,
                  long v_stride, STORED *k_cache, STORED *v_cache, uint16_t *k_scales, uint16_t *v_scales,
                  const int64_t *slots, int threads) {
    SCALAR failed[dim + NATIVE], nothing[dim];
    for (long d = 0; d < dim; d += NATIVE) FN(store)(failed + d, nsplat(NAN));
    memset(nothing, 0, sizeof nothing);
#pragma omp parallel for num_threads(threads) if (tokens * kv_heads * dim > PARALLEL_WORK)
    for (long t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        long page = slots[t] / page_size, offset = slots[t] % page_size;
        for (long h = 0; h < kv_heads; h++) {
            long slot = (page * kv_heads + h) * page_size + offset;
            STORED *to = k_cache + (page * kv_heads + h) * dim * page_size + offset;
            const SCALAR *key = k + t * k_stride + h * dim, *value = v + t * v_stride + h * dim;
            if (isnan(FN(largest)(value, dim))) key = failed, value = nothing;
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

/* Vector `vector` of row r's queries for a kv head, as the i-th of nq that walk together: vector v is of query token
 * v / group and of the head's query head v % group. */
INLINE void KV(place_query)(const attention_call *call, const SCALAR *q, long r, long head, long vector, int i, int nq,
                            head_context *at, float *queries) {
    long token = vector / call->group, which = head * call->group + vector % call->group;
    long start = call->query_start[r], count = call->query_start[r + 1] - start;
    at->positions[i] = call->context_lens[r] - count + token;
    at->slopes[i] = call->slopes ? call->slopes[which] : 0;
    FN(spread)(q + (start + token) * call->q_stride + which * call->dim, call->dim, call->scale * LOG2E, nq, queries + i);
}

/* Query vectors that walk through the pages of one kv head together, MAX_QUERIES of them at a time: each block of the
 * tokens from..end that they see serves all of them before the next one is read. queries: [chunk][dim][of the chunk]. */
static void KV(walk)(const head_context *chunks, const float *queries, long vectors, long from, long end,
                     softmax_state state) {
    const long dim = chunks->dim;
    for (; from < end; from += BLOCK)
        for (long first = 0; first < vectors; first += MAX_QUERIES) {
            const head_context *at = chunks + first / MAX_QUERIES;
            const int nq = chunk_vectors(vectors, first);
            long stop = at->positions[nq - 1] + 1 < end ? at->positions[nq - 1] + 1 : end;
            if (stop > from + BLOCK) stop = from + BLOCK;
            const softmax_state behind = {state.largest + first, state.total + first, state.mixed + first * dim};
            ST(attend_any)(nq, at, queries + first * dim, from, stop, behind);
        }
}

/* One item: some query vectors of a group of rows and one kv head, through the blocks that the group shares. */
static void KV(attend_shared)(const attention_call *call, const SCALAR *q, const shared_walk *walk, long item) {
    const shared_part part = part_of_item(walk, item);
    const softmax_state state = state_at(walk, part.state);
    float queries[part.vectors * call->dim];
    head_context chunks[ITEM_VECTORS / MAX_QUERIES];
    begin_walk(state, part.vectors, call->dim);
    for (long v = 0; v < part.vectors; v++) {
        long first = v / MAX_QUERIES * MAX_QUERIES, which = part.first + v, r = part.rows[which / call->group];
        head_context *at = chunks + v / MAX_QUERIES;
        if (v == first) *at = head_of_row(call, part.leader, part.head);
        KV(place_query)(call, q, r, part.head, which % call->group, v - first, chunk_vectors(part.vectors, first), at,
                        queries + first * call->dim);
    }
    KV(walk)(chunks, queries, part.vectors, 0, part.tokens, state);
}

/* Query vectors first..last of row r and one kv head, at most ITEM_VECTORS, behind what the row has walked with others. */
static void KV(attend_vectors)(const attention_call *call, const SCALAR *q, const shared_walk *walk, long r, long head,
                               long first, long last, SCALAR *out) {
    const long group = call->group, dim = call->dim, vectors = last - first;
    const long from = walk ? walk->until[r] : 0;
    float queries[vectors * dim], mixed[vectors * dim], largest[vectors];
    vf total[ITEM_VECTORS];
    head_context chunks[ITEM_VECTORS / MAX_QUERIES];
    softmax_state state = {.largest = largest, .total = total, .mixed = mixed};
    for (long v = 0; v < vectors; v++) {
        long begin = v / MAX_QUERIES * MAX_QUERIES;
        head_context *at = chunks + v / MAX_QUERIES;
        if (v == begin) *at = head_of_row(call, r, head);
        KV(place_query)(call, q, r, head, first + v, v - begin, chunk_vectors(vectors, begin), at, queries + begin * dim);
    }
    if (from) state = state_at(walk, state_of_row(walk, r, head) + first);
    else begin_walk(state, vectors, dim);
    KV(walk)(chunks, queries, vectors, from, call->context_lens[r], state);
    for (long v = 0; v < vectors; v++) {
        long token = call->query_start[r] + (first + v) / group, which = head * group + (first + v) % group;
        float sum = lane_sum(state.total[v]);
        if (call->sinks) sum += exp2f(call->sinks[which] * LOG2E - state.largest[v]); /* infinite: nothing is left */
        FN(divide)(state.mixed + v * dim, dim, sum, out + (token * call->kv_heads * group + which) * dim);
    }
}

/* One item: the query tokens of row r from `token` on, and one kv head. */
static void KV(attend_alone)(const attention_call *call, const SCALAR *q, const shared_walk *walk, long r, long head,
                             long token, SCALAR *out) {
    const long count = call->query_start[r + 1] - call->query_start[r];
    const long last = (token + ITEM_TOKENS < count ? token + ITEM_TOKENS : count) * call->group;
    for (long first = token * call->group; first < last; first += ITEM_VECTORS)
        KV(attend_vectors)(call, q, walk, r, head, first, first + ITEM_VECTORS < last ? first + ITEM_VECTORS : last, out);
}

int KV(paged_attention)(long rows, long kv_heads, long group, long dim, long page_size, const SCALAR *q, long q_stride,
                        const STORED *k_cache, const STORED *v_cache, const uint16_t *k_scales,
                        const uint16_t *v_scales, const int32_t *page_table, long table_stride,
                        const int32_t *query_start, const int32_t *context_lens, float scale, long window,
                        float softcap, const float *slopes, const float *sinks, const int32_t *tokens,
                        const int32_t *members, const int32_t *starts, long groups, SCALAR *out, int threads) {
    const attention_call call = {
        .rows = rows, .kv_heads = kv_heads, .group = group, .dim = dim, .q_stride = q_stride,
        .table_stride = table_stride, .window = window, .page_table = page_table, .query_start = query_start,
        .context_lens = context_lens, .slopes = slopes, .sinks = sinks, .scale = scale,
        .cache = {
            .keys = k_cache, .values = v_cache, .key_scales = k_scales, .value_scales = v_scales,
            .kv_heads = kv_heads, .dim = dim, .page_size = page_size, .softcap = softcap * LOG2E,
        },
    };
    /* One item: ITEM_TOKENS query tokens of one row and one kv head; item_start[r] counts those before row r */
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
    shared_walk *walk = groups ? plan_shared_walk(&call, tokens, members, starts, groups, threads) : NULL;
    const long shared_items = walk ? walk->items : 0;
#pragma omp parallel num_threads(threads) if (work > 4 * PARALLEL_WORK)
    {
        if (shared_items) {
#pragma omp for schedule(dynamic, 1)
            for (long item = 0; item < shared_items; item++) KV(attend_shared)(&call, q, walk, item);
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < item_start[rows]; item++) {
            long r = 0, above = rows;
            while (above - r > 1) { /* the row whose items include this one */
                long middle = (r + above) / 2;
                if (item_start[middle] <= item) r = middle;
                else above = middle;
            }
            while (item_start[r + 1] <= item) r++; /* rows without tokens own no item */
            long head = (item - item_start[r]) % kv_heads, token = (item - item_start[r]) / kv_heads * ITEM_TOKENS;
            KV(attend_alone)(&call, q, walk, r, head, token, out);
        }
    }
    free(walk);
    free(item_start);
    return 0;
}

#undef STORED
#undef ST
#undef KV
#undef SCALED
#undef SCALAR
#undef FN
