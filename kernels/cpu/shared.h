/* Rows that share a prefix: which blocks of it they walk together, and in which items. Included by `ops.c` once.
 *
 * Owns what one call of attention is given, and what is made of its `SharedPrefixes`. Knows no dtype: the walk itself
 * is `attend` of `attention.h`. Whole blocks are shared, and only where no window hides a token of them, so all that a
 * row's own walk has to know of them is its `softmax_state`; every bit is that of one walk. Rows of one query walk
 * together, others alone.
 */
#define ITEM_VECTORS 48 /* query vectors that walk together, at most: whole chunks of MAX_QUERIES */
#define ITEMS_PER_THREAD 4 /* and fewer vectors where there would be fewer items than that */

/* What `paged_attention` is given, without the types of q and of the cache. window 0, slopes and sinks NULL: none. */
typedef struct {
    long rows, kv_heads, group, dim, q_stride, table_stride, window;
    const int32_t *page_table, *query_start, *context_lens;
    const float *slopes, *sinks;
    float scale;
    head_context cache; /* without pages, head, window and query vectors */
} attention_call;

/* The cache's head as row r reads it. */
INLINE head_context head_of_row(const attention_call *call, long r, long head) {
    head_context at = call->cache;
    at.pages = call->page_table + r * call->table_stride;
    at.head = head;
    at.window = call->window ? call->window : LONG_MAX / 2;
    return at;
}

/* G groups, with N rows that walk with others. */
typedef struct {
    long groups, walkers, kv_heads, group, dim;
    long items, width; /* query vectors in an item, at most */
    long *until; /* [R] the token from which a row walks alone */
    long *place; /* [R] where a row that does not walk alone stands in `rows` */
    long *rows; /* [N] row numbers, one group after the other */
    long *first; /* [G + 1] group g is rows[first[g]..first[g + 1]] */
    long *first_item; /* [G + 1] */
    softmax_state state; /* of vectors [kv_heads, N, group] */
} shared_walk;

/* Of one item: `vectors` query vectors from `first` on, where vector v is of rows[v / group]. */
typedef struct {
    const long *rows;
    long leader; /* a row through whose page table all of them read */
    long tokens, head, first, vectors, state;
} shared_part;

/* How many of `vectors` query vectors are in the chunk that begins with vector `first`. */
INLINE int chunk_vectors(long vectors, long first) {
    return vectors - first < MAX_QUERIES ? vectors - first : MAX_QUERIES;
}

/* Which state is that of the first query vector of row r for a kv head. */
INLINE long state_of_row(const shared_walk *walk, long r, long head) {
    return (head * walk->walkers + walk->place[r]) * walk->group;
}

INLINE softmax_state state_at(const shared_walk *walk, long vector) {
    softmax_state state = walk->state;
    return (softmax_state){state.largest + vector, state.total + vector, state.mixed + vector * walk->dim};
}

INLINE void begin_walk(softmax_state state, long vectors, long dim) {
    for (long v = 0; v < vectors; v++) state.largest[v] = -INFINITY, state.total[v] = (vf){};
    memset(state.mixed, 0, vectors * dim * sizeof(float));
}

static shared_part part_of_item(const shared_walk *walk, long item) {
    long g = 0;
    while (walk->first_item[g + 1] <= item) g++;
    const long begin = walk->first[g], members = walk->first[g + 1] - begin, all = members * walk->group;
    const long chunks = (all + walk->width - 1) / walk->width, number = item - walk->first_item[g];
    shared_part part = {.rows = walk->rows + begin, .head = number / chunks, .first = number % chunks * walk->width};
    part.vectors = all - part.first < walk->width ? all - part.first : walk->width;
    part.leader = part.rows[0];
    for (long i = 1; i < members; i++) part.leader = part.rows[i] > part.leader ? part.rows[i] : part.leader;
    part.tokens = walk->until[part.leader];
    part.state = state_of_row(walk, part.rows[0], part.head) + part.first;
    return part;
}

/* Tokens in the whole blocks that row r may walk with others. */
static long whole_blocks(const attention_call *call, long r, long tokens) {
    const long context = call->context_lens[r];
    if (call->query_start[r + 1] - call->query_start[r] != 1 || (call->window && call->window < context)) return 0;
    return (tokens < context ? tokens : context) / BLOCK * BLOCK;
}

/* Who walks together, and how far: as far as all rows of a group do that share a block at all. `tokens`, `members` and
 * `starts` as in `SharedPrefixes`. In one piece of memory, which the caller frees; NULL where there is none: all rows
 * walk alone then. */
static shared_walk *plan_shared_walk(const attention_call *call, const int32_t *tokens, const int32_t *members,
                                     const int32_t *starts, long groups, int threads) {
    const long most = starts[groups], vectors = most * call->kv_heads * call->group;
    const size_t head = (sizeof(shared_walk) + sizeof(vf) - 1) / sizeof(vf) * sizeof(vf);
    const size_t numbers = (2 * call->rows + most + 2 * (groups + 1)) * sizeof(long);
    const size_t size = head + numbers + vectors * (sizeof(vf) + (1 + call->dim) * sizeof(float));
    char *memory = aligned_alloc(sizeof(vf), (size + sizeof(vf) - 1) / sizeof(vf) * sizeof(vf));
    if (!memory) return NULL;
    shared_walk *walk = (shared_walk *)memory;
    *walk = (shared_walk){.groups = groups, .kv_heads = call->kv_heads, .group = call->group, .dim = call->dim};
    walk->state.total = (vf *)(memory + head);
    walk->until = (long *)(walk->state.total + vectors);
    walk->place = walk->until + call->rows;
    walk->rows = walk->place + call->rows;
    walk->first = walk->rows + most;
    walk->first_item = walk->first + groups + 1;
    walk->state.largest = (float *)(walk->first_item + groups + 1);
    walk->state.mixed = walk->state.largest + vectors;
    memset(walk->until, 0, call->rows * sizeof(long));

    long n = 0;
    for (long g = 0; g < groups; g++) {
        long together = 0;
        walk->first[g] = n;
        for (long i = starts[g]; i < starts[g + 1]; i++) {
            long r = members[i], own = whole_blocks(call, r, tokens[r]);
            if (!own) continue;
            together = together && together < own ? together : own;
            walk->place[r] = n;
            walk->rows[n++] = r;
        }
        if (n - walk->first[g] < 2) n = walk->first[g]; /* nobody to walk with */
        for (long i = walk->first[g]; i < n; i++) walk->until[walk->rows[i]] = together;
    }
    walk->first[groups] = walk->walkers = n;

    const long wanted = n * call->kv_heads * call->group / (ITEMS_PER_THREAD * threads);
    walk->width = (wanted + MAX_QUERIES - 1) / MAX_QUERIES * MAX_QUERIES;
    walk->width = walk->width > ITEM_VECTORS ? ITEM_VECTORS : walk->width < MAX_QUERIES ? MAX_QUERIES : walk->width;
    for (long g = 0; g < groups; g++) {
        long all = (walk->first[g + 1] - walk->first[g]) * call->group;
        walk->first_item[g] = walk->items;
        walk->items += (all + walk->width - 1) / walk->width * call->kv_heads;
    }
    walk->first_item[groups] = walk->items;
    return walk;
}
