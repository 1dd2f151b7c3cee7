/* The kernels on vectors of LANES words. avx2.c and avx512.c include this once each, after their primitives; what is
 * computed, and why it is right, stands in ref.c. */
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

static inline size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* ---- AES-256: the key schedule; aes.h has the rest ---- */

enum { AES_ROUNDS = 14 };

/* The last step of AES on four equal columns substitutes and leaves rows where they are. */
static void aes_schedule(__m128i keys[AES_ROUNDS + 1], const uint8_t *key)
{
    keys[0] = _mm_loadu_si128((const __m128i *)key);
    keys[1] = _mm_loadu_si128((const __m128i *)(key + 16));
    for (int r = 2, constant = 1; r <= AES_ROUNDS; r++) {
        __m128i t = _mm_aesenclast_si128(_mm_shuffle_epi32(keys[r - 1], 0xff), _mm_setzero_si128()), x = keys[r - 2];
        if (r % 2 == 0) {
            t = _mm_or_si128(_mm_srli_epi32(t, 8), _mm_slli_epi32(t, 24));
            t = _mm_xor_si128(t, _mm_set1_epi32(constant));
            constant <<= 1;
        }
        x = _mm_xor_si128(x, _mm_slli_si128(x, 4));
        x = _mm_xor_si128(x, _mm_slli_si128(x, 8));
        keys[r] = _mm_xor_si128(x, t);
    }
}

/* ---- matrix products ---- */

/* Few rows: b is streamed once, STREAM of its rows side by side; a piece of c stays in the first-level cache. */
enum { FEW = 6, STREAM = 8, PIECE = 2048 };

INLINE void stream_rows(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n, size_t width,
                        const int deep)
{
    for (size_t j = 0; j < width; j += LANES) {
        size_t left = least(width - j, LANES);
        factor f[STREAM];
        UNROLL for (int t = 0; t < deep; t++) f[t] = factor_of(load_first(b + (size_t)t * n + j, left));
        for (size_t i = 0; i < m; i++) {
            sum s = sum_zero();
            UNROLL for (int t = 0; t < deep; t++) s = sum_mul(s, f[t], factor_splat(a + i * k + t));
            store_first(c + i * n + j, left, load_first(c + i * n + j, left) + sum_value(s));
        }
    }
}

/* The same for one row, whose STREAM factors stay in registers. */
INLINE void stream_row(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t n, size_t width)
{
    factor f[STREAM];
    size_t j = 0;
    UNROLL for (int t = 0; t < STREAM; t++) f[t] = factor_splat(a + t);
    for (; j + LANES <= width; j += LANES) {
        sum s = sum_zero();
        UNROLL for (int t = 0; t < STREAM; t++) s = sum_mul(s, f[t], factor_of(load(b + (size_t)t * n + j)));
        store(c + j, load(c + j) + sum_value(s));
    }
    if (j < width) stream_rows(c + j, a, b + j, 1, 0, n, width - j, STREAM);
}

static void matmul_few(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n, size_t all)
{
    const size_t piece = PIECE / m;
    for (size_t j = 0; j < all; j += piece) {
        size_t width = least(all - j, piece), t = 0;
        for (; t + STREAM <= k; t += STREAM) {
            if (m == 1) stream_row(c + j, a + t, b + t * n + j, n, width);
            else stream_rows(c + j, a + t, b + t * n + j, m, k, n, width, STREAM);
        }
        for (; t < k; t++) stream_rows(c + j, a + t, b + t * n + j, m, k, n, width, 1);
    }
}

/* Many rows: a panel of b, PANEL_K by PANEL_N, is packed in strips of NARROW columns; strips meet MM_ROWS rows of a
 * in registers. */
enum { NARROW = MM_VECS * LANES, STRIPS = 768 / NARROW, PANEL_N = STRIPS * NARROW, PANEL_K = 16 };

