/* The kernels as formulas: portable, constant-time, meant to be read. avx2.c and avx512.c differ only in how. */
#include <string.h>

#include "ct.h"
#include "levels.h"

#define MK(name) name##_ref

/* ---- AES-256 in counter mode: FIPS 197; NIST SP 800-38A section 6.5 ----
 *
 * Bit by bit, on 128 blocks at once: bit l of state[j][b] is bit b of byte j of block l. Nothing is looked up, and what
 * moves bytes within a block only renames. Lanes are vectors since nearly every machine has them of 128 bits, and since
 * gcc 12 makes slow code of plain words here, by vectorising them in its own way. */

enum { AES_ROUNDS = 14, AES_BLOCK = 16, AES_KEY = 32, AES_SCHEDULE = AES_BLOCK * (AES_ROUNDS + 1), AES_LANES = 128 };

typedef uint64_t lanes __attribute__((vector_size(16)));

/* In GF(16) = GF(2)[z] / (z^4 + z + 1), lanes i holding the coefficients of z^i of 128 elements. */
static inline void gf16_mul(lanes out[4], const lanes a[4], const lanes b[4])
{
    lanes p[7] = {{0}};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) p[i + j] ^= a[i] & b[j];
    for (int i = 6; i >= 4; i--) p[i - 4] ^= p[i], p[i - 3] ^= p[i];
    memcpy(out, p, 4 * sizeof *out);
}

static inline void gf16_square(lanes out[4], const lanes a[4])
{
    const lanes square[4] = {a[0] ^ a[2], a[2], a[1] ^ a[3], a[3]};
    memcpy(out, square, sizeof square);
}

/* out[i] is the sum of those x[j] for which bit j of rows[i] is set; rows are public. */
static inline void bit_matrix(lanes out[8], const uint8_t rows[8], const lanes x[8])
{
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
        out[i] = (lanes){0};
        _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++)
            if (rows[i] >> j & 1) out[i] ^= x[j];
    }
}

/* SubBytes: inversion in GF(2)[x] / (x^8 + x^4 + x^3 + x + 1), 0 to 0, then an affine map. A field of 256 elements is
 * also GF(16)[y] / (y^2 + y + z^3), where z is the element 0x5c and y 0xa2; `enter` goes there, with y in the last four,
 * and `leave` comes back and does the affine map's matrix. (a y + b)(a y + a + b) = z^3 a^2 + a b + b^2 = n lies in
 * GF(16), so the inverse is (a y + a + b) / n, and 1 / n = n^14. */
static void aes_substitute(lanes x[8])
{
    static const uint8_t enter[8] = {0xa1, 0x04, 0xfc, 0x18, 0x70, 0xd2, 0xac, 0xa0};
    static const uint8_t leave[8] = {0x45, 0x3f, 0x69, 0x25, 0x3b, 0xee, 0xd0, 0x06};
    lanes t[8], n[4], power[4], inverse[4], *b = t, *a = t + 4;
    bit_matrix(t, enter, x);
    gf16_mul(n, a, b);
    gf16_square(power, b);
    const lanes z3a2[4] = {a[2], a[1] ^ a[2] ^ a[3], a[1], a[0] ^ a[2] ^ a[3]};
    for (int i = 0; i < 4; i++) n[i] ^= z3a2[i] ^ power[i];
    gf16_square(inverse, n); /* n^2, n^4, n^8 */
    gf16_square(power, inverse);
    gf16_mul(inverse, inverse, power);
    gf16_square(power, power);
    gf16_mul(inverse, inverse, power);
    for (int i = 0; i < 4; i++) b[i] ^= a[i];
    gf16_mul(a, a, inverse);
    gf16_mul(b, b, inverse);
    bit_matrix(x, leave, t);
    for (int i = 0; i < 8; i++) x[i] ^= (uint64_t)0 - (0x63 >> i & 1);
}

