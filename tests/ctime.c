/* Constant time, two ways; test_ctime.py compiles and runs this.
 *
 *   ctime taint LEVEL NAME   under valgrind: the secrets of kernel NAME are marked undefined, so that memcheck
 *                            reports every branch and every address that depends on them.
 *   ctime time LEVEL NAME    the kernel runs on secrets all zero or random, at random; prints Welch's t of the two
 *                            classes of cycle counts (Reparaz, Balasch, Verbauwhede, "Dude, is my code constant
 *                            time?", DATE 2017).
 *   ctime list               the names. Those that begin with leaky_ are controls that must be caught. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/memcheck.h>
#include <x86intrin.h>

#include "kernels.h"

/* No multiple of any vector width, above one block of every kernel. */
enum { N = 133, PACKED = (N + 63) / 64, SIZE = 128, DEPTH = 9, GR = 48, WORDS = 1 << 15 };

static uint64_t secret[WORDS], more[WORDS], public[WORDS], out[WORDS];

/* ---- controls ---- */

static void leaky_branch(void)
{
    out[0] = 0;
    for (size_t i = 0; i < N; i++)
        if (secret[i] & 1) {
            out[0] += public[i];
            __asm__ __volatile__("" : : : "memory"); /* keeps it a branch */
        }
}

static void leaky_index(void)
{
    out[0] = 0;
    for (size_t i = 0; i < N; i++) out[0] += public[secret[i] % 4096];
}

static void leaky_compare(void)
{
    const volatile uint8_t *a = (uint8_t *)secret, *b = (uint8_t *)more;
    size_t i = 0;
    while (i < 8 * N && a[i] == b[i]) i++;
    out[0] = i;
}

/* ---- kernels: secrets in `secret` and `more`, the rest in `public` ---- */

static void prg(void)
{
    mk_prg_aes((uint8_t *)out, 16 * N + 3, (uint8_t *)secret, 5, 7);
}

static void matmul_row(void)
{
    mk_ring_matmul(out, secret, more, 0, 1, 1, 19, N, 0);
}

static void matmul_few(void)
{
    mk_ring_matmul(out, secret, more, 0, 1, 3, 19, N, 0);
}

static void matmul_many(void)
{
    mk_ring_matmul(out, secret, more, 17 * 29, 2, 11, 17, 29, 0);
}

static void matmul_nt(void)
{
    mk_ring_matmul_nt(out, secret, more, 17 * 13 + 5, 2, 3, 17, 13, 0);
}

static void matmul_nt_many(void)
{
    mk_ring_matmul_nt(out, secret, more, 0, 1, 11, 17, 29, 0);
}

static void matmul32_row(void)
{
    mk_ring32_matmul((uint32_t *)out, (uint32_t *)secret, (uint32_t *)more, 1, 19, N, 0);
}

static void matmul32_few(void)
{
    mk_ring32_matmul((uint32_t *)out, (uint32_t *)secret, (uint32_t *)more, 3, 19, N, 0);
}

static void matmul32_many(void)
{
    mk_ring32_matmul((uint32_t *)out, (uint32_t *)secret, (uint32_t *)more, 19, 135, 29, 1);
}

static void rss_mul(void)
{
    mk_ring_rss_mul(out, secret, more, secret + 2 * N, N);
}

static void rss_and(void)
{
    mk_bits_rss_and(out, secret, more, secret + 2 * N, N);
}

static void bits_slice(void)
{
    mk_bits_slice(out, secret, N, 64);
}

static void bits_unslice(void)
{
    mk_bits_unslice(out, secret, N, 61);
}

static void bytes_pack(void)
{
    mk_bytes_pack(out, secret, N, 5);
}

static void bytes_unpack(void)
{
    mk_bytes_unpack(out, secret, N, 5);
}

static void bits_to_ring(void)
{
    mk_bits_to_ring(out, secret, 2, N);
}

static void ring_lsb(void)
{
    mk_ring_lsb(out, secret, 2, N);
}

static const uint64_t items[] = {9, 16, 0, 61, N - 9, 20, 4, 60};

static void ring_trunc_mask(void)
{
    mk_ring_trunc_mask(out, secret, N, more, N, public, items, 2, 2);
}

static void ring_trunc(void)
{
    mk_ring_trunc(out, secret, N, more, 3 * N, public, public + 2, items, 2, 2);
}

static void ring_trunc_if(void)
{
    mk_ring_trunc_if(out, secret, N, secret + 2 * N, N, more, 3 * N, more + 6 * N, 4 * N, public, public + 2, public + 9,
                     items, 2, 2);
}