INLINE void block_product(uint64_t *c, const uint64_t *a, const uint64_t *strip, size_t k, size_t n, size_t depth,
                          size_t width, const int rows)
{
    sum s[MM_ROWS][MM_VECS];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < MM_VECS; v++) s[i][v] = sum_zero();
    for (size_t t = 0; t < depth; t++) {
        factor f[MM_VECS];
        UNROLL for (int v = 0; v < MM_VECS; v++) f[v] = factor_of(load(strip + t * NARROW + v * LANES));
        UNROLL for (int i = 0; i < rows; i++)
        {
            factor g = factor_splat(a + (size_t)i * k + t);
            UNROLL for (int v = 0; v < MM_VECS; v++) s[i][v] = sum_mul(s[i][v], g, f[v]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < MM_VECS; v++)
    {
        uint64_t *to = c + (size_t)i * n + v * LANES;
        if (width >= (size_t)(v + 1) * LANES) store(to, load(to) + sum_value(s[i][v]));
        else if (width > (size_t)v * LANES) {
            size_t left = width - (size_t)v * LANES;
            store_first(to, left, load_first(to, left) + sum_value(s[i][v]));
        }
    }
}

/* c += a b over one panel and all rows of a. */
static void panel_product(uint64_t *c, const uint64_t *a, const uint64_t *panel, size_t m, size_t k, size_t n,
                          size_t depth, size_t width)
{
    for (size_t i = 0; i < m; i += MM_ROWS)
        for (size_t j = 0; j < width; j += NARROW) {
            const uint64_t *strip = panel + j * depth, *from = a + i * k;
            uint64_t *to = c + i * n + j;
            size_t left = least(width - j, NARROW);
            switch (least(m - i, MM_ROWS)) { /* the number of rows is a constant in each case */
#define CASE(rows)                                                                                                     \
    case rows: block_product(to, from, strip, k, n, depth, left, rows); break;
                CASE(1)
                CASE(2)
#if LANES == 8
                CASE(3)
                CASE(4)
                CASE(5)
                CASE(6)
                CASE(7)
                CASE(8)
#endif
#undef CASE
            }
        }
}

/* The value at row t, column j of the panel's matrix is b[t * down + j * right]. */
static void pack_panel(uint64_t *restrict panel, const uint64_t *b, size_t down, size_t right, size_t depth,
                       size_t width)
{
    for (size_t j = 0; j < width; j += NARROW) {
        size_t columns = least(width - j, NARROW);
        uint64_t *strip = panel + j * depth;
        if (right == 1 && columns == NARROW)
            for (size_t t = 0; t < depth; t++)
                UNROLL for (int v = 0; v < NARROW; v += LANES) store(strip + t * NARROW + v,
                                                                     load(b + t * down + j + v));
        else
            for (size_t v = 0; v < NARROW; v++)
                for (size_t t = 0; t < depth; t++)
                    strip[t * NARROW + v] = v < columns ? b[t * down + (j + v) * right] : 0;
    }
}

static void matmul_many(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t down, size_t right, size_t m,
                        size_t k, size_t n, size_t all)
{
    uint64_t panel[PANEL_K * PANEL_N] __attribute__((aligned(64)));
    for (size_t t = 0; t < k; t += PANEL_K)
        for (size_t j = 0; j < all; j += PANEL_N) {
            size_t depth = least(k - t, PANEL_K), width = least(all - j, PANEL_N);
            pack_panel(panel, b + t * down + j * right, down, right, depth, width);
            panel_product(c + j, a + t, panel, m, k, n, depth, width);
        }
}

static void zero_rows(uint64_t *c, size_t m, size_t n, size_t width)
{
    for (; m > 0; m--, c += n) memset(c, 0, width * sizeof *c);
}

void MK(mk_ring_product)(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n, size_t width,
                         int add)
{
    if (m * width == 0) return;
    if (!add) zero_rows(c, m, n, width);
    if (m <= FEW) matmul_few(c, a, b, m, k, n, width);
    else matmul_many(c, a, b, n, 1, m, k, n, width);
}

/* c (rows, columns) += products of rows of a with rows of b, all of length k. */
INLINE void dot_block(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t k, size_t n, const int rows,
                      const int columns)
{
    sum s[4][4];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < columns; j++) s[i][j] = sum_zero();
    for (size_t t = 0; t < k; t += LANES) {
        size_t left = least(k - t, LANES);
        factor f[4];
        UNROLL for (int i = 0; i < rows; i++) f[i] = factor_of(load_first(a + (size_t)i * k + t, left));
        UNROLL for (int j = 0; j < columns; j++)
        {
            factor g = factor_of(load_first(b + (size_t)j * k + t, left));
            UNROLL for (int i = 0; i < rows; i++) s[i][j] = sum_mul(s[i][j], f[i], g);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < columns; j++) c[(size_t)i * n + j] +=
        total(sum_value(s[i][j]));
}

void MK(mk_ring_product_nt)(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n,
                            size_t width, int add)
{
    if (m * width == 0) return;
    if (!add) zero_rows(c, m, n, width);
    if (m > FEW) {
        matmul_many(c, a, b, 1, k, m, k, n, width);
        return;
    }
    size_t j = 0;
    for (; j + 4 <= width; j += 4) {
        size_t i = 0;
        for (; i + 2 <= m; i += 2) dot_block(c + i * n + j, a + i * k, b + j * k, k, n, 2, 4);
        if (i < m) dot_block(c + i * n + j, a + i * k, b + j * k, k, n, 1, 4);
    }
    for (; j < width; j++)
        for (size_t i = 0; i < m; i++) dot_block(c + i * n + j, a + i * k, b + j * k, k, n, 1, 1);
}

/* ---- the same modulo 2^32 ---- */

/* Here a product of lanes is one instruction, and no panel is packed. Rows of b are read SIDE32 at a time (for one row
 * of a STREAM), PAIR32 vectors of each, which with AVX2 are a line of the cache; PIECE32 sums stay in its first level.
 * Where a has more than ROWS32 rows, so many at a time meet DEPTH32 rows of b, which stay in the second. */
enum { LANES32 = 2 * LANES, SIDE32 = 4, PAIR32 = 2, PIECE32 = 2 * PIECE, ROWS32 = 16, DEPTH32 = 128 };

INLINE vec32 load32(const uint32_t *p)
{
    vec32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store32(uint32_t *p, vec32 v)
{
    memcpy(p, &v, sizeof v);
}

INLINE vec32 splat32(uint32_t x)
{
    return x + (vec32){0};
}

/* sums (m, width) += a b of so many vectors of columns, or of one of which only `left` lanes are there; a (m, STREAM),
 * of which `deep` are in use. */
INLINE void stream32_columns(uint32_t *sums, const uint32_t *a, const uint32_t *b, size_t m, size_t n, size_t width,
                             size_t left, const int vectors, const int deep)
{
    vec32 f[SIDE32][PAIR32];
    UNROLL for (int t = 0; t < deep; t++) UNROLL for (int v = 0; v < vectors; v++)
    {
        const uint32_t *from = b + (size_t)t * n + v * LANES32;
        f[t][v] = left == LANES32 ? load32(from) : load32_first(from, left);
    }
    for (; m > 0; m--, sums += width, a += STREAM) {
        vec32 s[PAIR32];
        UNROLL for (int v = 0; v < vectors; v++)
            s[v] = left == LANES32 ? load32(sums + v * LANES32) : load32_first(sums, left);
        UNROLL for (int t = 0; t < deep; t++)
        {
            vec32 g = splat32(a[t]);
            UNROLL for (int v = 0; v < vectors; v++) s[v] += f[t][v] * g;
        }
        UNROLL for (int v = 0; v < vectors; v++)
        {
            if (left == LANES32) store32(sums + v * LANES32, s[v]);
            else store32_first(sums, left, s[v]);
        }
    }
}

INLINE void stream32_rows(uint32_t *sums, const uint32_t *a, const uint32_t *b, size_t m, size_t n, size_t width,
                          const int deep)
{
    size_t j = 0;
    for (; j + PAIR32 * LANES32 <= width; j += PAIR32 * LANES32)
        stream32_columns(sums + j, a, b + j, m, n, width, LANES32, PAIR32, deep);
    for (; j < width; j += LANES32)
        stream32_columns(sums + j, a, b + j, m, n, width, least(width - j, LANES32), 1, deep);
}

/* The same for one row, whose factors stay in registers. */
INLINE void stream32_row(uint32_t *sums, const uint32_t *a, const uint32_t *b, size_t n, size_t width)
{
    vec32 f[STREAM];
    size_t j = 0;
    UNROLL for (int t = 0; t < STREAM; t++) f[t] = splat32(a[t]);
    for (; j + LANES32 <= width; j += LANES32) {
        vec32 s = load32(sums + j);
        UNROLL for (int t = 0; t < STREAM; t++) s += f[t] * load32(b + (size_t)t * n + j);
        store32(sums + j, s);
    }
    for (int t = 0; t < STREAM && j < width; t++)
        stream32_columns(sums + j, a + t, b + (size_t)t * n + j, 1, n, width, width - j, 1, 1);
}

/* c += a b, of depth k of `all`. Rows of a and of c, often a power of two apart, would contend for one set of the cache:
 * factors and sums lie side by side. */
static void stream32(uint32_t *c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t all, size_t n,
                     size_t width)
{
    uint32_t sums[PIECE32], factors[ROWS32 * STREAM];
    memset(sums, 0, m * width * sizeof *sums);
    for (size_t t = 0; t < k; t += STREAM) {
        size_t deep = least(k - t, STREAM);
        for (size_t i = 0; i < m; i++)
            for (size_t u = 0; u < deep; u++) factors[i * STREAM + u] = a[i * all + t + u];
        if (m == 1 && deep == STREAM) stream32_row(sums, factors, b + t * n, n, width);
        else {
            size_t u = 0;
            for (; u + SIDE32 <= deep; u += SIDE32)
                stream32_rows(sums, factors + u, b + (t + u) * n, m, n, width, SIDE32);
            for (; u < deep; u++) stream32_rows(sums, factors + u, b + (t + u) * n, m, n, width, 1);
        }
    }
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < width; j++) c[i * n + j] += sums[i * width + j];
}

void MK(mk_ring32_product)(uint32_t *c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t n,
                           size_t width, int add)
{
    if (m * width == 0) return;
    for (size_t i = 0; !add && i < m; i++) memset(c + i * n, 0, width * sizeof *c);
    const size_t groups = (m + ROWS32 - 1) / ROWS32, rows = (m + groups - 1) / groups;
    const size_t step = PAIR32 * LANES32, piece = PIECE32 / rows / step * step, depth = groups == 1 ? k : DEPTH32;
    for (size_t t = 0; t < k; t += depth)
        for (size_t j = 0; j < width; j += piece)
            for (size_t i = 0; i < m; i += rows)
                stream32(c + i * n + j, a + i * k + t, b + t * n + j, least(m - i, rows), least(k - t, depth), k, n,
                         least(width - j, piece));
}

/* ---- elementwise ---- */

static inline vec product(vec a, vec b)
{
    return sum_value(sum_mul(sum_zero(), factor_of(a), factor_of(b)));
}

void MK(mk_ring_rss_mul)(uint64_t *restrict out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha,
                         size_t n)
{
    for (size_t j = 0; j < n; j += LANES) {
        size_t left = least(n - j, LANES);
        vec x0 = load_first(x + j, left), x1 = load_first(x + n + j, left);
        vec y0 = load_first(y + j, left), y1 = load_first(y + n + j, left);
        sum s = sum_mul(sum_zero(), factor_of(x0), factor_of(y0 + y1));
        s = sum_mul(s, factor_of(x1), factor_of(y0));
        store_first(out + j, left, sum_value(s) + load_first(alpha + j, left));
    }
}

void MK(mk_bits_rss_and)(uint64_t *restrict out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha,
                         size_t n)
{
    for (size_t j = 0; j < n; j++) out[j] = (x[j] & (y[j] ^ y[n + j])) ^ (x[n + j] & y[j]) ^ alpha[j];
}

/* ---- packed bits ---- */

/* Words apart by s swap squares of s by s bits: with t = (low >> s ^ high) & mask, low ^= t << s and high ^= t. */
#define SWAP(low, high, s, mask)                                                                                       \
    do {                                                                                                               \
        vec t_ = ((low) >> (s) ^ (high)) & splat(mask);                                                                \
        (low) ^= t_ << (s), (high) ^= t_;                                                                              \
    } while (0)

/* One round over words further apart than a vector is long. */
#define ROUND_FAR(x, s, mask)                                                                                          \
    UNROLL for (int i_ = 0; i_ < 64 / LANES; i_++) if (!(i_ & (s) / LANES)) SWAP((x)[i_], (x)[i_ + (s) / LANES], s, mask)

/* One round inside vectors: sort two vectors by bit s of the word number, swap, and sort back. */
#define ROUND_NEAR(x, s, mask)                                                                                         \
    UNROLL for (int i_ = 0; i_ < 64 / LANES; i_ += 2)                                                                  \
    {                                                                                                                  \
        vec low_ = pick_low((x)[i_], (x)[i_ + 1], s), high_ = pick_high((x)[i_], (x)[i_ + 1], s);                      \
        SWAP(low_, high_, s, mask);                                                                                    \
        (x)[i_] = unpick_first(low_, high_, s), (x)[i_ + 1] = unpick_second(low_, high_, s);                           \
    }

/* Transpose 64 by 64 bits: six rounds swap ever smaller squares off the diagonal. */
static void transpose(uint64_t *out, const uint64_t *in)
{
    vec x[64 / LANES];
    UNROLL for (int i = 0; i < 64 / LANES; i++) x[i] = load(in + LANES * i);
    ROUND_FAR(x, 32, 0x00000000ffffffff);
    ROUND_FAR(x, 16, 0x0000ffff0000ffff);
    ROUND_FAR(x, 8, 0x00ff00ff00ff00ff);
#if LANES == 8
    ROUND_NEAR(x, 4, 0x0f0f0f0f0f0f0f0f);
#else
    ROUND_FAR(x, 4, 0x0f0f0f0f0f0f0f0f);
#endif
    ROUND_NEAR(x, 2, 0x3333333333333333);
    ROUND_NEAR(x, 1, 0x5555555555555555);
    UNROLL for (int i = 0; i < 64 / LANES; i++) store(out + LANES * i, x[i]);
}

/* LANES blocks of 64 words at a time, so that planes are written and read in whole vectors: a word at a time they
 * would lie a power of two apart, as often as not, and contend for one set of the cache. */
void MK(mk_bits_slice)(uint64_t *restrict planes, const uint64_t *x, size_t n, size_t nbits)
{
    size_t words = (n + 63) / 64;
    uint64_t block[64] __attribute__((aligned(64))), group[64 * LANES] __attribute__((aligned(64)));
    for (size_t w = 0; w < words; w += LANES) {
        size_t left = least(words - w, LANES);
        for (size_t l = 0; l < left; l++) {
            const uint64_t *from = x + 64 * (w + l);
            size_t count = least(n - 64 * (w + l), 64);
            if (count < 64) {
                memset(block, 0, sizeof block);
                memcpy(block, from, count * sizeof *x);
                from = block;
            }
            transpose(block, from);
            for (size_t b = 0; b < nbits; b++) group[LANES * b + l] = block[b];
        }
        for (size_t b = 0; b < nbits; b++) store_first(planes + b * words + w, left, load(group + LANES * b));
    }
}

void MK(mk_bits_unslice)(uint64_t *restrict x, const uint64_t *planes, size_t n, size_t nbits)
{
    size_t words = (n + 63) / 64;
    uint64_t block[64] __attribute__((aligned(64))), group[64 * LANES] __attribute__((aligned(64))) = {0};
    for (size_t w = 0; w < words; w += LANES) {
        size_t left = least(words - w, LANES);
        for (size_t b = 0; b < nbits; b++) store(group + LANES * b, load_first(planes + b * words + w, left));
        for (size_t l = 0; l < left; l++) {
            for (size_t b = 0; b < 64; b++) block[b] = group[LANES * b + l];
            transpose(block, block);
            memcpy(x + 64 * (w + l), block, least(n - 64 * (w + l), 64) * sizeof *x);
        }
    }
}

void MK(mk_bits_to_ring)(uint64_t *restrict out, const uint64_t *words, size_t rows, size_t n)
{
    for (; rows > 0; rows--, words += (n + 63) / 64, out += n)
        for (size_t j = 0; j < n; j += LANES)
            store_first(out + j, least(n - j, LANES), keep(bits_of(words[j / 64] >> (j % 64), 0), splat(1)));
}

void MK(mk_ring_lsb)(uint64_t *restrict words, const uint64_t *x, size_t rows, size_t n)
{
    for (; rows > 0; rows--, x += n)
        for (size_t w = 0; 64 * w < n; w++) {
            uint64_t word = 0;
            for (size_t l = 0; l < 64 && 64 * w + l < n; l += LANES)
                word |= lowest_bits(load_first(x + 64 * w + l, least(n - 64 * w - l, LANES))) << l;
            *words++ = word;
        }
}

void MK(mk_bits_pick)(uint64_t *restrict out, const uint64_t *planes, const uint64_t *row, size_t n)
{
    size_t words = (n + 63) / 64;
    for (size_t w = 0; w < words; w++, row += 64) {
        uint64_t word = 0;
        for (size_t l = 0; l < least(n - 64 * w, 64); l++)
            word |= planes[row[l] * words + w] & (uint64_t)1 << l;
        out[w] = word;
    }
}

/* ---- look-up ---- */

void MK(mk_ring_double_part)(uint64_t *restrict out, const uint64_t *e, size_t e_apart, const uint64_t *b,
                             size_t b_apart, size_t n, size_t size, size_t have)
{
    const uint64_t *other = e + e_apart;
    for (size_t i = 0; i < n; i++, e += size, other += size, out += have) {
        factor both = factor_of(splat(b[i] + b[b_apart + i])), mine = factor_of(splat(b[i]));
        for (size_t j = 0; j < have; j += LANES) {
            size_t left = least(have - j, LANES);
            sum s = sum_mul(sum_zero(), factor_of(load_first(e + j, left)), both);
            s = sum_mul(s, factor_of(load_first(other + j, left)), mine);
            store_first(out + j, left, load_first(out + j, left) + sum_value(s));
        }
    }
}

void MK(mk_ring_double)(uint64_t *restrict e, const uint64_t *high, size_t n, size_t size, size_t have)
{
    for (size_t i = 0; i < n; i++, e += size, high += have)
        for (size_t j = 0; j < have; j += LANES) {
            size_t left = least(have - j, LANES);
            vec h = load_first(high + j, left);
            store_first(e + have + j, left, h);
            store_first(e + j, left, load_first(e + j, left) - h);
        }
}

/* Products of entries of 16 bits would not fit an int. */
#define DOUBLE(part, whole, entry)                                                                                     \
    void MK(part)(entry *restrict out, const entry *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n,     \
                  size_t size, size_t have)                                                                            \
    {                                                                                                                  \
        const entry *other = e + e_apart;                                                                              \
        for (size_t i = 0; i < n; i++, e += size, other += size, out += have) {                                        \
            uint32_t both = (entry)(b[i] + b[b_apart + i]), mine = (entry)b[i];                                        \
            for (size_t j = 0; j < have; j++) out[j] = (entry)(out[j] + e[j] * both + other[j] * mine);                \
        }                                                                                                              \
    }                                                                                                                  \
    void MK(whole)(entry *restrict e, const entry *high, size_t n, size_t size, size_t have)                           \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++, e += size, high += have) {                                                      \
            memcpy(e + have, high, have * sizeof *high);                                                               \
            for (size_t j = 0; j < have; j++) e[j] = (entry)(e[j] - high[j]);                                          \
        }                                                                                                              \
    }