/* KeyExpansion: four bytes at a time, words of 32 bits in the standard. */
static void aes_schedule(uint8_t keys[AES_SCHEDULE], const uint8_t *key)
{
    uint8_t t[4];
    unsigned constant = 1;
    memcpy(keys, key, AES_KEY);
    for (size_t at = AES_KEY; at < AES_SCHEDULE; at += 4) {
        memcpy(t, keys + at - 4, 4);
        if (at % (AES_KEY / 2) == 0) {
            size_t turn = at % AES_KEY == 0;
            lanes x[8] = {{0}};
            for (size_t j = 0; j < 4; j++)
                for (int b = 0; b < 8; b++) x[b][0] |= (uint64_t)(t[(j + turn) % 4] >> b & 1) << j;
            aes_substitute(x);
            memset(t, 0, sizeof t);
            for (size_t j = 0; j < 4; j++)
                for (int b = 0; b < 8; b++) t[j] |= (uint8_t)((x[b][0] >> j & 1) << b);
            ct_wipe(x, sizeof x);
            if (turn) t[0] ^= (uint8_t)constant, constant <<= 1;
        }
        for (size_t j = 0; j < 4; j++) keys[at + j] = keys[at + j - AES_KEY] ^ t[j];
    }
    ct_wipe(t, sizeof t);
}

/* Bit l of word b and bit b of word l change places: two quarters of the square, then two of each quarter, and on. */
static void transpose(uint64_t x[64])
{
    for (int s = 32; s > 0; s /= 2) {
        const uint64_t low = ~(uint64_t)0 / (((uint64_t)1 << s) + 1); /* the bits whose place lacks s */
        for (int i = 0; i < 64; i++)
            if ((i & s) == 0) {
                uint64_t t = (x[i] >> s ^ x[i + s]) & low;
                x[i] ^= t << s, x[i + s] ^= t;
            }
    }
}

/* The same key for all blocks. */
static void aes_add_key(lanes state[AES_BLOCK][8], const uint8_t *key)
{
    uint64_t one = ct_one();
    for (int j = 0; j < AES_BLOCK; j++)
        for (unsigned b = 0; b < 8; b++) state[j][b] ^= ct_mask(key[j], b, one);
}

/* SubBytes and ShiftRows: byte 4 c + r of the result is byte r of column c + r. */
static void aes_confuse(lanes state[AES_BLOCK][8])
{
    lanes t[AES_BLOCK][8];
    for (int j = 0; j < AES_BLOCK; j++) aes_substitute(state[j]);
    memcpy(t, state, sizeof t);
    for (int j = 0; j < AES_BLOCK; j++) memcpy(state[j], t[5 * j % AES_BLOCK], sizeof t[j]);
}

/* MixColumns: byte r of a column becomes 2 (a_r + a_(r+1)) + a_(r+1) + a_(r+2) + a_(r+3). */
static void aes_mix(lanes column[4][8])
{
    lanes a[4][8];
    memcpy(a, column, sizeof a);
    for (int r = 0; r < 4; r++) {
        const lanes *a0 = a[r], *a1 = a[(r + 1) % 4], *a2 = a[(r + 2) % 4], *a3 = a[(r + 3) % 4];
        lanes top = a0[7] ^ a1[7]; /* x^8 = x^4 + x^3 + x + 1 */
        for (int b = 0; b < 8; b++) {
            column[r][b] = a1[b] ^ a2[b] ^ a3[b] ^ (b == 0 || b == 1 || b == 3 || b == 4 ? top : (lanes){0});
            if (b > 0) column[r][b] ^= a0[b - 1] ^ a1[b - 1];
        }
    }
}