static void ring_norm(void)
{
    mk_ring_norm(out, out + 4 * N, secret, 2 * N, secret + 4 * N, 6 * N, more, 6 * N, more + 12 * N, 2, public,
                 public + 2, 2, 2, N, 20, 4);
}

static void ring_drop(void)
{
    static const uint64_t low[] = {0, 5, 40};
    mk_ring_drop(out, secret, N, public, low, 2, 3, N, 20);
}

static void ring_pieces(void)
{
    mk_ring_pieces(out, secret, 7 * DEPTH * SIZE, public, public + 7, 2, 1, 7, SIZE, DEPTH - 1, 1, 12);
}

static void ring_choose(void)
{
    static const uint64_t drops[] = {16, 0, 20, 4, 27, 11};
    mk_ring_choose(out, secret, 6 * 9, more, 40 * 9, public, public + 1, drops, 2, 9, 3);
}

static void ring_wave(void)
{
    static const double terms[] = {1, 0.5, 0, 0.5, 3e5, 7e4}, circle[] = {-0.5, 0.25, 1, -1, 2, 3};
    mk_ring_wave(out, secret, 4 * N, public, public + N, terms, circle, 2, 2, N, 2, 26);
}

static void ring_decay(void)
{
    static const double turned[] = {1e5, 7e4, 3e3, 1e6, 1e5, 7e4, 3e3, 1e6}, exponential[] = {0.5, 1, 1};
    mk_ring_decay(out, secret, 4 * N, public, turned, exponential, 2, 0x1p-13, 0.5, 2, N, 4, 13);
}

static void bits_mask(void)
{
    mk_bits_mask(out, secret, PACKED, more, N, 2, N);
}

static void ring_unmask(void)
{
    mk_ring_unmask(out, secret, N, public, public + 2, 2, N);
}

static void ring_pick(void)
{
    mk_ring_pick(out, secret, 11 * N, more, public, public + 2 * N, 2, N, 2, 2);
}

static void bits_at_most(void)
{
    static const uint64_t sizes[] = {3, 4};
    mk_bits_at_most(out, secret, 24 * PACKED, PACKED, sizes, public, 2, 2, 2, N);
}

static void bits_products(void)
{
    static const uint64_t plan[] = {3, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 1, 2, 2};
    mk_bits_products(out, secret, 7 * 19, 19, public, public + 2, plan, 2, 2, 19);
}

static void ring_rotate(void)
{
    mk_ring_rotate(out, secret, public, 11, SIZE);
}

static void half_rotate(void)
{
    mk_half_rotate((uint16_t *)out, (uint16_t *)secret, public, 11, SIZE);
}

static void byte_rotate(void)
{
    mk_byte_rotate((uint8_t *)out, (uint8_t *)secret, public, 11, SIZE);
}

static void bits_pick(void)
{
    static uint64_t rows[N];
    for (size_t i = 0; i < N; i++) rows[i] = public[i] % SIZE;
    mk_bits_pick(out, secret, rows, N);
}

static void gf_mul(void)
{
    mk_gf_mul(out, secret, more, N);
}

static void gf_scale(void)
{
    mk_gf_scale(out, secret, more[0], N);
}

static void gf_inner(void)
{
    mk_gf_inner(out, secret, more, N);
}

static void gf_fold(void)
{
    mk_gf_fold(out, secret, more[0], N);
}

static void gf_cross(void)
{
    mk_gf_cross(out, secret, secret + 24, more, more + 24, public, 8, 3);
}

static void gf_combine(void)
{
    mk_gf_combine(out, secret, public, 8, 3);
}

static void gf_blend(void)
{
    mk_gf_blend(out, secret, public, 8, 3);
}

static void ring_double_part(void)
{
    mk_ring_double_part(out, secret, 7 * 16, more, 7, 7, 16, 8);
}

static void ring_double(void)
{
    memcpy(out, secret, 7 * 16 * sizeof *out);
    mk_ring_double(out, more, 7, 16, 8);
}

static void half_double(void)
{
    memcpy(out, secret, 7 * 16 * sizeof *out);
    mk_half_double_part((uint16_t *)out, (uint16_t *)secret, 7 * 16, more, 7, 7, 16, 8);
    mk_half_double((uint16_t *)out, (uint16_t *)more, 7, 16, 8);
}

static void byte_double(void)
{
    memcpy(out, secret, 7 * 16 * sizeof *out);
    mk_byte_double_part((uint8_t *)out, (uint8_t *)secret, 7 * 16, more, 7, 7, 16, 8);
    mk_byte_double((uint8_t *)out, (uint8_t *)more, 7, 16, 8);
}