DOUBLE(mk_half_double_part, mk_half_double, uint16_t)
DOUBLE(mk_byte_double_part, mk_byte_double, uint8_t)
#undef DOUBLE

#define ROTATE(name, entry)                                                                                            \
    void MK(name)(entry *restrict out, const entry *e, const uint64_t *c, size_t n, size_t size)                       \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++, out += size, e += size) {                                                       \
            size_t turn = c[i] % size;                                                                                 \
            for (size_t j = 0; j <= turn; j++) out[j] = e[turn - j];                                                   \
            for (size_t j = turn + 1; j < size; j++) out[j] = e[size + turn - j];                                      \
        }                                                                                                              \
    }
ROTATE(mk_ring_rotate, uint64_t)
ROTATE(mk_half_rotate, uint16_t)
ROTATE(mk_byte_rotate, uint8_t)
#undef ROTATE

/* ---- GF(2^64) ---- */

static inline vec gf_reduce(vec lo, vec hi)
{
    hi ^= hi >> 63 ^ hi >> 61 ^ hi >> 60;
    return lo ^ hi ^ hi << 1 ^ hi << 3 ^ hi << 4;
}

static inline vec gf_product(vec a, vec b)
{
    vec even, odd;
    clmul(&even, &odd, a, b);
    return gf_reduce(low_halves(even, odd), high_halves(even, odd));
}

void MK(mk_gf_mul)(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    for (size_t j = 0; j < n; j += LANES) {
        size_t left = least(n - j, LANES);
        store_first(out + j, left, gf_product(load_first(a + j, left), load_first(b + j, left)));
    }
}