void mk_prg_aes_ref(uint8_t *out, size_t n, const uint8_t *key, uint64_t stream, uint64_t block)
{
    uint8_t keys[AES_SCHEDULE];
    lanes state[AES_BLOCK][8];
    uint64_t words[64];
    aes_schedule(keys, key);
    for (; n > 0; block += AES_LANES) {
        for (size_t w = 0; w < AES_LANES / 64; w++) {
            for (size_t l = 0; l < 64; l++) words[l] = block + 64 * w + l;
            transpose(words);
            for (int i = 0; i < 64; i++) { /* the byte with bits 56 to 63 comes first */
                state[7 - i / 8][i % 8][w] = (uint64_t)0 - (stream >> i & 1);
                state[15 - i / 8][i % 8][w] = words[i];
            }
        }
        aes_add_key(state, keys);
        for (int r = 1; r <= AES_ROUNDS; r++) {
            aes_confuse(state);
            for (int c = 0; c < 4 && r < AES_ROUNDS; c++) aes_mix(state + 4 * c);
            aes_add_key(state, keys + AES_BLOCK * r);
        }
        size_t take = n < AES_LANES * AES_BLOCK ? n : AES_LANES * AES_BLOCK;
        for (size_t w = 0; w < AES_LANES / 64; w++)
            for (size_t half = 0; half < AES_BLOCK; half += 8) {
                for (size_t i = 0; i < 64; i++) words[i] = state[half + i / 8][i % 8][w];
                transpose(words);
                for (size_t l = 0; l < 64; l++)
                    for (size_t j = 0, at = AES_BLOCK * (64 * w + l) + half; j < 8 && at + j < take; j++)
                        out[at + j] = (uint8_t)(words[l] >> (8 * j));
            }
        out += take, n -= take;
    }
    ct_wipe(keys, sizeof keys);
    ct_wipe(state, sizeof state);
    ct_wipe(words, sizeof words);
}

/* ---- Z_2^64 ---- */

void mk_ring_product_ref(uint64_t *restrict c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n,
                         size_t width, int add)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; !add && j < width; j++) c[i * n + j] = 0;
        for (size_t t = 0; t < k; t++)
            for (size_t j = 0; j < width; j++) c[i * n + j] += a[i * k + t] * b[t * n + j];
    }
}

void mk_ring_product_nt_ref(uint64_t *restrict c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n,
                            size_t width, int add)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < width; j++) {
            uint64_t sum = add ? c[i * n + j] : 0;
            for (size_t t = 0; t < k; t++) sum += a[i * k + t] * b[j * k + t];
            c[i * n + j] = sum;
        }
}

void mk_ring32_product_ref(uint32_t *restrict c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t n,
                           size_t width, int add)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; !add && j < width; j++) c[i * n + j] = 0;
        for (size_t t = 0; t < k; t++)
            for (size_t j = 0; j < width; j++) c[i * n + j] += a[i * k + t] * b[t * n + j];
    }
}

void mk_ring_rss_mul_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha,
                         size_t n)
{
    for (size_t j = 0; j < n; j++) out[j] = x[j] * (y[j] + y[n + j]) + x[n + j] * y[j] + alpha[j];
}

void mk_bits_rss_and_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha,
                         size_t n)
{
    for (size_t j = 0; j < n; j++) out[j] = (x[j] & (y[j] ^ y[n + j])) ^ (x[n + j] & y[j]) ^ alpha[j];
}

/* ---- packed bits ---- */

void mk_bits_slice_ref(uint64_t *restrict planes, const uint64_t *x, size_t n, size_t nbits)
{
    size_t words = (n + 63) / 64;
    for (size_t w = 0; w < words; w++)
        for (size_t b = 0; b < nbits; b++) {
            uint64_t word = 0;
            for (size_t l = 0; l < 64 && 64 * w + l < n; l++) word |= (x[64 * w + l] >> b & 1) << l;
            planes[b * words + w] = word;
        }
}

void mk_bits_unslice_ref(uint64_t *restrict x, const uint64_t *planes, size_t n, size_t nbits)
{
    size_t words = (n + 63) / 64;
    for (size_t j = 0; j < n; j++) {
        uint64_t value = 0;
        for (size_t b = 0; b < nbits; b++) value |= (planes[b * words + j / 64] >> (j % 64) & 1) << b;
        x[j] = value;
    }
}

void mk_bits_to_ring_ref(uint64_t *restrict out, const uint64_t *words, size_t rows, size_t n)
{
    for (; rows > 0; rows--, words += (n + 63) / 64, out += n)
        for (size_t j = 0; j < n; j++) out[j] = words[j / 64] >> (j % 64) & 1;
}

void mk_ring_lsb_ref(uint64_t *restrict words, const uint64_t *x, size_t rows, size_t n)
{
    for (; rows > 0; rows--, words += (n + 63) / 64, x += n) mk_bits_slice_ref(words, x, n, 1);
}

void mk_bits_pick_ref(uint64_t *restrict out, const uint64_t *planes, const uint64_t *row, size_t n)
{
    size_t words = (n + 63) / 64;
    if (n > 0) memset(out, 0, words * sizeof *out);
    for (size_t j = 0; j < n; j++) out[j / 64] |= (planes[row[j] * words + j / 64] >> (j % 64) & 1) << (j % 64);
}