static void gr_inner(void)
{
    mk_gr_inner(out, secret, more, 5);
}

static void gr_mul01(void)
{
    mk_gr_mul01(out, secret, public, 5);
}

static void gr_fold(void)
{
    mk_gr_fold(out, secret, public[0], 5);
}

static void gr_scale01(void)
{
    mk_gr_scale01(out, secret, more, 5);
}

static void gr_combine(void)
{
    mk_gr_combine(out, secret, public, 35, 9);
}

static void gr_combine32(void)
{
    mk_gr_combine32(out, (uint32_t *)secret, public, 35, 9);
}

static void gr_hot(void)
{
    mk_gr_hot(out, out + 19 * GR, out + 38 * GR, secret, more, public, public + 64, 19, 35, 5);
}

static void gr_half_hot(void)
{
    mk_gr_half_hot(out, out + 19 * GR, out + 38 * GR, (uint16_t *)secret, more, public, public + 64, 19, 35, 5);
}

static void gr8_hot(void)
{
    uint8_t *o = (uint8_t *)out, *e = (uint8_t *)secret;
    mk_gr8_hot(o, o + 2 * GR * MK_GROUP, o + 4 * GR * MK_GROUP, e, more, public, public + 64, 19, 35, 5);
    mk_gr8_hot(o, o + 2 * GR * MK_GROUP, o + 4 * GR * MK_GROUP, e, more, public, public + 192, 85, 192, 5);
}

static void gr8_fold(void)
{
    mk_gr8_fold((uint8_t *)out, (uint8_t *)secret, public[0], 2);
}

static void gr8_inner(void)
{
    mk_gr8_inner(out, (uint8_t *)secret, (uint8_t *)more, 3);
}

static void gr_combine_cols(void)
{
    mk_gr_combine_cols(out, secret, public, 9, 35);
}

static void gr_cross(void)
{
    mk_gr_cross(out, secret, secret + 24, more, more + 24, public, 8, 3);
    mk_gr_cross(out, secret, NULL, more, NULL, public, 8, 32);
}

static void gr_halves(void)
{
    mk_gr_halves(out, secret, secret + 2 * GR, more, more + 2 * GR, 1);
    mk_gr_halves(out, secret, NULL, more, more + 2 * GR, 1);
}

static void gr_fold_block(void)
{
    uint64_t *w = out + 8 * GR;
    memcpy(out + 2 * GR, secret, 4 * GR * sizeof *out);
    memcpy(w, secret, 4 * GR * sizeof *out);
    mk_gr_fold_block(out, out + 2 * GR, NULL, w, NULL, more, NULL, more + 2 * GR, NULL, public[0], 2, 1);
}

static void bytes_wipe(void)
{
    memcpy(out, secret, 8 * N);
    mk_bytes_wipe((uint8_t *)out, 8 * N);
}

#define ALL(X)                                                                                                         \
    X(leaky_branch)                                                                                                    \
    X(leaky_index)                                                                                                     \
    X(leaky_compare)                                                                                                   \
    X(prg)                                                                                                             \
    X(matmul_row)                                                                                                      \
    X(matmul_few)                                                                                                      \
    X(matmul_many)                                                                                                     \
    X(matmul_nt)                                                                                                       \
    X(matmul_nt_many)                                                                                                  \
    X(matmul32_row)                                                                                                    \
    X(matmul32_few)                                                                                                    \
    X(matmul32_many)                                                                                                   \
    X(rss_mul)                                                                                                         \
    X(rss_and)                                                                                                         \
    X(bits_slice)                                                                                                      \
    X(bits_unslice)                                                                                                    \
    X(bytes_pack)                                                                                                      \
    X(bytes_unpack)                                                                                                    \
    X(bits_to_ring)                                                                                                    \
    X(ring_lsb)                                                                                                        \
    X(ring_rotate)                                                                                                     \
    X(half_rotate)                                                                                                     \
    X(byte_rotate)                                                                                                     \
    X(bits_pick)                                                                                                       \
    X(ring_trunc_mask)                                                                                                 \
    X(ring_trunc)                                                                                                      \
    X(ring_trunc_if)                                                                                                   \
    X(ring_norm)                                                                                                       \
    X(ring_drop)                                                                                                       \
    X(ring_pieces)                                                                                                     \
    X(ring_choose)                                                                                                     \
    X(ring_wave)                                                                                                       \
    X(ring_decay)                                                                                                      \
    X(bits_mask)                                                                                                       \
    X(ring_unmask)                                                                                                     \
    X(ring_pick)                                                                                                       \
    X(bits_at_most)                                                                                                    \
    X(bits_products)                                                                                                   \
    X(gf_mul)                                                                                                          \
    X(gf_scale)                                                                                                        \
    X(gf_inner)                                                                                                        \
    X(gf_fold)                                                                                                         \
    X(gf_cross)                                                                                                        \
    X(gf_combine)                                                                                                      \
    X(gf_blend)                                                                                                        \
    X(ring_double_part)                                                                                                \
    X(ring_double)                                                                                                     \
    X(half_double)                                                                                                     \
    X(byte_double)                                                                                                     \
    X(gr_inner)                                                                                                        \
    X(gr_mul01)                                                                                                        \
    X(gr_fold)                                                                                                         \
    X(gr_scale01)                                                                                                      \
    X(gr_combine)                                                                                                      \
    X(gr_combine32)                                                                                                    \
    X(gr_hot)                                                                                                          \
    X(gr_half_hot)                                                                                                     \
    X(gr8_hot)                                                                                                         \
    X(gr8_fold)                                                                                                        \
    X(gr8_inner)                                                                                                       \
    X(gr_combine_cols)                                                                                                 \
    X(gr_cross)                                                                                                        \
    X(gr_halves)                                                                                                       \
    X(gr_fold_block)                                                                                                   \
    X(bytes_wipe)