void MK(mk_gf_scale)(uint64_t *restrict out, const uint64_t *a, uint64_t s, size_t n)
{
    for (size_t j = 0; j < n; j += LANES) {
        size_t left = least(n - j, LANES);
        store_first(out + j, left, gf_product(load_first(a + j, left), splat(s)));
    }
}

void MK(mk_gf_inner)(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    vec sums = splat(0); /* of unreduced products, 128 bits each */
    for (size_t j = 0; j < n; j += LANES) {
        size_t left = least(n - j, LANES);
        vec even, odd;
        clmul(&even, &odd, load_first(a + j, left), load_first(b + j, left));
        sums ^= even ^ odd;
    }
    uint64_t lo = 0, hi = 0;
    UNROLL for (int l = 0; l < LANES; l += 2) lo ^= sums[l], hi ^= sums[l + 1];
    *out = gf_reduce(splat(lo), splat(hi))[0];
}

void MK(mk_gf_fold)(uint64_t *restrict out, const uint64_t *a, uint64_t xi, size_t half)
{
    for (size_t j = 0; j < half; j += LANES) {
        size_t left = least(half - j, LANES);
        vec lo = load_first(a + j, left), hi = load_first(a + half + j, left);
        store_first(out + j, left, lo ^ gf_product(lo ^ hi, splat(xi)));
    }
}

/* ---- crosses: see ref.c ---- */

/* CROSS columns lie side by side, so that lanes are columns. node holds x0, x1, y0, y1, `stride` words apart, each of
 * `rows` runs of CROSS words. */
enum { CROSS = 32, CROSS_ROOM = 4 * MK_ROWS * CROSS, CROSSES = 665 }; /* results: 3^6 - 2^6 at most */

static inline size_t cross_count(size_t rows)
{
    size_t all = 1;
    for (size_t left = rows; left > 1; left /= 2) all *= 3;
    return all - rows;
}

/* Word j of vector i becomes word i of vector j. */
INLINE void turn_square(vec v[LANES])
{
    UNROLL for (int s = LANES / 2; s; s /= 2) UNROLL for (int i = 0; i < LANES; i++)
    {
        if (i & s) continue;
        vec low = swap_low(v[i], v[i | s], s);
        v[i | s] = swap_high(v[i], v[i | s], s);
        v[i] = low;
    }
}

/* Runs of CROSS columns of x (.., rows), `width` of which exist. */
static void turn(uint64_t *to, const uint64_t *x, size_t rows, size_t width)
{
    size_t done = 0;
    for (; width == CROSS && done + LANES <= rows; done += LANES)
        for (size_t j = 0; j < CROSS; j += LANES) {
            vec v[LANES];
            UNROLL for (int l = 0; l < LANES; l++) v[l] = load(x + (j + (size_t)l) * rows + done);
            turn_square(v);
            UNROLL for (int l = 0; l < LANES; l++) store(to + (done + (size_t)l) * CROSS + j, v[l]);
        }
    for (size_t i = done; i < rows; i++)
        for (size_t j = 0; j < CROSS; j++) to[i * CROSS + j] = j < width ? x[j * rows + i] : 0;
}

static void cross_columns(uint64_t *node, const uint64_t *const from[4], size_t rows, size_t n, size_t g)
{
    for (size_t c = 0; c < 4; c++)
        if (from[c]) turn(node + c * rows * CROSS, from[c] + g * rows, rows, least(n - g, CROSS));
}

static void cross_planes(uint64_t *to, const uint64_t *planes, size_t n, size_t g)
{
    for (size_t s = 0; s < 64; s++)
        for (size_t j = 0; j < CROSS; j++) to[CROSS * s + j] = g + j < n ? planes[s * n + g + j] : 0;
}

/* Of all four, or of x0 and y0 alone. */
INLINE void cross_differences(uint64_t *room, const uint64_t *node, size_t stride, size_t half, const int binary,
                              int alone)
{
    for (size_t c = 0; c < 4; c += alone ? 2 : 1)
        for (size_t j = 0; j < half; j += LANES) {
            vec low = load(node + c * stride + j), high = load(node + c * stride + half + j);
            store(room + c * half + j, binary ? high ^ low : high - low);
        }
}

/* sums, one for each plane, += the XOR of what term and plane have in common. */
INLINE void add_common(uint64_t *sums, const uint64_t *term, const uint64_t *planes)
{
    vec t[CROSS / LANES];
    UNROLL for (int j = 0; j < CROSS / LANES; j++) t[j] = load(term + LANES * j);
    for (size_t s = 0; s < 64; s += LANES) {
        vec common[LANES], all = load(sums + s);
        UNROLL for (int l = 0; l < LANES; l++)
        {
            const uint64_t *plane = planes + CROSS * (s + (size_t)l);
            common[l] = t[0] & load(plane);
            UNROLL for (int j = 1; j < CROSS / LANES; j++) common[l] ^= t[j] & load(plane + LANES * j);
        }
        turn_square(common);
        UNROLL for (int l = 0; l < LANES; l++) all ^= common[l];
        store(sums + s, all);
    }
}

/* The parities of 64 words, as the bits of one. */
static uint64_t parities(const uint64_t *sums)
{
    uint64_t turned[64] __attribute__((aligned(64))), word = 0;
    transpose(turned, sums);
    for (unsigned s = 0; s < 64; s++) word ^= turned[s];
    return word;
}

static uint64_t *gf_cross(uint64_t *out, const uint64_t *node, size_t stride, size_t rows, int slope, uint64_t *room,
                          const uint64_t *planes)
{
    if (rows == 1) {
        uint64_t term[CROSS] __attribute__((aligned(64)));
        if (!slope) return out;
        UNROLL for (int j = 0; j < CROSS; j += LANES)
        {
            vec y0 = load(node + 2 * stride + j), y1 = load(node + 3 * stride + j);
            store(term + j, (load(node + j) & (y0 ^ y1)) ^ (load(node + stride + j) & y0));
        }
        add_common(out, term, planes);
        return out + 64;
    }
    size_t half = rows / 2 * CROSS;
    out = gf_cross(out, node, stride, rows / 2, slope, room, planes);
    out = gf_cross(out, node + half, stride, rows / 2, slope, room, planes);
    cross_differences(room, node, stride, half, 1, 0);
    return gf_cross(out, room, half, rows / 2, 1, room + 4 * half, planes);
}

void MK(mk_gf_cross)(uint64_t *restrict out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0,
                     const uint64_t *y1, const uint64_t *planes, size_t rows, size_t n)
{
    const uint64_t *const from[4] = {x0, x1, y0, y1};
    uint64_t node[CROSS_ROOM] __attribute__((aligned(64))), room[CROSS_ROOM] __attribute__((aligned(64)));
    uint64_t part[64 * CROSS] __attribute__((aligned(64))), sums[64 * CROSSES] __attribute__((aligned(64)));
    size_t count = cross_count(rows);
    memset(sums, 0, 64 * count * sizeof *sums);
    for (size_t g = 0; g < n; g += CROSS) {
        cross_columns(node, from, rows, n, g);
        cross_planes(part, planes, n, g);
        gf_cross(sums, node, rows * CROSS, rows, 0, room, part);
    }
    for (size_t i = 0; i < count; i++) out[i] = parities(sums + 64 * i);
}

void MK(mk_gf_combine)(uint64_t *restrict out, const uint64_t *x, const uint64_t *planes, size_t rows, size_t n)
{
    uint64_t node[MK_ROWS * CROSS] __attribute__((aligned(64))), part[64 * CROSS] __attribute__((aligned(64)));
    uint64_t sums[64 * MK_ROWS] __attribute__((aligned(64))) = {0};
    for (size_t g = 0; g < n; g += CROSS) {
        turn(node, x + g * rows, rows, least(n - g, CROSS));
        cross_planes(part, planes, n, g);
        for (size_t i = 0; i < rows; i++) add_common(sums + 64 * i, node + i * CROSS, part);
    }
    for (size_t i = 0; i < rows; i++) out[i] = parities(sums + 64 * i);
}

/* Planes of the result are sums of rows chosen by the public bits of w: four rows at a time, from their 16 sums; lanes
 * are columns. */