/* ---- look-up ---- */

#define DOUBLE(part, whole, entry)                                                                                     \
    void part(entry *restrict out, const entry *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n,         \
              size_t size, size_t have)                                                                                \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            for (size_t j = 0; j < have; j++) {                                                                        \
                uint64_t e0 = e[i * size + j], e1 = e[e_apart + i * size + j];                                         \
                out[i * have + j] = (entry)(out[i * have + j] + e0 * (b[i] + b[b_apart + i]) + e1 * b[i]);             \
            }                                                                                                          \
    }                                                                                                                  \
    void whole(entry *restrict e, const entry *high, size_t n, size_t size, size_t have)                               \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            for (size_t j = 0; j < have; j++) {                                                                        \
                e[i * size + have + j] = high[i * have + j];                                                           \
                e[i * size + j] = (entry)(e[i * size + j] - high[i * have + j]);                                       \
            }                                                                                                          \
    }
DOUBLE(mk_ring_double_part_ref, mk_ring_double_ref, uint64_t)
DOUBLE(mk_half_double_part_ref, mk_half_double_ref, uint16_t)
DOUBLE(mk_byte_double_part_ref, mk_byte_double_ref, uint8_t)
#undef DOUBLE

#define ROTATE(name, entry)                                                                                            \
    void name(entry *restrict out, const entry *e, const uint64_t *c, size_t n, size_t size)                           \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            for (size_t j = 0; j < size; j++) out[i * size + j] = e[i * size + (c[i] - j) % size];                     \
    }
ROTATE(mk_ring_rotate_ref, uint64_t)
ROTATE(mk_half_rotate_ref, uint16_t)
ROTATE(mk_byte_rotate_ref, uint8_t)
#undef ROTATE

/* ---- GF(2^64) ---- */

/* hi:lo ^= a b as polynomials over GF(2): shift and mask. */
static void clmul_add(uint64_t *lo, uint64_t *hi, uint64_t a, uint64_t b)
{
    uint64_t one = ct_one();
    uint64_t l = *lo, h = *hi;
    for (unsigned i = 0; i < 64; i++) {
        uint64_t t = a & ct_mask(b, i, one);
        l ^= t << i;
        h ^= t >> 1 >> (63 - i);
    }
    *lo = l, *hi = h;
}

/* x^64 = x^4 + x^3 + x + 1, so hi times that falls on lo, and what leaves at the top falls once more. */
static uint64_t gf_reduce(uint64_t lo, uint64_t hi)
{
    hi ^= hi >> 63 ^ hi >> 61 ^ hi >> 60;
    return lo ^ hi ^ hi << 1 ^ hi << 3 ^ hi << 4;
}

static uint64_t gf_product(uint64_t a, uint64_t b)
{
    uint64_t lo = 0, hi = 0;
    clmul_add(&lo, &hi, a, b);
    return gf_reduce(lo, hi);
}

void mk_gf_mul_ref(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    for (size_t j = 0; j < n; j++) out[j] = gf_product(a[j], b[j]);
}

void mk_gf_scale_ref(uint64_t *restrict out, const uint64_t *a, uint64_t s, size_t n)
{
    for (size_t j = 0; j < n; j++) out[j] = gf_product(a[j], s);
}

void mk_gf_inner_ref(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    uint64_t lo = 0, hi = 0; /* reduction is linear: once, at the end */
    for (size_t j = 0; j < n; j++) clmul_add(&lo, &hi, a[j], b[j]);
    *out = gf_reduce(lo, hi);
}

void mk_gf_fold_ref(uint64_t *restrict out, const uint64_t *a, uint64_t xi, size_t half)
{
    for (size_t j = 0; j < half; j++) out[j] = a[j] ^ gf_product(a[j] ^ a[half + j], xi);
}

/* Terms of a cross: node holds x0, x1, y0, y1, `stride` apart, each of `rows` words; `room` takes the differences. A
 * term that took none is not wanted: it is a sum of the products themselves, which the caller has. */
