/* Sampling: of each row of logits one token. Included by `ops.c` once per dtype of the logits: SCALAR, FN.
 *
 * Owns the draw, and min-p, top-k and top-p before it. Knows no parameters by name and makes no noise: a row brings a
 * number from [0, 1). A plain row is read for its largest logit, again for the sums of weights of its blocks, and one
 * block of it once more, for the token. Of a filtered row the tokens that a filter may
 * leave are collected, in the order of ids; the last one that stays is found among them by quickselect (Hoare 1961), so
 * nothing is sorted whole. Weights are fp32, their sums fp64.
 */
#ifndef GROUP
#include <float.h>

#define GROUP 128    /* tokens of which the largest logit is known */
#define WEIGHED 1024 /* tokens of which the sum of weights is known */

/* A token that may be drawn. Keys rank them, the highest first: by logit, equals by the lower id; no two are equal. */
typedef struct {
    uint64_t key;
    float weight;
} candidate;

INLINE uint64_t key_of(float logit, long id) {
    uint32_t bits;
    logit += 0.0f; /* -0 is 0 */
    memcpy(&bits, &logit, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (UINT32_MAX - (uint32_t)id);
}

INLINE long id_of(uint64_t key) { return UINT32_MAX - (uint32_t)key; }

/* The least number in fp32 that is not below `bound`. */
INLINE float at_least(double bound) {
    float least = (float)bound;
    return least < bound ? nextafterf(least, INFINITY) : least;
}

/* Of `count` candidates, at least one: how many stay, which are moved to the front, and the last of them. One stays if
 * those before it measure less than `bound`, above 0: in weight, or without `weigh` in numbers. */
static uint64_t last_to_stay(candidate *of, long count, double bound, int weigh, long *stay) {
    long from = 0, to = count;
    double before = 0; /* what is in front of `from` measures */
    for (;;) {
        const long middle = from + (to - from) / 2;
        const uint64_t a = of[from].key, b = of[middle].key, c = of[to - 1].key;
        const long at = a < b ? (b < c ? middle : a < c ? to - 1 : from) : (a < c ? from : b < c ? to - 1 : middle);
        const candidate pivot = of[at];
        of[at] = of[to - 1];
        long place = from; /* of the pivot, behind all that rank before it */
        double above = 0;
        for (long i = from; i < to - 1; i++) {
            const candidate one = of[i];
            if (one.key < pivot.key) continue;
            of[i] = of[place], of[place++] = one;
            above += weigh ? one.weight : 1;
        }
        of[to - 1] = of[place], of[place] = pivot;
        if (before + above >= bound) {
            to = place;
            continue;
        }
        before += above + (weigh ? pivot.weight : 1);
        from = place + 1;
        if (from == to || before >= bound) {
            *stay = from;
            return pivot.key;
        }
    }
}
#endif

/* The largest logit of each group; of the row too, which is NaN where any is. */
INLINE float FN(group_maxima)(const SCALAR *row, long width, float *maxima) {
    float largest = -INFINITY;
    vni bad = {};
    for (long from = 0; from < width; from += GROUP) {
        const long end = from + GROUP < width ? from + GROUP : width;
        vn most = nsplat(-INFINITY);
        long i = from;
        for (; i + NATIVE <= end; i += NATIVE) {
            vn a = FN(load)(row + i);
            most = nmax(a, most), bad |= a != a;
        }
        if (i < end) { /* lanes behind the row repeat one of it */
            vn a = FN(load_some)(row + i, end - i);
            for (long lane = end - i; lane < NATIVE; lane++) a[lane] = a[0];
            most = nmax(a, most), bad |= a != a;
        }
        float one = most[0];
        for (int lane = 1; lane < NATIVE; lane++) one = most[lane] > one ? most[lane] : one;
        maxima[from / GROUP] = one;
        largest = one > largest ? one : largest;
    }
    int32_t any = 0;
    for (int lane = 0; lane < NATIVE; lane++) any |= bad[lane];
    return any ? NAN : largest;
}

/* Weights of LANES tokens, of which n exist: 0 behind them, and below `least`. */
INLINE void FN(weights)(const SCALAR *logits, long n, float largest, float by, float least, vn *to) {
    UNROLL for (int part = 0; part < PARTS; part++) {
        vn a = FN(load_some)(logits + part * NATIVE, n - part * NATIVE);
        if (n < LANES)
            for (int lane = 0; lane < NATIVE; lane++)
                if (part * NATIVE + lane >= n) a[lane] = -INFINITY;
        to[part] = nchoose(a < nsplat(least), (vn){}, nexp2_below((a - largest) * by));
    }
}

/* The sum of the weights of n tokens. */
INLINE double FN(weight_sum)(const SCALAR *logits, long n, float largest, float by, float least) {
    vn sums[PARTS] = {}, held[PARTS];
    for (long i = 0; i < n; i += LANES) {
        FN(weights)(logits + i, n - i, largest, by, least, held);
        UNROLL for (int part = 0; part < PARTS; part++) sums[part] += held[part];
    }
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane / NATIVE][lane % NATIVE];
    return sum;
}