void MK(mk_gf_blend)(uint64_t *restrict out, const uint64_t *x, const uint64_t *w, size_t rows, size_t n)
{
    uint16_t choice[64][MK_ROWS / 4] = {{0}};
    size_t groups = (rows + 3) / 4;
    for (size_t i = 0; i < rows; i++)
        for (unsigned s = 0; s < 64; s++) choice[s][i / 4] |= (uint16_t)(LANES * (w[i] >> s & 1) << i % 4);
    for (size_t q = 1; q < groups; q++)
        for (unsigned s = 0; s < 64; s++) choice[s][q] = (uint16_t)(choice[s][q] + 16 * LANES * q);
    for (size_t g = 0; g < n; g += LANES, x += LANES * rows) {
        size_t left = least(n - g, LANES);
        uint64_t sums[MK_ROWS / 4 * 16 * LANES] __attribute__((aligned(64)));
        uint64_t planes[LANES][64] __attribute__((aligned(64)));
        for (size_t q = 0; q < groups; q++) {
            vec s[16] = {splat(0)};
            UNROLL for (int i = 0; i < 4; i++)
            {
                uint64_t row[LANES] = {0};
                if (4 * q + (size_t)i < rows)
                    for (size_t l = 0; l < left; l++) row[l] = x[l * rows + 4 * q + (size_t)i];
                UNROLL for (int k = 0; k < 1 << i; k++) s[(1 << i) + k] = s[k] ^ load(row);
            }
            UNROLL for (int k = 0; k < 16; k++) store(sums + LANES * (16 * q + (size_t)k), s[k]);
        }
        for (size_t s = 0; s < 64; s += LANES) {
            vec plane[LANES];
            UNROLL for (int k = 0; k < LANES; k++)
            {
                plane[k] = splat(0);
                for (size_t q = 0; q < groups; q++) plane[k] ^= load(sums + choice[s + (size_t)k][q]);
            }
            turn_square(plane);
            UNROLL for (int l = 0; l < LANES; l++) store(planes[l] + s, plane[l]);
        }
        for (size_t l = 0; l < left; l++) transpose(out + 64 * (g + l), planes[l]);
    }
}

/* ---- GR(2^64, 48) ---- */

enum { GV = MK_GR / LANES }; /* vectors in an element */

/* The words s places before those of cur, which the words of before precede; s < LANES. Through memory they would be
 * waited for: what is stored as two vectors cannot be forwarded to a load of one. */
INLINE vec behind(vec before, vec cur, const int s)
{
    vec from;
    UNROLL for (int l = 0; l < LANES; l++) from[l] = (uint64_t)(LANES + l - s);
    return __builtin_shuffle(before, cur, from);
}

/* out = lo + p modulo the modulus. With H the upper half of p: what X^2 H + X^3 H + X^5 H carries past X^48 joins the
 * lowest words of H first; then lo + p is lo + L - H - X^2 H - X^3 H - X^5 H cut at X^48. */
INLINE void gr_reduce(uint64_t *out, const vec p[2 * GV], const uint64_t *lo)
{
    vec h[GV + 2], carried = splat(0);
    uint64_t top[4];
    UNROLL for (int i = 0; i < 4; i++) top[i] = p[GV + (43 + i) / LANES][(43 + i) % LANES];
    h[0] = h[1] = splat(0);
    carried[0] = top[3] + top[2] + top[0];
    carried[1] = top[3] + top[1];
    carried[2] = top[2];
    carried[3] = top[3];
    UNROLL for (int v = 0; v < GV; v++) h[v + 2] = v ? p[GV + v] : p[GV] - carried;
    UNROLL for (int v = 0; v < GV; v++)
    {
        vec r = p[v] - h[v + 2] - behind(h[v + 1], h[v + 2], 2) - behind(h[v + 1], h[v + 2], 3);
        r -= LANES > 5 ? behind(h[v + 1], h[v + 2], 5 % LANES) : behind(h[v], h[v + 1], 5 % LANES);
        if (lo) r += load(lo + LANES * v);
        store(out + LANES * v, r);
    }
}

/* Inner products by Karatsuba's rule, four times over: an element of 48 coefficients becomes 81 *leaves* of three, each
 * a sum of stretches of it, and a product costs 729 multiplications instead of 2304. All of that is linear, so products
 * are summed leaf by leaf and joined once, at the end. Elements go through in runs, one to a lane; the last of the four
 * steps is taken in registers, so what is stored of a run are BUDS of six coefficients. */
enum { LEAF = 3, LEAVES = 81, LEAF_OUT = 2 * LEAF - 1, RUN = 16, BUD = 2 * LEAF, BUDS = 27, SPREAD = BUDS * BUD * RUN };

INLINE void sum_halves(uint64_t *out, const uint64_t *in, size_t half)
{
    for (size_t i = 0; i < half * RUN; i += LANES) store(out + i, load(in + i) + load(in + half * RUN + i));
}

/* The buds of a run of elements, given by coefficient. */
static void spread(uint64_t *out, const uint64_t *in)
{
    enum { H24 = MK_GR / 2 * RUN, H12 = MK_GR / 4 * RUN, H6 = BUD * RUN };
    uint64_t mid[H24] __attribute__((aligned(64)));
    sum_halves(mid, in, MK_GR / 2);
    for (size_t i = 0; i < 3; i++) {
        const uint64_t *wide = i < 2 ? in + i * H24 : mid;
        uint64_t sums[H12] __attribute__((aligned(64)));
        sum_halves(sums, wide, MK_GR / 4);
        for (size_t j = 0; j < 3; j++, out += 3 * H6) {
            const uint64_t *part = j < 2 ? wide + j * H12 : sums;
            for (size_t k = 0; k < H6; k += LANES) {
                vec low = load(part + k), high = load(part + H6 + k);
                store(out + k, low);
                store(out + H6 + k, high);
                store(out + 2 * H6 + k, low + high);
            }
        }
    }
}

/* The buds of a run of n elements; lanes from n on are zero. */
static void spread_run(uint64_t *out, const uint64_t *x, size_t n)
{
    uint64_t turned[MK_GR * RUN] __attribute__((aligned(64)));
    for (size_t j = 0; j < RUN; j += LANES) {
        for (size_t i = 0; i < MK_GR; i += LANES) {
            vec v[LANES];
            UNROLL for (int l = 0; l < LANES; l++) v[l] = j + (size_t)l < n ? load(x + MK_GR * (j + (size_t)l) + i) : splat(0);
            turn_square(v);
            UNROLL for (int l = 0; l < LANES; l++) store(turned + (i + (size_t)l) * RUN + j, v[l]);
        }
    }
    spread(out, turned);
}

/* p += product of one leaf, lane by lane: of the first or second half of two buds, or of the sums of both halves. */
INLINE void leaf_product(uint64_t *p, const uint64_t *a, const uint64_t *b, const int which)
{
    sum s[LEAF_OUT];
    UNROLL for (int k = 0; k < LEAF_OUT; k++) s[k] = sum_zero();
    for (size_t v = 0; v < RUN; v += LANES) {
        factor y[LEAF];
        UNROLL for (int j = 0; j < LEAF; j++)
        {
            const uint64_t *at = b + j * RUN + v;
            y[j] = factor_of(which == 0 ? load(at) : which == 1 ? load(at + LEAF * RUN) : load(at) + load(at + LEAF * RUN));
        }
        UNROLL for (int i = 0; i < LEAF; i++)
        {
            const uint64_t *at = a + i * RUN + v;
            factor x = factor_of(which == 0 ? load(at) : which == 1 ? load(at + LEAF * RUN) : load(at) + load(at + LEAF * RUN));
            UNROLL for (int j = 0; j < LEAF; j++) s[i + j] = sum_mul(s[i + j], y[j], x);
        }
    }
    UNROLL for (int k = 0; k < LEAF_OUT; k++) store(p + k * LANES, load(p + k * LANES) + sum_value(s[k]));
}

/* p += products of the leaves of two runs; p has LEAVES * LEAF_OUT vectors. */
static void leaf_products(uint64_t *p, const uint64_t *a, const uint64_t *b)
{
    enum { STEP = LEAF_OUT * LANES };
    for (size_t i = 0; i < BUDS; i++, a += BUD * RUN, b += BUD * RUN, p += 3 * STEP) {
        leaf_product(p, a, b, 0);
        leaf_product(p + STEP, a, b, 1);
        leaf_product(p + 2 * STEP, a, b, 2);
    }
}

/* The product of 2 coefficients - 1 words that the leaves stand for. */
static void join(uint64_t *out, const uint64_t *leaves, size_t coefficients)
{
    if (coefficients == LEAF) {
        memcpy(out, leaves, LEAF_OUT * sizeof *out);
        return;
    }
    uint64_t low[MK_GR], high[MK_GR], mid[MK_GR];
    size_t half = coefficients / 2, words = LEAF_OUT;
    for (size_t c = half; c > LEAF; c /= 2) words *= 3;
    join(low, leaves, half);
    join(high, leaves + words, half);
    join(mid, leaves + 2 * words, half);
    memset(out, 0, (2 * coefficients - 1) * sizeof *out);
    for (size_t i = 0; i < 2 * half - 1; i++) {
        out[i] += low[i];
        out[half + i] += mid[i] - low[i] - high[i];
        out[2 * half + i] += high[i];
    }
}