typedef void take_term(uint64_t *out, const uint64_t term[4], const uint64_t *coefficient);

static uint64_t *cross_terms(uint64_t *out, size_t step, const uint64_t *node, size_t stride, size_t rows, int slope,
                             int binary, uint64_t *room, take_term *take, const uint64_t *coefficient)
{
    if (rows == 1) {
        const uint64_t term[4] = {node[0], node[stride], node[2 * stride], node[3 * stride]};
        if (!slope) return out;
        take(out, term, coefficient);
        return out + step;
    }
    size_t half = rows / 2;
    out = cross_terms(out, step, node, stride, half, slope, binary, room, take, coefficient);
    out = cross_terms(out, step, node + half, stride, half, slope, binary, room, take, coefficient);
    for (size_t c = 0; c < 4; c++)
        for (size_t i = 0; i < half; i++) {
            uint64_t low = node[c * stride + i], high = node[c * stride + half + i];
            room[c * half + i] = binary ? high ^ low : high - low;
        }
    return cross_terms(out, step, room, half, half, 1, binary, room + 4 * half, take, coefficient);
}

/* 3^levels - 2^levels for rows = 2^levels. */
static size_t cross_count(size_t rows)
{
    size_t all = 1;
    for (size_t left = rows; left > 1; left /= 2) all *= 3;
    return all - rows;
}

static void cross_column(uint64_t *node, const uint64_t *const from[4], size_t rows, size_t g)
{
    for (size_t c = 0; c < 4; c++)
        if (from[c]) memcpy(node + c * rows, from[c] + g * rows, rows * sizeof *node);
        else memset(node + c * rows, 0, rows * sizeof *node);
}

static void take_gf(uint64_t *out, const uint64_t t[4], const uint64_t *rho)
{
    uint64_t one = ct_one(), word = (t[0] & (t[2] ^ t[3])) ^ (t[1] & t[2]);
    for (unsigned l = 0; l < 64; l++) *out ^= rho[l] & ct_mask(word, l, one);
}

/* The 64 elements of column g. */
static void elements(uint64_t rho[64], const uint64_t *planes, size_t n, size_t g)
{
    memset(rho, 0, 64 * sizeof *rho);
    for (unsigned s = 0; s < 64; s++)
        for (unsigned l = 0; l < 64; l++) rho[l] |= (planes[s * n + g] >> l & 1) << s;
}

void mk_gf_cross_ref(uint64_t *restrict out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0,
                     const uint64_t *y1, const uint64_t *planes, size_t rows, size_t n)
{
    const uint64_t *const from[4] = {x0, x1, y0, y1};
    uint64_t node[4 * MK_ROWS], room[4 * MK_ROWS], rho[64];
    memset(out, 0, cross_count(rows) * sizeof *out);
    for (size_t g = 0; g < n; g++) {
        elements(rho, planes, n, g);
        cross_column(node, from, rows, g);
        cross_terms(out, 1, node, rows, rows, 0, 1, room, take_gf, rho);
    }
}

void mk_gf_combine_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *planes, size_t rows, size_t n)
{
    uint64_t one = ct_one(), rho[64];
    memset(out, 0, rows * sizeof *out);
    for (size_t g = 0; g < n; g++) {
        elements(rho, planes, n, g);
        for (size_t i = 0; i < rows; i++)
            for (unsigned l = 0; l < 64; l++) out[i] ^= rho[l] & ct_mask(x[g * rows + i], l, one);
    }
}

void mk_gf_blend_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *w, size_t rows, size_t n)
{
    uint64_t one = ct_one();
    for (size_t g = 0; g < n; g++)
        for (unsigned l = 0; l < 64; l++) {
            uint64_t sum = 0;
            for (size_t i = 0; i < rows; i++) sum ^= w[i] & ct_mask(x[g * rows + i], l, one);
            out[64 * g + l] = sum;
        }
}

/* ---- GR(2^64, 48) ---- */

/* out = p mod the modulus, p of degree at most 94; p is spoilt. X^48 = -(X^5 + X^3 + X^2 + 1). */
static void gr_reduce(uint64_t *out, uint64_t *p)
{
    for (int i = 2 * MK_GR - 2; i >= MK_GR; i--) {
        p[i - 48] -= p[i];
        p[i - 46] -= p[i];
        p[i - 45] -= p[i];
        p[i - 43] -= p[i];
    }
    memcpy(out, p, MK_GR * sizeof *out);
}

