/* The kernels as formulas: portable, constant-time, meant to be read. avx2.c and avx512.c differ only in how. */
#include <string.h>

#include "ct.h"
#include "levels.h"

#define MK(name) name##_ref

/* ---- ChaCha20: D. J. Bernstein, "ChaCha, a variant of Salsa20" (2008); RFC 8439 section 2.1-2.3 ---- */

static uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint32_t rotl(uint32_t x, int r)
{
    return x << r | x >> (32 - r);
}

static void quarter(uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
    *a += *b, *d = rotl(*d ^ *a, 16);
    *c += *d, *b = rotl(*b ^ *c, 12);
    *a += *b, *d = rotl(*d ^ *a, 8);
    *c += *d, *b = rotl(*b ^ *c, 7);
}

void mk_prg_chacha20_ref(uint8_t *out, size_t n, const uint8_t *key, uint64_t stream, uint64_t block)
{
    uint32_t s[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}; /* "expand 32-byte k" */
    uint32_t x[16];
    uint8_t bytes[64];
    for (int i = 0; i < 8; i++) s[4 + i] = load32(key + 4 * i);
    s[14] = (uint32_t)stream, s[15] = (uint32_t)(stream >> 32);
    while (n > 0) {
        s[12] = (uint32_t)block, s[13] = (uint32_t)(block >> 32);
        memcpy(x, s, sizeof x);
        for (int i = 0; i < 10; i++) {
            for (int j = 0; j < 4; j++) quarter(&x[j], &x[4 + j], &x[8 + j], &x[12 + j]);
            for (int j = 0; j < 4; j++)
                quarter(&x[j], &x[4 + (j + 1) % 4], &x[8 + (j + 2) % 4], &x[12 + (j + 3) % 4]);
        }
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 4; j++) bytes[4 * i + j] = (uint8_t)((x[i] + s[i]) >> (8 * j));
        size_t take = n < 64 ? n : 64;
        memcpy(out, bytes, take);
        out += take, n -= take, block++;
    }
    ct_wipe(s, sizeof s);
    ct_wipe(x, sizeof x);
    ct_wipe(bytes, sizeof bytes);
}

/* ---- Z_2^64 ---- */

void mk_ring_matmul_ref(uint64_t *restrict c, const uint64_t *a, const uint64_t *b, size_t batch, size_t m, size_t k,
                        size_t n, int add)
{
    if (!add && batch * m * n > 0) memset(c, 0, batch * m * n * sizeof *c);
    for (; batch > 0; batch--, a += m * k, b += k * n, c += m * n)
        for (size_t i = 0; i < m; i++)
            for (size_t t = 0; t < k; t++)
                for (size_t j = 0; j < n; j++) c[i * n + j] += a[i * k + t] * b[t * n + j];
}

void mk_ring_matmul_nt_ref(uint64_t *restrict c, const uint64_t *a, const uint64_t *b, size_t batch, size_t m,
                           size_t k, size_t n, int add)
{
    for (; batch > 0; batch--, a += m * k, b += n * k, c += m * n)
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < n; j++) {
                uint64_t sum = add ? c[i * n + j] : 0;
                for (size_t t = 0; t < k; t++) sum += a[i * k + t] * b[j * k + t];
                c[i * n + j] = sum;
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

void mk_ring_double_part_ref(uint64_t *restrict out, const uint64_t *e, const uint64_t *b, size_t n, size_t size,
                             size_t have)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < have; j++) {
            uint64_t e0 = e[i * size + j], e1 = e[(n + i) * size + j];
            out[i * have + j] += e0 * (b[i] + b[n + i]) + e1 * b[i];
        }
}

void mk_ring_double_ref(uint64_t *restrict e, const uint64_t *high, size_t n, size_t size, size_t have)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < have; j++) {
            e[i * size + have + j] = high[i * have + j];
            e[i * size + j] -= high[i * have + j];
        }
}

void mk_ring_lookup_ref(uint64_t *restrict out, const uint64_t *e, size_t apart, const uint64_t *c,
                        const uint64_t *turned, size_t parts, size_t groups, size_t depth, size_t n, size_t size)
{
    for (size_t p = 0; p < parts; p++, e += apart, out += depth * groups * n)
        for (size_t g = 0; g < groups; g++)
            for (size_t i = g * n; i < (g + 1) * n; i++)
                for (size_t d = 0; d < depth; d++) {
                    /* table[(c - j) mod size] = turned[(j - c) mod size], one run from -c mod size */
                    const uint64_t *run = turned + 2 * size * (depth * g + d) + (0 - c[i]) % size;
                    uint64_t sum = 0;
                    for (size_t j = 0; j < size; j++) sum += run[j] * e[i * size + j];
                    out[d * groups * n + i] = sum;
                }
}