enum { INNER_SUMS = LEAVES * LEAF_OUT * LANES };

static void inner_finish(uint64_t *out, const uint64_t *p)
{
    uint64_t sums[LEAVES * LEAF_OUT], product[2 * MK_GR] = {0};
    for (size_t i = 0; i < LEAVES * LEAF_OUT; i++) sums[i] = total(load(p + LANES * i));
    join(product, sums, MK_GR);
    vec q[2 * GV];
    UNROLL for (int v = 0; v < 2 * GV; v++) q[v] = load(product + LANES * v);
    gr_reduce(out, q, NULL);
}

void MK(mk_gr_inner)(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    uint64_t x[SPREAD] __attribute__((aligned(64))), y[SPREAD] __attribute__((aligned(64)));
    uint64_t p[INNER_SUMS] __attribute__((aligned(64))) = {0};
    for (size_t j = 0; j < n; j += RUN) {
        spread_run(x, a + MK_GR * j, least(n - j, RUN));
        spread_run(y, b + MK_GR * j, least(n - j, RUN));
        leaf_products(p, x, y);
    }
    inner_finish(out, p);
}

enum { RUN_WORDS = RUN * MK_GR };

/* For a run, sums += the inner product of x and y. */
static void inner_run(uint64_t *sums, const uint64_t *x, const uint64_t *y, size_t n)
{
    uint64_t u[SPREAD] __attribute__((aligned(64))), v[SPREAD] __attribute__((aligned(64)));
    spread_run(u, x, n);
    spread_run(v, y, n);
    leaf_products(sums, u, v);
}

/* Of n rows of components, NULL for one that is zero: the sum of components k and l, or what there is of it. */
static const uint64_t *sum_of_two(uint64_t *room, const uint64_t *const c[4], int k, int l, size_t n)
{
    if (!c[k] || !c[l]) return c[k] ? c[k] : c[l];
    for (size_t i = 0; i < MK_GR * n; i += LANES) store(room + i, load(c[k] + i) + load(c[l] + i));
    return room;
}

/* For a run, sums += one party's part of a.w, of components a, a', w, w': (a + a') w + a w', and where one of them is
 * zero, one product or none. */
static void part_run(uint64_t *sums, const uint64_t *const c[4], size_t n)
{
    uint64_t both[RUN_WORDS] __attribute__((aligned(64)));
    const uint64_t *x = c[0] ? c[0] : c[1], *y = c[2];
    if (c[0] && !c[1]) y = sum_of_two(both, c, 2, 3, n);
    else if (c[0] && y) x = sum_of_two(both, c, 0, 1, n);
    else if (c[0]) y = c[3];
    if (x && y) inner_run(sums, x, y, n);
    if (c[0] && c[1] && c[2] && c[3]) inner_run(sums, c[0], c[3], n);
}

/* For a run, the parts of what lies below, and of what lies above less what lies below. */
static void halves_run(uint64_t p[2][INNER_SUMS], const uint64_t *const low[4], const uint64_t *const high[4], size_t n)
{
    uint64_t room[4][RUN_WORDS] __attribute__((aligned(64)));
    const uint64_t *slope[4];
    for (int k = 0; k < 4; k++) {
        slope[k] = low[k] ? room[k] : NULL;
        for (size_t i = 0; low[k] && i < MK_GR * n; i += LANES) store(room[k] + i, load(high[k] + i) - load(low[k] + i));
    }
    part_run(p[0], low, n);
    part_run(p[1], slope, n);
}

void MK(mk_gr_halves)(uint64_t *restrict out, const uint64_t *a0, const uint64_t *a1, const uint64_t *w0,
                      const uint64_t *w1, size_t half)
{
    const uint64_t *const c[4] = {a0, a1, w0, w1};
    uint64_t p[2][INNER_SUMS] __attribute__((aligned(64))) = {{0}};
    for (size_t j = 0; j < half; j += RUN) {
        const uint64_t *low[4], *high[4];
        for (int k = 0; k < 4; k++) {
            low[k] = c[k] ? c[k] + MK_GR * j : NULL;
            high[k] = c[k] ? c[k] + MK_GR * (half + j) : NULL;
        }
        halves_run(p, low, high, least(half - j, RUN));
    }
    inner_finish(out, p[0]);
    inner_finish(out + MK_GR, p[1]);
}

/* Products with a 01 element, which is public: only the powers that it has are walked through. */
struct powers {
    uint8_t all[MK_GR];
    size_t count, below, from; /* `below` of them are less than WINDOW, and the last begin at `from` that reach its third */
};

enum { WINDOW = 32 };

INLINE void powers_of(struct powers *k, uint64_t r)
{
    r &= ((uint64_t)1 << MK_GR) - 1;
    k->count = 0;
    k->below = (size_t)__builtin_popcountll(r & (((uint64_t)1 << WINDOW) - 1));
    k->from = (size_t)__builtin_popcountll(r & (((uint64_t)1 << (2 * WINDOW - MK_GR + 1)) - 1));
    for (; r; r &= r - 1) k->all[k->count++] = (uint8_t)__builtin_ctzll(r);
}

/* Words WINDOW w and on of the sum of X^q a; a has MK_GR zeros on either side. */
INLINE void window_sum(vec *p, const uint64_t *a, const uint8_t *q, const uint8_t *end, int w)
{
    vec s[WINDOW / LANES];
    UNROLL for (int v = 0; v < WINDOW / LANES; v++) s[v] = splat(0);
    for (; q < end; q++)
        UNROLL for (int v = 0; v < WINDOW / LANES; v++) s[v] += load(a + WINDOW * w - *q + LANES * v);
    UNROLL for (int v = 0; v < WINDOW / LANES; v++) p[WINDOW / LANES * w + v] = s[v];
}

/* p = a r. */
INLINE void gr_mul01(vec p[2 * GV], const uint64_t *a, const struct powers *k)
{
    window_sum(p, a, k->all, k->all + k->below, 0);
    window_sum(p, a, k->all, k->all + k->count, 1);
    window_sum(p, a, k->all + k->from, k->all + k->count, 2);
}

void MK(mk_gr_mul01)(uint64_t *restrict out, const uint64_t *a, const uint64_t *r, size_t n)
{
    uint64_t room[3 * MK_GR] __attribute__((aligned(64))) = {0};
    struct powers k;
    for (size_t j = 0; j < n; j++) {
        vec p[2 * GV];
        memcpy(room + MK_GR, a + MK_GR * j, MK_GR * sizeof *a);
        powers_of(&k, r[j]);
        gr_mul01(p, room + MK_GR, &k);
        gr_reduce(out + MK_GR * j, p, NULL);
    }
}

/* The same where registers are many, for one r and many elements, whose branches are foreseen then: shifts by less than a
 * vector are made in registers, of which product and shifted element fill 19 of 32. */
INLINE void gr_mul01_wide(vec p[2 * GV], const vec a[GV], uint64_t r)
{
    UNROLL for (int v = 0; v < 2 * GV; v++) p[v] = splat(0);
    UNROLL for (int s = 0; s < LANES; s++)
    {
        vec t[GV + 1];
        UNROLL for (int v = 0; v <= GV; v++) t[v] = behind(v ? a[v - 1] : splat(0), v < GV ? a[v] : splat(0), s);
        UNROLL for (int q = 0; q < GV; q++) if (r >> (LANES * q + s) & 1)
            UNROLL for (int v = 0; v <= GV; v++) if (q + v < 2 * GV) p[q + v] += t[v];
    }
}

/* out = a + (b - a) xi for n elements; out may be a. */
static void fold_run(uint64_t *out, const uint64_t *a, const uint64_t *b, uint64_t xi, size_t n)
{
    uint64_t room[3 * MK_GR] __attribute__((aligned(64))) = {0};
    struct powers k;
    if (LANES < 8) powers_of(&k, xi);
    for (size_t j = 0; j < n; j++, a += MK_GR, b += MK_GR) {
        vec p[2 * GV], d[GV];
        UNROLL for (int v = 0; v < GV; v++) d[v] = load(b + LANES * v) - load(a + LANES * v);
        if (LANES >= 8) gr_mul01_wide(p, d, xi);
        else {
            UNROLL for (int v = 0; v < GV; v++) store(room + MK_GR + LANES * v, d[v]);
            gr_mul01(p, room + MK_GR, &k);
        }
        gr_reduce(out + MK_GR * j, p, a);
    }
}