/* p += a b without reduction. */
static void gr_mul_add(uint64_t *restrict p, const uint64_t *a, const uint64_t *b)
{
    for (int i = 0; i < MK_GR; i++)
        for (int j = 0; j < MK_GR; j++) p[i + j] += a[i] * b[j];
}

static void gr_mul01_add(uint64_t *restrict p, const uint64_t *a, uint64_t r)
{
    uint64_t one = ct_one();
    for (int i = 0; i < MK_GR; i++) {
        uint64_t mask = ct_mask(r, i, one);
        for (int j = 0; j < MK_GR; j++) p[i + j] += a[j] & mask;
    }
}

void mk_gr_inner_ref(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    uint64_t p[2 * MK_GR] = {0};
    for (size_t j = 0; j < n; j++) gr_mul_add(p, a + MK_GR * j, b + MK_GR * j);
    gr_reduce(out, p);
}

void mk_gr_mul01_ref(uint64_t *restrict out, const uint64_t *a, const uint64_t *r, size_t n)
{
    for (size_t j = 0; j < n; j++) {
        uint64_t p[2 * MK_GR] = {0};
        gr_mul01_add(p, a + MK_GR * j, r[j]);
        gr_reduce(out + MK_GR * j, p);
    }
}

/* out = a + (b - a) xi; out may be a. */
static void gr_fold_row(uint64_t *out, const uint64_t *a, const uint64_t *b, uint64_t xi)
{
    uint64_t p[2 * MK_GR] = {0}, d[MK_GR];
    for (int i = 0; i < MK_GR; i++) {
        d[i] = b[i] - a[i];
        p[i] = a[i];
    }
    gr_mul01_add(p, d, xi);
    gr_reduce(out, p);
}

void mk_gr_fold_ref(uint64_t *restrict out, const uint64_t *a, uint64_t xi, size_t half)
{
    for (size_t j = 0; j < half; j++) gr_fold_row(out + MK_GR * j, a + MK_GR * j, a + MK_GR * (half + j), xi);
}

/* One row of each half, components a, a', w, w', of which NULL stands for zero. */
static void halves_add(uint64_t *low, uint64_t *slope, const uint64_t *const c[4], size_t l, size_t h)
{
    uint64_t v[4][MK_GR], d[4][MK_GR];
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < MK_GR; i++) {
            v[k][i] = c[k] ? c[k][MK_GR * l + i] : 0;
            d[k][i] = c[k] ? c[k][MK_GR * h + i] - v[k][i] : 0;
        }
    gr_mul_add(low, v[0], v[2]);
    gr_mul_add(low, v[1], v[2]);
    gr_mul_add(low, v[0], v[3]);
    gr_mul_add(slope, d[0], d[2]);
    gr_mul_add(slope, d[1], d[2]);
    gr_mul_add(slope, d[0], d[3]);
}

void mk_gr_halves_ref(uint64_t *restrict out, const uint64_t *a0, const uint64_t *a1, const uint64_t *w0,
                      const uint64_t *w1, size_t half)
{
    const uint64_t *const c[4] = {a0, a1, w0, w1};
    uint64_t low[2 * MK_GR] = {0}, slope[2 * MK_GR] = {0};
    for (size_t j = 0; j < half; j++) halves_add(low, slope, c, j, half + j);
    gr_reduce(out, low);
    gr_reduce(out + MK_GR, slope);
}

void mk_gr_fold_block_ref(uint64_t *restrict out, uint64_t *a0, uint64_t *a1, uint64_t *w0, uint64_t *w1,
                          const uint64_t *b0, const uint64_t *b1, const uint64_t *v0, const uint64_t *v1, uint64_t xi,
                          size_t here, size_t there)
{
    uint64_t *const c[4] = {a0, a1, w0, w1};
    const uint64_t *const more[4] = {b0, b1, v0, v1};
    size_t rows = here + there + (here + there) % 2;
    for (int k = 0; k < 4; k++) {
        if (!c[k]) continue;
        for (size_t j = 0; j < here; j++) gr_fold_row(c[k] + MK_GR * j, c[k] + MK_GR * j, c[k] + MK_GR * (here + j), xi);
        memset(c[k] + MK_GR * here, 0, MK_GR * (rows - here) * sizeof *out);
        for (size_t j = 0; more[k] && j < there; j++)
            gr_fold_row(c[k] + MK_GR * (here + j), more[k] + MK_GR * j, more[k] + MK_GR * (there + j), xi);
    }
    mk_gr_halves_ref(out, a0, a1, w0, w1, rows / 2);
}