static const struct {
    const char *name;
    void (*run)(void);
} all[] = {
#define ENTRY(name) {#name, name},
    ALL(ENTRY)
#undef ENTRY
};

/* Inputs need no strength, only variety: Marsaglia's xorshift. */
static uint64_t state = 88172645463325252u;

static uint64_t random_word(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static void fill(uint64_t *to)
{
    for (size_t i = 0; i < WORDS; i++) to[i] = random_word();
}

static int taint(void (*run)(void))
{
    fill(secret), fill(more), fill(public);
    (void)VALGRIND_MAKE_MEM_UNDEFINED(secret, sizeof secret);
    (void)VALGRIND_MAKE_MEM_UNDEFINED(more, sizeof more);
    run();
    (void)VALGRIND_MAKE_MEM_DEFINED(out, sizeof out);
    return 0;
}

enum { ROUNDS = 20000, USED = 2048 }; /* words of secrets that vary: more than any kernel above reads, but in cache */

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static double welch(const uint64_t *cycles, const uint8_t *class, uint64_t limit)
{
    double count[2] = {0}, mean[2] = {0}, square[2] = {0};
    for (size_t i = 0; i < ROUNDS; i++) {
        if (cycles[i] > limit) continue;
        int c = class[i];
        double delta = (double)cycles[i] - mean[c];
        count[c]++;
        mean[c] += delta / count[c];
        square[c] += delta * ((double)cycles[i] - mean[c]);
    }
    double spread = square[0] / (count[0] - 1) / count[0] + square[1] / (count[1] - 1) / count[1];
    return (mean[0] - mean[1]) / sqrt(spread + 1e-12);
}

static int measure(void (*run)(void))
{
    static uint64_t cycles[ROUNDS], sorted[ROUNDS];
    static uint8_t class[ROUNDS];
    unsigned aux;
    fill(public);
    for (size_t i = 0; i < ROUNDS; i++) {
        class[i] = random_word() >> 40 & 1;
        /* Both classes do the same to the same addresses, lest they leave the caches in different states. */
        uint64_t mask = 0 - (uint64_t)class[i];
        for (size_t j = 0; j < USED; j++) secret[j] = random_word() & mask, more[j] = random_word() & mask;
        _mm_mfence();
        uint64_t start = __rdtscp(&aux);
        _mm_lfence();
        run();
        cycles[i] = __rdtscp(&aux) - start;
        _mm_lfence();
    }
    /* The slowest are interrupts, not the kernel: cut at several heights, keep the largest |t|. */
    memcpy(sorted, cycles, sizeof sorted);
    qsort(sorted, ROUNDS, sizeof *sorted, by_value);
    double worst = 0;
    for (int percent = 50; percent <= 90; percent += 20) {
        double t = fabs(welch(cycles, class, sorted[(size_t)ROUNDS * (size_t)percent / 100]));
        if (t > worst) worst = t;
    }
    printf("%.2f\n", worst);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) puts(all[i].name);
        return 0;
    }
    if (argc != 4 || mk_level_force(atoi(argv[2])) != 0) return 2;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(argv[3], all[i].name)) return strcmp(argv[1], "taint") ? measure(all[i].run) : taint(all[i].run);
    return 2;
}