void MK(mk_gr_fold)(uint64_t *restrict out, const uint64_t *a, uint64_t xi, size_t half)
{
    fold_run(out, a, a + MK_GR * half, xi, half);
}

void MK(mk_gr_fold_block)(uint64_t *restrict out, uint64_t *a0, uint64_t *a1, uint64_t *w0, uint64_t *w1,
                          const uint64_t *b0, const uint64_t *b1, const uint64_t *v0, const uint64_t *v1, uint64_t xi,
                          size_t here, size_t there)
{
    uint64_t *const c[4] = {a0, a1, w0, w1};
    const uint64_t *const more[4] = {b0, b1, v0, v1};
    size_t rows = here + there + (here + there) % 2;
    for (int k = 0; k < 4; k++) {
        if (!c[k]) continue;
        fold_run(c[k], c[k], c[k] + MK_GR * here, xi, here);
        size_t end = more[k] ? here + there : here;
        if (more[k]) fold_run(c[k] + MK_GR * here, more[k], more[k] + MK_GR * there, xi, there);
        memset(c[k] + MK_GR * end, 0, MK_GR * (rows - end) * sizeof *out);
    }
    MK(mk_gr_halves)(out, a0, a1, w0, w1, rows / 2);
}

void MK(mk_gr_scale01)(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t n)
{
    for (size_t j = 0; j < n; j++, out += MK_GR)
        UNROLL for (unsigned v = 0; v < GV; v++) store(out + LANES * v, keep(bits_of(r[j], v), splat(x[j])));
}

/* Sums of ring words with 01 coefficients, which are public, by the method of four Russians (Arlazarov, Dinic, Kronrod,
 * Faradzev, 1970): of QUAD words all sums of subsets are made once, and each of the 48 coefficients adds the one that
 * its bits name. Lanes are STRIP results side by side; their 48 coefficients lie one after another in `sums`, each
 * STRIP words, until they are turned into elements at the end. */
enum { QUAD = 4, SUBSETS = 1 << QUAD, STRIP = 2 * LANES, DEEP = 16, AT_ONCE = QUAD * DEEP };

/* Where among `subsets` those words of each QUAD lie whose coefficients have X^t: choice[q][t]. Eight powers at a time. */
static void choose(uint16_t choice[DEEP][MK_GR], const uint64_t *r, size_t n)
{
    const uint64_t ones = 0x0101010101010101, diagonal = 0x8040201008040201;
    for (size_t q = 0; QUAD * q < n; q++)
        for (size_t t = 0; t < MK_GR; t += 8) {
            uint64_t chosen = 0;
            for (size_t k = 0; k < QUAD && QUAD * q + k < n; k++) {
                uint64_t bits = (r[QUAD * q + k] >> t & 0xff) * ones & diagonal;
                chosen |= ((bits + 0x7f * ones) >> 7 & ones) << k;
            }
            for (size_t i = 0; i < 8; i++) choice[q][t + i] = (uint16_t)((SUBSETS * q + (chosen >> 8 * i & 0xff)) * STRIP);
        }
}

/* The sums of all subsets of four vectors, STRIP words apart. */
INLINE void subset_sums(uint64_t *to, const vec v[QUAD])
{
    vec s[SUBSETS];
    s[0] = splat(0);
    UNROLL for (int k = 0; k < QUAD; k++) UNROLL for (int i = 0; i < 1 << k; i++) s[(1 << k) + i] = s[i] + v[k];
    UNROLL for (int i = 0; i < SUBSETS; i++) store(to + STRIP * i, s[i]);
}

/* sums[t] += for each of n words the subset that is chosen; or = if it is the first time. */
static void add_chosen(uint64_t *sums, const uint64_t *subsets, uint16_t choice[DEEP][MK_GR], size_t n, int add)
{
    enum { T = 4 };
    for (size_t t = 0; t < MK_GR; t += T, sums += T * STRIP) {
        const uint16_t *at = choice[0] + t;
        vec s[T][2];
        UNROLL for (int i = 0; i < 2 * T; i++) s[i / 2][i % 2] = add ? load(sums + LANES * i) : splat(0);
        for (size_t w = 0; w < n; w += QUAD, at += MK_GR)
            UNROLL for (int i = 0; i < T; i++)
            {
                s[i][0] += load(subsets + at[i]);
                s[i][1] += load(subsets + LANES + at[i]);
            }
        UNROLL for (int i = 0; i < 2 * T; i++) store(sums + LANES * i, s[i / 2][i % 2]);
    }
}

/* From lanes to elements, in place. */
static void turn_sums(uint64_t *sums)
{
    uint64_t from[STRIP * MK_GR] __attribute__((aligned(64)));
    memcpy(from, sums, sizeof from);
    for (size_t j = 0; j < STRIP; j += LANES)
        for (size_t t = 0; t < MK_GR; t += LANES) {
            vec v[LANES];
            UNROLL for (int l = 0; l < LANES; l++) v[l] = load(from + STRIP * (t + (size_t)l) + j);
            turn_square(v);
            UNROLL for (int l = 0; l < LANES; l++) store(sums + MK_GR * (j + (size_t)l) + t, v[l]);
        }
}

/* Subsets of n words down each of STRIP columns of x, of which a row is `down` words. */
static void subsets_down(uint64_t *subsets, const uint64_t *x, size_t down, size_t n)
{
    for (size_t w = 0; w < n; w += QUAD, subsets += STRIP * SUBSETS)
        for (size_t j = 0; j < STRIP; j += LANES) {
            vec v[QUAD];
            UNROLL for (int k = 0; k < QUAD; k++) v[k] = w + (size_t)k < n ? load(x + (w + (size_t)k) * down + j) : splat(0);
            subset_sums(subsets + j, v);
        }
}

/* Subsets of n words along each of STRIP rows of x, which are `right` words apart. */
static void subsets_along(uint64_t *subsets, const uint64_t *x, size_t right, size_t n)
{
    for (size_t w = 0; w < n; w += LANES)
        for (size_t j = 0; j < STRIP; j += LANES) {
            vec v[LANES];
            UNROLL for (int l = 0; l < LANES; l++) v[l] = load_first(x + (j + (size_t)l) * right + w, least(n - w, LANES));
            UNROLL for (int l = 0; l < LANES; l++) __builtin_prefetch(x + (STRIP + j + (size_t)l) * right + w);
            turn_square(v);
            UNROLL for (size_t k = 0; k < LANES; k += QUAD) subset_sums(subsets + STRIP * SUBSETS * ((w + k) / QUAD) + j, v + k);
        }
}

/* Few results: vectors first .. first + GR_VECS - 1 of out = sum_w x[w * down] r_w, or += it. */
INLINE void combine_block(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t down, size_t n,
                          const unsigned first, int add)
{
    vec s[GR_VECS];
    UNROLL for (int v = 0; v < GR_VECS; v++) s[v] = add ? load(out + LANES * (first + (unsigned)v)) : splat(0);
    for (size_t w = 0; w < n; w++) {
        vec f = splat(x[w * down]);
        UNROLL for (int v = 0; v < GR_VECS; v++) s[v] = add_where(s[v], bits_of(r[w], first + (unsigned)v), f);
    }
    UNROLL for (int v = 0; v < GR_VECS; v++) store(out + LANES * (first + (unsigned)v), s[v]);
}

/* out_u = sum_w x[u * right + w * down] r_w, or += it, with right or down being 1. The first `strips` of the rows stay
 * sums by lane. */
static void combine_some(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t right, size_t down,
                         size_t strips, size_t rows, size_t n, int add)
{
    uint64_t subsets[DEEP * SUBSETS * STRIP] __attribute__((aligned(64)));
    uint16_t choice[DEEP][MK_GR] __attribute__((aligned(64)));
    for (size_t w = 0; strips > 0 && w < n; w += AT_ONCE) {
        size_t left = least(n - w, AT_ONCE);
        choose(choice, r + w, left);
        for (size_t u = 0; u < strips; u += STRIP) {
            if (down == 1) subsets_along(subsets, x + u * right + w, right, left);
            else subsets_down(subsets, x + u + w * down, down, left);
            add_chosen(out + u * MK_GR, subsets, choice, left, add || w > 0);
        }
    }
    for (size_t u = strips; u < rows; u++)
        UNROLL for (unsigned v = 0; v < GV; v += GR_VECS)
            combine_block(out + u * MK_GR, x + u * right, r, down, n, v, add);
}

