/* Claims of one-hots modulo 2^8: GR(2^8, 48), the Galois ring of kernels.h modulo 2^8. Included by each level, with MK.
 * Elements stand in groups of MK_GROUP lanes, coefficient by coefficient, (48, MK_GROUP) bytes a group: so they are added,
 * multiplied by public elements and by one another lane by lane, and nothing is ever turned around. */
#include <string.h>

typedef uint8_t group __attribute__((vector_size(MK_GROUP)));
enum { QUAD8 = 4, SUBSETS8 = 1 << QUAD8 };
#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* A row of lanes in memory, wherever it lies. */
typedef uint8_t lanes_at __attribute__((vector_size(MK_GROUP), aligned(1), may_alias));
#define AT(p) (*(lanes_at *)(p))
#define FROM(p) (*(const lanes_at *)(p))

/* The element that t, of up to 95 coefficients, is. */
static inline void group_reduce(uint8_t *out, group *t)
{
    for (size_t i = 2 * MK_GR - 2; i >= MK_GR; i--) {
        t[i - MK_GR] -= t[i];
        t[i - MK_GR + 2] -= t[i];
        t[i - MK_GR + 3] -= t[i];
        t[i - MK_GR + 5] -= t[i];
    }
    for (size_t i = 0; i < MK_GR; i++) AT(out + MK_GROUP * i) = t[i];
}

/* Which lanes have a bit set, as bytes 0 or 255. */
static inline void group_where(group *out, uint64_t bits)
{
    group v, bit;
    for (unsigned l = 0; l < MK_GROUP; l++) {
        v[l] = (uint8_t)(bits >> (l & 56));
        bit[l] = (uint8_t)(1 << (l & 7));
    }
    *out = (group)((v & bit) == bit);
}

/* to[j] lane l = from[l][j] for `size` bytes of each of `rows` <= MK_GROUP rows; other lanes are 0. */
static void group_turn(uint8_t *restrict to, const uint8_t *from, size_t rows, size_t size)
{
    size_t whole = rows / 8 * 8, wide = size / 8 * 8;
    if (rows < MK_GROUP) memset(to, 0, MK_GROUP * size);
    for (size_t l = 0; l < whole; l += 8)
        for (size_t j = 0; j < wide; j += 8) {
            uint64_t v[8], swap;
            for (size_t k = 0; k < 8; k++) memcpy(v + k, from + (l + k) * size + j, 8);
            for (size_t k = 0; k < 4; k++) {
                swap = (v[k] >> 32 ^ v[k + 4]) & 0xffffffffu;
                v[k + 4] ^= swap, v[k] ^= swap << 32;
            }
            for (size_t k = 0; k < 8; k = k % 4 == 1 ? k + 3 : k + 1) {
                swap = (v[k] >> 16 ^ v[k + 2]) & 0x0000ffff0000ffffu;
                v[k + 2] ^= swap, v[k] ^= swap << 16;
            }
            for (size_t k = 0; k < 8; k += 2) {
                swap = (v[k] >> 8 ^ v[k + 1]) & 0x00ff00ff00ff00ffu;
                v[k + 1] ^= swap, v[k] ^= swap << 8;
            }
            for (size_t k = 0; k < 8; k++) memcpy(to + (j + k) * MK_GROUP + l, v + k, 8);
        }
    for (size_t l = 0; l < rows; l++)
        for (size_t j = l < whole ? wide : 0; j < size; j++) to[j * MK_GROUP + l] = from[l * size + j];
}

/* s += sum over rows l < count of lanes, `apart` bytes apart, times public elements, which planes of bits tell: those of
 * coefficient c are at planes + c * words. Rows are added by their subsets of QUAD8, as bits choose. */
static void group_combine(group *s, const uint8_t *rows, size_t apart, size_t count, const uint64_t *planes, size_t words)
{
    for (size_t l = 0; l < count; l += QUAD8, rows += QUAD8 * apart) {
        group sums[SUBSETS8];
        sums[0] = (group){0};
        for (size_t k = 0; k < QUAD8 && l + k < count; k++)
            for (size_t old = 0; old < (size_t)1 << k; old++) sums[old | (size_t)1 << k] = sums[old] + FROM(rows + k * apart);
        UNROLL for (size_t c = 0; c < MK_GR; c++) s[c] += sums[planes[c * words + l / 64] >> l % 64 & (SUBSETS8 - 1)];
    }
}