void mk_ring_rotate_ref(uint64_t *restrict out, const uint64_t *e, const uint64_t *c, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < size; j++) out[i * size + j] = e[i * size + (c[i] - j) % size];
}

void mk_half_rotate_ref(uint16_t *restrict out, const uint16_t *e, const uint64_t *c, size_t n, size_t size)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < size; j++) out[i * size + j] = e[i * size + (c[i] - j) % size];
}

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
    for (size_t c = 0; c < 4; c++) memcpy(node + c * rows, from[c] + g * rows, rows * sizeof *node);
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

void mk_gr_mul_ref(uint64_t *restrict out, const uint64_t *a, const uint64_t *b, size_t n)
{
    for (size_t j = 0; j < n; j++) {
        uint64_t p[2 * MK_GR] = {0};
        gr_mul_add(p, a + MK_GR * j, b + MK_GR * j);
        gr_reduce(out + MK_GR * j, p);
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

void mk_gr_fold_ref(uint64_t *restrict out, const uint64_t *a, uint64_t xi, size_t half)
{
    const uint64_t *b = a + MK_GR * half;
    for (size_t j = 0; j < half; j++) {
        uint64_t p[2 * MK_GR] = {0}, d[MK_GR];
        for (int i = 0; i < MK_GR; i++) {
            d[i] = b[MK_GR * j + i] - a[MK_GR * j + i];
            p[i] = a[MK_GR * j + i];
        }
        gr_mul01_add(p, d, xi);
        gr_reduce(out + MK_GR * j, p);
    }
}

void mk_gr_halves_ref(uint64_t *restrict out, const uint64_t *a0, const uint64_t *a1, const uint64_t *w0,
                      const uint64_t *w1, size_t half)
{
    uint64_t low[2 * MK_GR] = {0}, slope[2 * MK_GR] = {0};
    for (size_t j = 0; j < half; j++) {
        size_t l = MK_GR * j, h = MK_GR * (half + j);
        uint64_t both[MK_GR], a[MK_GR], d[MK_GR], u0[MK_GR], u1[MK_GR];
        for (int i = 0; i < MK_GR; i++) {
            both[i] = a0[l + i] + a1[l + i];
            a[i] = a0[h + i] - a0[l + i];
            d[i] = a[i] + a1[h + i] - a1[l + i];
            u0[i] = w0[h + i] - w0[l + i];
            u1[i] = w1[h + i] - w1[l + i];
        }
        gr_mul_add(low, both, w0 + l);
        gr_mul_add(low, a0 + l, w1 + l);
        gr_mul_add(slope, d, u0);
        gr_mul_add(slope, a, u1);
    }
    gr_reduce(out, low);
    gr_reduce(out + MK_GR, slope);
}

void mk_gr_scale_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *g, size_t n)
{
    for (size_t j = 0; j < n; j++)
        for (int i = 0; i < MK_GR; i++) out[MK_GR * j + i] = x[j] * g[MK_GR * j + i];
}

void mk_gr_scale01_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t n)
{
    uint64_t one = ct_one();
    for (size_t j = 0; j < n; j++)
        for (int i = 0; i < MK_GR; i++) out[MK_GR * j + i] = x[j] & ct_mask(r[j], i, one);
}

void mk_gr_combine_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    uint64_t one = ct_one();
    for (size_t i = 0; i < m; i++) {
        uint64_t sum[MK_GR] = {0};
        for (size_t j = 0; j < n; j++)
            for (int t = 0; t < MK_GR; t++) sum[t] += x[i * n + j] & ct_mask(r[j], t, one);
        memcpy(out + MK_GR * i, sum, sizeof sum);
    }
}

void mk_gr_combine_cols_ref(uint64_t *restrict out, const uint64_t *x, const uint64_t *r, size_t m, size_t n)
{
    uint64_t one = ct_one();
    for (size_t j = 0; j < n; j++) {
        uint64_t sum[MK_GR] = {0};
        for (size_t i = 0; i < m; i++)
            for (int t = 0; t < MK_GR; t++) sum[t] += x[i * n + j] & ct_mask(r[i], t, one);
        memcpy(out + MK_GR * j, sum, sizeof sum);
    }
}

static void take_gr(uint64_t *out, const uint64_t t[4], const uint64_t *r)
{
    uint64_t one = ct_one(), word = t[0] * (t[2] + t[3]) + t[1] * t[2];
    for (unsigned i = 0; i < MK_GR; i++) out[i] += word & ct_mask(*r, i, one);
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

/* ---- the local halves of online operations ---- */

#include "online.h"