static void combine(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t right, size_t down, size_t rows,
                    size_t n)
{
    size_t strips = n >= QUAD ? rows / STRIP * STRIP : 0; /* for fewer words subsets do not pay */
    combine_some(out, x, r, right, down, strips, rows, n, 0);
    for (size_t u = 0; u < strips; u += STRIP) turn_sums(out + u * MK_GR);
}

void MK(mk_gr_combine)(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    combine(out, x, r, n, 1, m, n);
}

void MK(mk_gr_combine_cols)(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    combine(out, x, r, 1, n, n, m);
}

/* out = r sum_t b[t * down] X^t, for few t: r, shifted by t, says which words of the product take b[t]. */
INLINE void mul_short(uint64_t *out, const uint64_t *b, size_t down, size_t bits, uint64_t r)
{
    enum { WIDE = GR_VECS * LANES };
    vec p[2 * GV];
    r &= ((uint64_t)1 << MK_GR) - 1;
    UNROLL for (size_t u = 0; u < 2 * GV / GR_VECS; u++)
    {
        vec s[GR_VECS];
        UNROLL for (int v = 0; v < GR_VECS; v++) s[v] = splat(0);
        for (size_t t = u * WIDE < MK_GR ? 0 : u * WIDE - MK_GR + 1; t < bits; t++) {
            uint64_t word = u * WIDE < t ? r << (t - u * WIDE) : r >> (u * WIDE - t);
            vec f = splat(b[t * down]);
            UNROLL for (int v = 0; v < GR_VECS; v++) s[v] = add_where(s[v], bits_of(word, (unsigned)v), f);
        }
        UNROLL for (int v = 0; v < GR_VECS; v++) p[GR_VECS * u + (size_t)v] = s[v];
    }
    gr_reduce(out, p, NULL);
}

/* Few rows of one-hots, or of halves, at a time, so that all that is made of them lies in the first-level cache. */
enum { HOT_ROWS = 64, HOT_WORDS = 1 << 13 };

void MK(mk_gr_combine32)(uint64_t *restrict out, const uint32_t *x, const uint64_t *r, size_t m, size_t n)
{
    enum { SPAN = HOT_WORDS / HOT_ROWS };
    uint64_t room[HOT_WORDS] __attribute__((aligned(64)));
    size_t strips = n >= QUAD ? m / STRIP * STRIP : 0;
    if (n == 0) memset(out, 0, MK_GR * m * sizeof *out);
    for (size_t i = 0; i < m; i += HOT_ROWS)
        for (size_t at = 0; at < n; at += SPAN) {
            size_t rows = least(m - i, HOT_ROWS), words = least(n - at, SPAN), laned = i < strips ? least(strips - i, rows) : 0;
            for (size_t j = 0; j < rows; j++)
                for (size_t w = 0; w < words; w++) room[j * words + w] = x[(i + j) * n + at + w];
            combine_some(out + MK_GR * i, room, r + at, words, 1, laned, rows, words, at > 0);
        }
    for (size_t u = 0; u < strips; u += STRIP) turn_sums(out + u * MK_GR);
}

INLINE void hot(uint64_t *a, uint64_t *w, uint64_t *columns, const void *e, const size_t width, const uint64_t *b,
                const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits)
{
    const uint64_t *whole = e; /* or entries of 2 bytes, which are widened as they come */
    const uint16_t *half = e;
    uint64_t room[HOT_WORDS] __attribute__((aligned(64)));
    size_t strips = size / STRIP * STRIP, step = size ? least(HOT_ROWS, HOT_WORDS / size) : HOT_ROWS;
    memset(columns, 0, size * MK_GR * sizeof *columns);
    for (size_t i = 0; i < n; i += step) {
        size_t rows = least(n - i, step);
        if (width < sizeof *room)
            for (size_t j = 0; j < rows * size; j++) room[j] = half[size * i + j];
        const uint64_t *block = width < sizeof *room ? room : whole + size * i;
        combine(w + MK_GR * i, block, q, size, 1, rows, size);
        combine_some(columns, block, r + i, 1, size, strips, size, rows, 1);
        for (size_t j = 0; j < rows; j++) mul_short(a + MK_GR * (i + j), b + i + j, n, bits, r[i + j]);
    }
    for (size_t u = 0; u < strips; u += STRIP) turn_sums(columns + u * MK_GR);
}

void MK(mk_gr_hot)(uint64_t *restrict a, uint64_t *restrict w, uint64_t *restrict columns, const uint64_t *e,
                   const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size,
                   size_t bits)
{
    hot(a, w, columns, e, sizeof *e, b, q, r, n, size, bits);
}

void MK(mk_gr_half_hot)(uint64_t *restrict a, uint64_t *restrict w, uint64_t *restrict columns, const uint16_t *e,
                        const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n,
                        size_t size, size_t bits)
{
    hot(a, w, columns, e, sizeof *e, b, q, r, n, size, bits);
}

/* Results of a cross, which come one by one: STRIP of them wait in `terms`, CROSS words each, to be added together. */
struct crossing {
    uint64_t *out, *spare; /* where the next strip goes; where the last one, if it is not whole */
    size_t left, have;     /* results still to come, and waiting */
    size_t width;          /* columns of a result */
    int alone;             /* whether there are x0 and y0 only */
    uint64_t *terms, *subsets;
    uint16_t (*choice)[MK_GR];
};

static void cross_strip(struct crossing *c)
{
    uint64_t *sums = c->left < STRIP ? c->spare : c->out;
    subsets_along(c->subsets, c->terms, CROSS, c->width);
    add_chosen(sums, c->subsets, c->choice, c->width, 1);
    c->out += STRIP * MK_GR;
    c->left -= least(c->left, STRIP);
    c->have = 0;
}

static void gr_cross(struct crossing *c, const uint64_t *node, size_t stride, size_t rows, int slope, uint64_t *room)
{
    if (rows == 1) {
        uint64_t *term = c->terms + CROSS * c->have;
        if (!slope) return;
        for (int j = 0; c->alone && j < CROSS; j += LANES)
            store(term + j, sum_value(sum_mul(sum_zero(), factor_of(load(node + j)), factor_of(load(node + 2 * stride + (size_t)j)))));
        for (int j = 0; !c->alone && j < CROSS; j += LANES) {
            vec y0 = load(node + 2 * stride + (size_t)j), y1 = load(node + 3 * stride + (size_t)j);
            sum both = sum_mul(sum_zero(), factor_of(load(node + j)), factor_of(y0 + y1));
            store(term + j, sum_value(sum_mul(both, factor_of(load(node + stride + (size_t)j)), factor_of(y0))));
        }
        if (++c->have == least(c->left, STRIP)) cross_strip(c);
        return;
    }
    size_t half = rows / 2 * CROSS;
    gr_cross(c, node, stride, rows / 2, slope, room);
    gr_cross(c, node + half, stride, rows / 2, slope, room);
    cross_differences(room, node, stride, half, 0, c->alone);
    gr_cross(c, room, half, rows / 2, 1, room + 4 * half);
}

void MK(mk_gr_cross)(uint64_t *restrict out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0,
                     const uint64_t *y1, const uint64_t *r, size_t rows, size_t n)
{
    const uint64_t *const from[4] = {x0, x1, y0, y1};
    uint64_t node[CROSS_ROOM] __attribute__((aligned(64))), room[CROSS_ROOM] __attribute__((aligned(64)));
    uint64_t spare[STRIP * MK_GR] __attribute__((aligned(64))) = {0}, terms[STRIP * CROSS] __attribute__((aligned(64))) = {0};
    uint64_t subsets[CROSS / QUAD * SUBSETS * STRIP] __attribute__((aligned(64)));
    uint16_t choice[DEEP][MK_GR] __attribute__((aligned(64)));
    size_t count = cross_count(rows), whole = count / STRIP * STRIP;
    memset(out, 0, count * MK_GR * sizeof *out);
    for (size_t g = 0; g < n; g += CROSS) {
        struct crossing c = {out, spare, count, 0, least(n - g, CROSS), !x1, terms, subsets, choice};
        cross_columns(node, from, rows, n, g);
        choose(choice, r + g, c.width);
        gr_cross(&c, node, rows * CROSS, rows, 0, room);
    }
    for (size_t u = 0; u < whole; u += STRIP) turn_sums(out + u * MK_GR);
    turn_sums(spare);
    memcpy(out + whole * MK_GR, spare, (count - whole) * MK_GR * sizeof *out);
}