void MK(mk_gr8_hot)(uint8_t *restrict a, uint8_t *restrict w, uint8_t *restrict columns, const uint8_t *e,
                    const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits)
{
    uint8_t turned[MK_ENTRIES * MK_GROUP] __attribute__((aligned(64)));
    uint64_t entries[MK_ENTRIES / 64 * MK_GR], planes[MK_GR];
    group sum[MK_ENTRIES / MK_GROUP][MK_GR] = {{{0}}};
    MK(mk_bits_slice)(entries, q, size, MK_GR);
    for (size_t i = 0; i < n; i += MK_GROUP, a += MK_GR * MK_GROUP, w += MK_GR * MK_GROUP) {
        size_t count = n - i < MK_GROUP ? n - i : MK_GROUP;
        group t[2 * MK_GR] = {{0}}, s[MK_GR] = {{0}}, index[MK_GR] = {{0}};
        MK(mk_bits_slice)(planes, r + i, count, MK_GR);
        for (size_t k = 0; k < bits; k++)
            for (size_t l = 0; l < count; l++) index[k][l] = (uint8_t)b[k * n + i + l];
        for (size_t c = 0; c < MK_GR; c++) {
            group mine;
            group_where(&mine, planes[c]);
            for (size_t k = 0; k < bits; k++) t[c + k] += index[k] & mine;
        }
        group_reduce(a, t);
        group_turn(turned, e + i * size, count, size);
        group_combine(s, turned, MK_GROUP, size, entries, (size + 63) / 64);
        for (size_t c = 0; c < MK_GR; c++) AT(w + MK_GROUP * c) = s[c];
        for (size_t j = 0; j < size; j += MK_GROUP) {
            const uint8_t *from = e + i * size + j;
            size_t apart = size;
            if (size - j < MK_GROUP) { /* a row of few entries is not as long as lanes are */
                memset(turned, 0, MK_GROUP * MK_GROUP);
                for (size_t l = 0; l < count; l++) memcpy(turned + MK_GROUP * l, from + l * size, size - j);
                from = turned, apart = MK_GROUP;
            }
            group_combine(sum[j / MK_GROUP], from, apart, count, planes, 1);
        }
    }
    for (size_t c = 0; c < MK_GR; c++)
        for (size_t j = 0; j < size; j++) columns[c * size + j] = sum[j / MK_GROUP][c][j % MK_GROUP];
}

void MK(mk_gr8_fold)(uint8_t *restrict out, const uint8_t *a, uint64_t xi, size_t half)
{
    const size_t one = MK_GR * MK_GROUP;
    for (size_t g = 0; g < half; g++, a += one, out += one) {
        group t[2 * MK_GR] = {{0}}, d[MK_GR];
        for (size_t i = 0; i < MK_GR; i++) d[i] = FROM(a + half * one + MK_GROUP * i) - FROM(a + MK_GROUP * i);
        for (unsigned s = 0; s < MK_GR; s++) {
            if (!(xi >> s & 1)) continue; /* xi is public */
            for (size_t i = 0; i < MK_GR; i++) t[s + i] += d[i];
        }
        group_reduce(out, t);
        for (size_t i = 0; i < MK_GR; i++) AT(out + MK_GROUP * i) += FROM(a + MK_GROUP * i);
    }
}

/* Bytes are multiplied as the lower halves of 16 bits, those at odd places shifted down: of what comes out the lowest 8
 * bits count. A block of sums stays in registers, over all groups. */
#ifdef LANES
enum { BYTES8 = 8 * LANES, LEFT8 = LANES == 8 ? 6 : 3, RIGHT8 = LANES == 8 ? 2 : 1 };
#else
#define LANES 2
enum { BYTES8 = 16, LEFT8 = 3, RIGHT8 = 1 };
#endif
typedef uint16_t pairs __attribute__((vector_size(8 * LANES)));
typedef uint16_t pairs_at __attribute__((vector_size(8 * LANES), aligned(1), may_alias));

void MK(mk_gr8_inner)(uint64_t *restrict out, const uint8_t *a, const uint8_t *b, size_t groups)
{
    uint64_t t[2 * MK_GR] = {0};
    const size_t one = MK_GR * MK_GROUP;
    for (size_t i = 0; i < MK_GR; i += LEFT8)
        for (size_t j = 0; j < MK_GR; j += RIGHT8) {
            pairs sum[LEFT8][RIGHT8] = {{{0}}};
            for (size_t g = 0; g < groups; g++)
                for (size_t l = 0; l < MK_GROUP; l += BYTES8) {
                    pairs x[LEFT8], y[RIGHT8];
                    UNROLL for (size_t k = 0; k < LEFT8; k++) x[k] = *(const pairs_at *)(a + g * one + (i + k) * MK_GROUP + l);
                    UNROLL for (size_t m = 0; m < RIGHT8; m++) y[m] = *(const pairs_at *)(b + g * one + (j + m) * MK_GROUP + l);
                    UNROLL for (size_t k = 0; k < LEFT8; k++)
                        UNROLL for (size_t m = 0; m < RIGHT8; m++) sum[k][m] += x[k] * y[m] + (x[k] >> 8) * (y[m] >> 8);
                }
            UNROLL for (size_t k = 0; k < LEFT8; k++)
                UNROLL for (size_t m = 0; m < RIGHT8; m++)
                    for (size_t l = 0; l < BYTES8 / 2; l++) t[i + k + j + m] += sum[k][m][l];
        }
    for (size_t i = 2 * MK_GR - 2; i >= MK_GR; i--) {
        t[i - MK_GR] -= t[i];
        t[i - MK_GR + 2] -= t[i];
        t[i - MK_GR + 3] -= t[i];
        t[i - MK_GR + 5] -= t[i];
    }
    for (size_t i = 0; i < MK_GR; i++) out[i] = t[i] & 255;
}
