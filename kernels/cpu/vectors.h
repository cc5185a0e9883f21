/* Vectors of 16 floats, the same in parts as wide as a register, and functions of them. Included by `ops.c` once.
 *
 * Owns the widths and the reading of stored dtypes in loops that must run at a register's speed. Generic vectors (GCC
 * vector extensions), no intrinsics. Every function is of each lane alone, so no bit depends on a register's width.
 */
#define LANES 16
#define LOG2E 1.44269504f /* scores count in powers of two */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

/* The same in vectors as wide as a register, where they are kept; wider ones the compiler keeps in memory. */
#if defined __AVX512F__
#define NATIVE 16
#elif defined __AVX__
#define NATIVE 8
#else
#define NATIVE 4
#endif
#define PARTS (LANES / NATIVE)

typedef float vn __attribute__((vector_size(4 * NATIVE)));
typedef int32_t vni __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t vnu __attribute__((vector_size(4 * NATIVE)));
typedef uint16_t vnh __attribute__((vector_size(2 * NATIVE)));
typedef int8_t vnb __attribute__((vector_size(NATIVE)));

static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE vn nsplat(float x) { return x - (vn){}; }

INLINE vn nchoose(vni mask, vn yes, vn no) { return (vn)((mask & (vni)yes) | (~mask & (vni)no)); }

INLINE vn nmax(vn a, vn b) { return nchoose(a > b, a, b); }

/* To the nearest even integer, of numbers below 2^22: by 1.5 * 2^23, to which only whole numbers can be added. */
INLINE vn nround(vn x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE float lane_sum(vf v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

INLINE float lane_max(vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* p of 2^y = 2^n * (1 + p), -1/3 < p < 1/2, and the bits of 2^n, for y in [-126, 127]. */
INLINE vn part_of_exp2(vn y, vni *power) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
    vn n = y + shift;
    *power = ((vni)n << 23) + (127 << 23);
    vn f = y - (n - shift); /* in [-1/2, 1/2] */
    vn p = nsplat(1.5252734e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    return p * f;
}

/* 2^x, relative error below 2e-7; exactly 1 at 0, exactly 0 below -126 (so at -inf too); NaN stays NaN. */
INLINE vn nexp2(vn x) {
    vn low = nsplat(-126.0f), high = nsplat(127.0f);
    vni power;
    vn p = part_of_exp2(nchoose(x < low, low, nchoose(x > high, high, x)), &power) + 1.0f;
    return nchoose(x < low, (vn){}, p * (vn)power);
}

/* The same for x <= 0, bit for bit: what would be below 2^-126 becomes 0 at the end, whatever was computed of it. */
INLINE vn nexp2_below(vn x) {
    vni power;
    vn p = part_of_exp2(x, &power) + 1.0f;
    return nchoose(x < nsplat(-126.0f), (vn){}, p * (vn)power);
}

/* Hyperbolic tangent, relative error below 5e-7: (e^2x - 1) / (e^2x + 1), where e^2x - 1 loses nothing near 0. */
INLINE vn ntanh(vn x) {
    vn low = nsplat(-40.0f), high = nsplat(40.0f), y = x * 2.88539008f; /* 2 / ln 2: counts in powers of two */
    y = nchoose(y < low, low, nchoose(y > high, high, y));
    vni exponent;
    vn p = part_of_exp2(y, &exponent), power = (vn)exponent;
    vn less = (power - 1.0f) + power * p;
    return less / (less + 2.0f);
}

INLINE vf vtanh(vf x) {
    vn part[PARTS];
    memcpy(part, &x, sizeof x);
    UNROLL for (int i = 0; i < PARTS; i++) part[i] = ntanh(part[i]);
    memcpy(&x, part, sizeof x);
    return x;
}

INLINE vn native_f32(const float *p) {
    vn v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The same where only n elements exist, or all of them if n is more: missing lanes are 0. */
INLINE vn some_f32(const float *p, long n) {
    vn v = {};
    if (n >= NATIVE) memcpy(&v, p, sizeof v);
    else if (n > 0) memcpy(&v, p, n * sizeof *p);
    return v;
}

INLINE vn native_bf16(const uint16_t *p) {
    vnh h;
    memcpy(&h, p, sizeof h);
    return (vn)(__builtin_convertvector(h, vnu) << 16);
}

INLINE vn native_i8(const int8_t *p) {
    vnb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vni), vn);
}

/* Of LANES elements, PARTS vectors, which hold them in an order of the dtype's own: `merge` puts such vectors into the
 * natural one, `split` takes them out of it. bf16 in two parts: the even elements and the odd ones, which is the least
 * work to widen them. */
INLINE void tile_f32(const float *p, vn *to) {
    UNROLL for (int i = 0; i < PARTS; i++) to[i] = native_f32(p + i * NATIVE);
}
INLINE void merge_f32(vn *tile) { (void)tile; }
INLINE void split_f32(vn *tile) { (void)tile; }

INLINE void tile_i8(const int8_t *p, vn *to) {
    UNROLL for (int i = 0; i < PARTS; i++) to[i] = native_i8(p + i * NATIVE);
}
INLINE void merge_i8(vn *tile) { (void)tile; }
INLINE void split_i8(vn *tile) { (void)tile; }

#if PARTS == 2 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define PAIRED 1
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vni){__VA_ARGS__})
#endif
INLINE void tile_bf16(const uint16_t *p, vn *to) {
    vnu pairs;
    memcpy(&pairs, p, sizeof pairs);
    to[0] = (vn)(pairs << 16), to[1] = (vn)(pairs & 0xffff0000u);
}
INLINE void merge_bf16(vn *tile) {
    vn even = tile[0], odd = tile[1];
    tile[0] = SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    tile[1] = SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
}
INLINE void split_bf16(vn *tile) {
    vn low = tile[0], high = tile[1];
    tile[0] = SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    tile[1] = SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
INLINE void tile_bf16(const uint16_t *p, vn *to) {
    UNROLL for (int i = 0; i < PARTS; i++) to[i] = native_bf16(p + i * NATIVE);
}
INLINE void merge_bf16(vn *tile) { (void)tile; }
INLINE void split_bf16(vn *tile) { (void)tile; }
#endif