void mk_gr_scale01_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t n)
{
    uint64_t one = ct_one();
    for (size_t j = 0; j < n; j++)
        for (int i = 0; i < MK_GR; i++) out[MK_GR * j + i] = x[j] & ct_mask(r[j], i, one);
}

/* sum += x r for a word x and a 01 element r. */
static void add_times01(uint64_t *sum, uint64_t x, uint64_t r)
{
    uint64_t one = ct_one();
    for (int t = 0; t < MK_GR; t++) sum[t] += x & ct_mask(r, t, one);
}

void mk_gr_combine_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    memset(out, 0, MK_GR * m * sizeof *out);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) add_times01(out + MK_GR * i, x[i * n + j], r[j]);
}

void mk_gr_combine32_ref(uint64_t *restrict out, const uint32_t *x, const uint64_t *r, size_t m, size_t n)
{
    memset(out, 0, MK_GR * m * sizeof *out);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) add_times01(out + MK_GR * i, x[i * n + j], r[j]);
}

void mk_gr_combine_cols_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    memset(out, 0, MK_GR * n * sizeof *out);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) add_times01(out + MK_GR * j, x[i * n + j], r[i]);
}

static void take_gr(uint64_t *out, const uint64_t t[4], const uint64_t *r)
{
    add_times01(out, t[0] * (t[2] + t[3]) + t[1] * t[2], *r);
}

void mk_gr_cross_ref(uint64_t *restrict out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0,
                     const uint64_t *y1, const uint64_t *r, size_t rows, size_t n)
{
    const uint64_t *const from[4] = {x0, x1, y0, y1};
    uint64_t node[4 * MK_ROWS], room[4 * MK_ROWS];
    memset(out, 0, cross_count(rows) * MK_GR * sizeof *out);
    for (size_t g = 0; g < n; g++) {
        cross_column(node, from, rows, g);
        cross_terms(out, MK_GR, node, rows, rows, 0, 0, room, take_gr, r + g);
    }
}

/* Row i of the one-hots, and its bits, which are n words apart. */
static void hot_row(uint64_t *a, uint64_t *w, uint64_t *columns, const uint64_t *e, const uint64_t *b, const uint64_t *q, uint64_t r, size_t n, size_t size, size_t bits)
{
    uint64_t index[MK_GR] = {0}, one = ct_one();
    for (size_t t = 0; t < bits; t++) index[t] = b[t * n];
    mk_gr_mul01_ref(a, index, &r, 1);
    mk_gr_combine_ref(w, e, q, 1, size);
    for (size_t j = 0; j < size; j++)
        for (unsigned t = 0; t < MK_GR; t++) columns[MK_GR * j + t] += e[j] & ct_mask(r, t, one);
}

#define HOT(name, entry)                                                                                               \
    void name(uint64_t *restrict a, uint64_t *restrict w, uint64_t *restrict columns, const entry *e,                  \
              const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits)             \
    {                                                                                                                  \
        memset(columns, 0, size * MK_GR * sizeof *columns);                                                            \
        for (size_t i = 0; i < n; i++) {                                                                               \
            uint64_t row[MK_ENTRIES];                                                                                  \
            for (size_t j = 0; j < size; j++) row[j] = e[size * i + j];                                                \
            hot_row(a + MK_GR * i, w + MK_GR * i, columns, row, b + i, q, r[i], n, size, bits);                        \
        }                                                                                                              \
    }
HOT(mk_gr_hot_ref, uint64_t)
HOT(mk_gr_half_hot_ref, uint16_t)
#undef HOT

/* ---- the local halves of online operations ---- */

#include "online.h"

/* ---- one-hots modulo 2^8 ---- */

#include "gr8.h"