/* The token in which the cumulative weight first exceeds u times the total. */
INLINE long FN(draw)(const SCALAR *row, long width, float largest, float by, double u) {
    const long blocks = (width + WEIGHED - 1) / WEIGHED;
    double sums[blocks], total = 0;
    for (long b = 0; b < blocks; b++) {
        const long from = b * WEIGHED, n = width - from < WEIGHED ? width - from : WEIGHED;
        total += sums[b] = FN(weight_sum)(row + from, n, largest, by, -INFINITY);
    }
    const double target = u * total;
    double before = 0;
    long block = 0;
    while (block + 1 < blocks && before + sums[block] <= target) before += sums[block++];
    const long from = block * WEIGHED, n = width - from < WEIGHED ? width - from : WEIGHED;
    long last = from; /* with a weight, should rounding leave none behind the target */
    for (long i = 0; i < n; i += LANES) {
        vn held[PARTS];
        FN(weights)(row + from + i, n - i, largest, by, -INFINITY, held);
        for (int lane = 0; lane < LANES; lane++) {
            const float one = held[lane / NATIVE][lane % NATIVE];
            if (one == 0) continue;
            before += one, last = from + i + lane;
            if (before > target) return last;
        }
    }
    return last;
}

/* Those of at least `least`, in the order of ids: how many. */
INLINE long FN(collect)(const SCALAR *row, long width, float largest, float by, float least, const float *maxima,
                        candidate *to) {
    long count = 0;
    for (long from = 0; from < width; from += GROUP) {
        if (maxima[from / GROUP] < least) continue;
        const long end = from + GROUP < width ? from + GROUP : width;
        for (long i = from; i < end; i += NATIVE) {
            const vn a = FN(load_some)(row + i, end - i), weight = nexp2_below((a - largest) * by);
            for (long lane = 0; lane < NATIVE && i + lane < end; lane++)
                if (a[lane] >= least) to[count++] = (candidate){key_of(a[lane], i + lane), weight[lane]};
        }
    }
    return count;
}

/* As `draw`, of the tokens that the filters leave. top_k: 0, or below the width. room[2 * width] */
static long FN(draw_filtered)(const SCALAR *row, long width, float largest, float by, double temperature, double u,
                              long top_k, double top_p, double min_p, const float *maxima, candidate *room) {
    const long groups = (width + GROUP - 1) / GROUP;
    candidate *left = room, *sorted = room + width;
    long stay;
    double mass = 0; /* of all that top-p is a share of */
    float least = min_p > 0 ? at_least(largest + temperature * log(min_p)) : -FLT_MAX; /* what can stay */
    if (least < -FLT_MAX) least = -FLT_MAX;
    if (top_k > 0 && top_k <= groups) { /* each of the largest k of the groups has one token like it */
        for (long g = 0; g < groups; g++) sorted[g] = (candidate){key_of(maxima[g], g), 0};
        const float bound = maxima[id_of(last_to_stay(sorted, groups, top_k, 0, &stay))];
        if (bound > least) least = bound;
    } else if (top_k == 0 && top_p < 1) { /* all of less weight weigh less together than what does not stay */
        for (long from = 0; from < width; from += WEIGHED)
            mass += FN(weight_sum)(row + from, width - from < WEIGHED ? width - from : WEIGHED, largest, by, least);
        const float bound = at_least(largest + temperature * log(0.99 * (1 - top_p) * mass / width));
        if (bound > least) least = bound;
    }
    long count = FN(collect)(row, width, largest, by, least, maxima, left);
    uint64_t last = 0;
    if (top_k > 0 || top_p < 1) {
        stay = count;
        memcpy(sorted, left, count * sizeof *left);
        if (top_k > 0) {
            last = last_to_stay(sorted, count, top_k, 0, &stay);
            for (long i = 0; i < stay; i++) mass += sorted[i].weight;
        }
        if (top_p < 1) last = last_to_stay(sorted, stay, top_p * mass, 1, &stay);
    }
    double total = 0, before = 0;
    for (long i = 0; i < count; i++) total += left[i].key >= last ? left[i].weight : 0;
    const double target = u * total;
    long token = id_of(left[0].key);
    for (long i = 0; i < count; i++) {
        if (left[i].key < last || left[i].weight == 0) continue;
        before += left[i].weight, token = id_of(left[i].key);
        if (before > target) break;
    }
    return token;
}

/* -1 where the largest logit is NaN or infinite. At temperature 0 the first of the largest. */
static long FN(sample_row)(const SCALAR *row, long width, double temperature, double u, long top_k, double top_p,
                           double min_p, candidate *room) {
    float maxima[(width + GROUP - 1) / GROUP];
    const float largest = FN(group_maxima)(row, width, maxima);
    if (!isfinite(largest)) return -1;
    if (temperature == 0) {
        long at = 0;
        while (maxima[at / GROUP] != largest) at += GROUP;
        while (FN(load_some)(row + at, 1)[0] != largest) at++;
        return at;
    }
    /* finite and not 0, so that no difference of logits times it is NaN */
    const float by = (float)fmin(fmax(LOG2E / temperature, FLT_MIN), FLT_MAX);
    if (top_k >= width) top_k = 0;
    if (top_k == 0 && top_p == 1 && min_p == 0) return FN(draw)(row, width, largest, by, u);
    return FN(draw_filtered)(row, width, largest, by, temperature, u, top_k, top_p, min_p, maxima, room);
}

/* out[t] of logits x[t], by temperature[t], a temperature, and u[t]. Without filters top_k is NULL, with them there is
 * room[threads][2 * width]. */
void FN(sample)(long tokens, long width, const SCALAR *x, long stride, const double *temperature, const double *u,
                const int64_t *top_k, const double *top_p, const double *min_p, candidate *room, int64_t *out,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (tokens > 1 && tokens * width > PARALLEL_WORK)
    for (long part = 0; part < threads; part++)
        for (long t = part; t < tokens; t += threads)
            out[t] = FN(sample_row)(x + t * stride, width, temperature[t], u[t], top_k ? top_k[t] : 0,
                                    top_k ? top_p[t] : 1, top_k ? min_p[t] : 0,
                                    top_k ? room + part * 2 * width : NULL);
}
