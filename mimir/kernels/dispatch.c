/* Which level runs: chosen once when the library loads, by what the processor and the operating system offer; and how a
 * long kernel is split over threads. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "ct.h"
#include "levels.h"
#include "pool.h"

struct table {
#define MK_FIELD(name) __typeof__(name) *name;
    MK_EACH(MK_FIELD)
#undef MK_FIELD
};

#define MK_AT_REF(name) name##_ref,
#define MK_AT_AVX2(name) name##_avx2,
#define MK_AT_AVX512(name) name##_avx512,
static struct table levels[] = {
    {MK_EACH(MK_AT_REF)},
#if MK_X86
    {MK_EACH(MK_AT_AVX2)},
    {MK_EACH(MK_AT_AVX512)},
#endif
};

/* __builtin_cpu_supports also asks whether the operating system saves the wide registers. */
static int best_level(void)
{
#if MK_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("aes"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("vpclmulqdq") || !__builtin_cpu_supports("vaes"))
        return 1;
    return 2;
#else
    return 0;
#endif
}

static _Atomic(const struct table *) active = &levels[0];

__attribute__((constructor)) static void choose(void)
{
#if MK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("vaes")) levels[1].mk_prg_aes = mk_prg_aes_vaes;
#endif
    atomic_store(&active, &levels[best_level()]);
}

int mk_level(void)
{
    return (int)(atomic_load(&active) - levels);
}

int mk_level_max(void)
{
    return best_level();
}

int mk_level_force(int level)
{
    if (level < 0 || level > best_level()) return -1;
    atomic_store(&active, &levels[level]);
    return 0;
}

#define MK_THUNK(name, parameters, arguments)                                                                          \
    void name parameters                                                                                               \
    {                                                                                                                  \
        atomic_load_explicit(&active, memory_order_relaxed)->name arguments;                                           \
    }

MK_THUNK(mk_ring_rss_mul, (uint64_t *out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha, size_t n),
         (out, x, y, alpha, n))
MK_THUNK(mk_bits_rss_and, (uint64_t *out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha, size_t n),
         (out, x, y, alpha, n))
MK_THUNK(mk_bits_slice, (uint64_t *planes, const uint64_t *x, size_t n, size_t nbits), (planes, x, n, nbits))
MK_THUNK(mk_bits_unslice, (uint64_t *x, const uint64_t *planes, size_t n, size_t nbits), (x, planes, n, nbits))
MK_THUNK(mk_bytes_pack, (uint64_t *words, const uint64_t *x, size_t n, size_t size), (words, x, n, size))
MK_THUNK(mk_bytes_unpack, (uint64_t *out, const uint64_t *words, size_t n, size_t size), (out, words, n, size))
MK_THUNK(mk_bits_to_ring, (uint64_t *out, const uint64_t *words, size_t rows, size_t n), (out, words, rows, n))
MK_THUNK(mk_ring_lsb, (uint64_t *words, const uint64_t *x, size_t rows, size_t n), (words, x, rows, n))
MK_THUNK(mk_bits_pick, (uint64_t *out, const uint64_t *planes, const uint64_t *row, size_t n),
         (out, planes, row, n))
MK_THUNK(mk_ring_trunc_mask,
         (uint64_t *out, const uint64_t *x, size_t x_apart, const uint64_t *r, size_t r_apart, const uint64_t *one,
          const uint64_t *items, size_t parts, size_t count),
         (out, x, x_apart, r, r_apart, one, items, parts, count))
MK_THUNK(mk_ring_trunc,
         (uint64_t *out, const uint64_t *base, size_t base_apart, const uint64_t *over, size_t over_apart, const uint64_t
          *one, const uint64_t *opened, const uint64_t *items, size_t parts, size_t count),
         (out, base, base_apart, over, over_apart, one, opened, items, parts, count))
MK_THUNK(mk_ring_trunc_if,
         (uint64_t *out, const uint64_t *ring, size_t ring_apart, const uint64_t *base, size_t base_apart, const
          uint64_t *over, size_t over_apart, const uint64_t *z, size_t z_apart, const uint64_t *one, const uint64_t
          *bits, const uint64_t *opened, const uint64_t *items, size_t parts, size_t count),
         (out, ring, ring_apart, base, base_apart, over, over_apart, z, z_apart, one, bits, opened, items, parts, count))
MK_THUNK(mk_ring_norm,
         (uint64_t *rows, uint64_t *squares, const uint64_t *base, size_t base_apart, const uint64_t *over, size_t
          over_apart, const uint64_t *both, size_t both_apart, const uint64_t *q, size_t q_apart, const uint64_t *one,
          const uint64_t *opened, size_t parts, size_t n, size_t width, unsigned f, unsigned bare),
         (rows, squares, base, base_apart, over, over_apart, both, both_apart, q, q_apart, one, opened, parts, n, width,
          f, bare))
MK_THUNK(mk_ring_drop,
         (uint64_t *out, const uint64_t *x, size_t x_apart, const uint64_t *one, const uint64_t *low, size_t parts,
          size_t pieces, size_t n, unsigned width),
         (out, x, x_apart, one, low, parts, pieces, n, width))
MK_THUNK(mk_ring_pieces,
         (uint64_t *out, const uint64_t *e, size_t apart, const uint64_t *opened, const uint64_t *turned, size_t parts,
          size_t groups, size_t n, size_t size, size_t degree, size_t flags, unsigned rest),
         (out, e, apart, opened, turned, parts, groups, n, size, degree, flags, rest))
MK_THUNK(mk_ring_choose,
         (uint64_t *out, const uint64_t *hot, size_t hot_apart, const uint64_t *z, size_t z_apart, const uint64_t *bits,
          const uint64_t *opened, const uint64_t *items, size_t parts, size_t n, size_t count),
         (out, hot, hot_apart, z, z_apart, bits, opened, items, parts, n, count))
MK_THUNK(mk_ring_wave,
         (uint64_t *out, const uint64_t *waves, size_t apart, const uint64_t *opened, const uint64_t *turns, const double
          *terms, const double *polynomials, size_t degree, size_t parts, size_t n, size_t count, unsigned bits),
         (out, waves, apart, opened, turns, terms, polynomials, degree, parts, n, count, bits))
MK_THUNK(mk_ring_decay,
         (uint64_t *out, const uint64_t *e, size_t apart, const uint64_t *opened, const double *turned, const double
          *polynomial, size_t degree, double factor, double offset, size_t parts, size_t n, size_t size, unsigned rest),
         (out, e, apart, opened, turned, polynomial, degree, factor, offset, parts, n, size, rest))
MK_THUNK(mk_bits_mask,
         (uint64_t *out, const uint64_t *bits, size_t bits_apart, const uint64_t *ring, size_t ring_apart, size_t
          parts, size_t n),
         (out, bits, bits_apart, ring, ring_apart, parts, n))
MK_THUNK(mk_ring_unmask,
         (uint64_t *out, const uint64_t *ring, size_t ring_apart, const uint64_t *one, const uint64_t *bits, size_t
          parts, size_t n),
         (out, ring, ring_apart, one, bits, parts, n))
MK_THUNK(mk_ring_pick,
         (uint64_t *out, const uint64_t *w, size_t apart, const uint64_t *one, const uint64_t *delta, const uint64_t
          *bits, size_t parts, size_t n, size_t width, unsigned flags),
         (out, w, apart, one, delta, bits, parts, n, width, flags))
MK_THUNK(mk_bits_at_most,
         (uint64_t *out, const uint64_t *planes, size_t apart, size_t row_apart, const uint64_t *sizes, const uint64_t
          *told, size_t parts, size_t digits, size_t count, size_t n),
         (out, planes, apart, row_apart, sizes, told, parts, digits, count, n))
MK_THUNK(mk_bits_products,
         (uint64_t *out, const uint64_t *planes, size_t apart, size_t row_apart, const uint64_t *one, const uint64_t
          *opened, const uint64_t *plan, size_t parts, size_t products, size_t n),
         (out, planes, apart, row_apart, one, opened, plan, parts, products, n))
MK_THUNK(mk_half_double_part,
         (uint16_t *out, const uint16_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n, size_t size, size_t have),
         (out, e, e_apart, b, b_apart, n, size, have))
MK_THUNK(mk_half_double, (uint16_t *e, const uint16_t *high, size_t n, size_t size, size_t have), (e, high, n, size, have))
MK_THUNK(mk_byte_double_part,
         (uint8_t *out, const uint8_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n, size_t size, size_t have),
         (out, e, e_apart, b, b_apart, n, size, have))
MK_THUNK(mk_byte_double, (uint8_t *e, const uint8_t *high, size_t n, size_t size, size_t have), (e, high, n, size, have))
MK_THUNK(mk_ring_rotate, (uint64_t *out, const uint64_t *e, const uint64_t *c, size_t n, size_t size),
         (out, e, c, n, size))
MK_THUNK(mk_half_rotate, (uint16_t *out, const uint16_t *e, const uint64_t *c, size_t n, size_t size),
         (out, e, c, n, size))
MK_THUNK(mk_byte_rotate, (uint8_t *out, const uint8_t *e, const uint64_t *c, size_t n, size_t size),
         (out, e, c, n, size))
MK_THUNK(mk_gf_mul, (uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n), (out, a, b, n))
MK_THUNK(mk_gf_scale, (uint64_t *out, const uint64_t *a, uint64_t s, size_t n), (out, a, s, n))
MK_THUNK(mk_gf_inner, (uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n), (out, a, b, n))
MK_THUNK(mk_gf_fold, (uint64_t *out, const uint64_t *a, uint64_t xi, size_t half), (out, a, xi, half))
MK_THUNK(mk_gf_cross,
         (uint64_t *out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0, const uint64_t *y1,
          const uint64_t *planes, size_t rows, size_t n),
         (out, x0, x1, y0, y1, planes, rows, n))
MK_THUNK(mk_gf_combine, (uint64_t *out, const uint64_t *x, const uint64_t *planes, size_t rows, size_t n),
         (out, x, planes, rows, n))
MK_THUNK(mk_gf_blend, (uint64_t *out, const uint64_t *x, const uint64_t *w, size_t rows, size_t n),
         (out, x, w, rows, n))
MK_THUNK(mk_gr_inner, (uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n), (out, a, b, n))
MK_THUNK(mk_gr_fold, (uint64_t *out, const uint64_t *a, uint64_t xi, size_t half), (out, a, xi, half))
MK_THUNK(mk_gr_halves,
         (uint64_t *out, const uint64_t *a0, const uint64_t *a1, const uint64_t *w0, const uint64_t *w1, size_t half),
         (out, a0, a1, w0, w1, half))
MK_THUNK(mk_gr_fold_block,
         (uint64_t *out, uint64_t *a0, uint64_t *a1, uint64_t *w0, uint64_t *w1, const uint64_t *b0, const uint64_t *b1,
          const uint64_t *v0, const uint64_t *v1, uint64_t xi, size_t here, size_t there),
         (out, a0, a1, w0, w1, b0, b1, v0, v1, xi, here, there))
MK_THUNK(mk_gr_scale01, (uint64_t *out, const uint64_t *x, const uint64_t *r, size_t n), (out, x, r, n))
MK_THUNK(mk_gr_combine_cols, (uint64_t *out, const uint64_t *x, const uint64_t *r, size_t m, size_t n),
         (out, x, r, m, n))
MK_THUNK(mk_gr_cross,
         (uint64_t *out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0, const uint64_t *y1,
          const uint64_t *r, size_t rows, size_t n),
         (out, x0, x1, y0, y1, r, rows, n))
MK_THUNK(mk_gr_hot,
         (uint64_t *a, uint64_t *w, uint64_t *columns, const uint64_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits),
         (a, w, columns, e, b, q, r, n, size, bits))
MK_THUNK(mk_gr_half_hot,
         (uint64_t *a, uint64_t *w, uint64_t *columns, const uint16_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits),
         (a, w, columns, e, b, q, r, n, size, bits))
MK_THUNK(mk_gr8_hot,
         (uint8_t *a, uint8_t *w, uint8_t *columns, const uint8_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits),
         (a, w, columns, e, b, q, r, n, size, bits))
MK_THUNK(mk_gr8_fold, (uint8_t *out, const uint8_t *a, uint64_t xi, size_t half), (out, a, xi, half))
MK_THUNK(mk_gr8_inner, (uint64_t *out, const uint8_t *a, const uint8_t *b, size_t groups), (out, a, b, groups))

/* ---- long kernels, which are split over threads ---- */

/* Defines a kernel of which `items` results, `grain` at a time, are made apart from one another. values are the
 * arguments as fields of a job; in `part` they are those of `j`, which makes `count` items from `first` on. */
#define MK_SPLIT(name, parameters, fields, values, items, grain, nanoseconds, part)                                    \
    struct name##_job {                                                                                                \
        __typeof__(name) *run;                                                                                         \
        fields                                                                                                         \
    };                                                                                                                 \
    static void name##_piece(const void *job, size_t first, size_t count)                                               \
    {                                                                                                                  \
        const struct name##_job *j = job;                                                                              \
        j->run part;                                                                                                   \
    }                                                                                                                  \
    void name parameters                                                                                               \
    {                                                                                                                  \
        const struct name##_job job = {atomic_load_explicit(&active, memory_order_relaxed)->name, values};             \
        mk_split(items, grain, nanoseconds, name##_piece, &job);                                                        \
    }
#define MK_GIVEN(...) __VA_ARGS__ /* one argument, commas and all */

MK_SPLIT(mk_prg_aes, (uint8_t *out, size_t n, const uint8_t *key, uint64_t stream, uint64_t block),
         MK_GIVEN(uint8_t *out; const uint8_t *key; uint64_t stream, block;), MK_GIVEN(out, key, stream, block),
         n, 4096, n / 8, (j->out + first, count, j->key, j->stream, j->block + first / 16))

MK_SPLIT(mk_ring_double_part,
         (uint64_t *out, const uint64_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n, size_t size,
          size_t have),
         MK_GIVEN(uint64_t *out; const uint64_t *e, *b; size_t e_apart, b_apart, size, have;),
         MK_GIVEN(out, e, b, e_apart, b_apart, size, have), n, 1, n * have,
         (j->out + j->have * first, j->e + j->size * first, j->e_apart, j->b + first, j->b_apart, count, j->size,
          j->have))

MK_SPLIT(mk_ring_double, (uint64_t *e, const uint64_t *high, size_t n, size_t size, size_t have),
         MK_GIVEN(uint64_t *e; const uint64_t *high; size_t size, have;), MK_GIVEN(e, high, size, have),
         n, 1, n * have, (j->e + j->size * first, j->high + j->have * first, count, j->size, j->have))

static void wipe_piece(const void *job, size_t first, size_t count)
{
    ct_wipe(*(uint8_t *const *)job + first, count);
}

void mk_bytes_wipe(uint8_t *out, size_t n)
{
    mk_split(n, 4096, n / 8, wipe_piece, &out);
}

/* Results of a combination: each piece chooses its subsets anew, which costs as much as some ten results. */
enum { COMBINED = 64 };

MK_SPLIT(mk_gr_combine, (uint64_t *out, const uint64_t *x, const uint64_t *r, size_t m, size_t n),
         MK_GIVEN(uint64_t *out; const uint64_t *x, *r; size_t n;), MK_GIVEN(out, x, r, n),
         m, COMBINED, 2 * m * n, (j->out + MK_GR * first, j->x + j->n * first, j->r, count, j->n))

MK_SPLIT(mk_gr_combine32, (uint64_t *out, const uint32_t *x, const uint64_t *r, size_t m, size_t n),
         MK_GIVEN(uint64_t *out; const uint32_t *x; const uint64_t *r; size_t n;), MK_GIVEN(out, x, r, n),
         m, COMBINED, 2 * m * n, (j->out + MK_GR * first, j->x + j->n * first, j->r, count, j->n))

MK_SPLIT(mk_gr_mul01, (uint64_t *out, const uint64_t *a, const uint64_t *r, size_t n),
         MK_GIVEN(uint64_t *out; const uint64_t *a, *r;), MK_GIVEN(out, a, r),
         n, 1, 200 * n, (j->out + MK_GR * first, j->a + MK_GR * first, j->r + first, count))

/* A product, and its numbers: words, or if run32 is there, of 32 bits. */
struct matrices {
    __typeof__(mk_ring_product) *run;
    __typeof__(mk_ring32_product) *run32;
    void *c;
    const void *a, *b;
    size_t apart, m, k, n;
};

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* `width` columns of m rows of the result, from numbers c, a and b of the matrices on; k of the products of each. */
static void run_part(const struct matrices *j, size_t c, size_t a, size_t b, size_t m, size_t k, size_t width, int add)
{
    if (j->run32)
        j->run32((uint32_t *)j->c + c, (const uint32_t *)j->a + a, (const uint32_t *)j->b + b, m, k, j->n, width, add);
    else j->run((uint64_t *)j->c + c, (const uint64_t *)j->a + a, (const uint64_t *)j->b + b, m, k, j->n, width, add);
}

/* One row times a matrix is bound by memory, which is read fastest in long runs: it is split by rows of b, DEPTH at a
 * time, and what part of the sum a piece makes is added to the row under a lock. BREADTH bytes of columns at a time, so
 * that such a part lies in the first-level cache. */
enum { DEPTH = 32, BREADTH = 1 << 14 };

struct row {
    struct matrices of;
    size_t columns, strips, depths; /* strips of so many columns of one product, units of DEPTH rows of each */
    pthread_mutex_t *adding;
};

static void row_piece(const void *job, size_t first, size_t count)
{
    const struct row *j = job;
    const struct matrices *of = &j->of;
    while (count > 0) {
        size_t at = first / j->depths / j->strips, column = j->columns * (first / j->depths % j->strips);
        size_t unit = first % j->depths, some = least(count, j->depths - unit), from = DEPTH * unit;
        size_t depth = least(of->k - from, DEPTH * some), width = least(of->n - column, j->columns);
        size_t c = at * of->n + column, a = at * of->k + from, b = at * of->apart + from * of->n + column;
        if (depth == of->k) run_part(of, c, a, b, 1, depth, width, 1);
        else {
            union {
                uint64_t words[BREADTH / sizeof(uint64_t)];
                uint32_t narrow[BREADTH / sizeof(uint32_t)];
            } part;
            struct matrices aside = *of;
            aside.c = &part;
            run_part(&aside, 0, a, b, 1, depth, width, 0);
            pthread_mutex_lock(j->adding);
            if (of->run32)
                for (size_t i = 0; i < width; i++) ((uint32_t *)of->c)[c + i] += part.narrow[i];
            else
                for (size_t i = 0; i < width; i++) ((uint64_t *)of->c)[c + i] += part.words[i];
            pthread_mutex_unlock(j->adding);
        }
        first += some, count -= some;
    }
}

static void rows_times(struct matrices of, size_t batch, int add)
{
    pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;
    const size_t size = of.run32 ? sizeof(uint32_t) : sizeof(uint64_t), columns = BREADTH / size;
    const struct row job = {of, columns, (of.n + columns - 1) / columns, (of.k + DEPTH - 1) / DEPTH, &adding};
    if (!add && batch * of.n > 0) memset(of.c, 0, batch * of.n * size);
    mk_split(batch * job.strips * job.depths, 1, batch * of.k * of.n * size / 16, row_piece, &job);
}

/* Other matrix products are split along the longer side of the result, and by batches: in units of so many columns,
 * whole lines of the cache, or of so many rows, which are what a panel of b is packed for. */
enum { COLUMNS = 64, ROWS = 16 };

struct products {
    struct matrices of;
    size_t units; /* of one product */
    int add, turned, by_rows;
};

static void products_piece(const void *job, size_t first, size_t count)
{
    const struct products *j = job;
    const struct matrices *of = &j->of;
    while (count > 0) {
        size_t at = first / j->units, unit = first % j->units, some = least(count, j->units - unit);
        size_t c = at * of->m * of->n, a = at * of->m * of->k, b = at * of->apart;
        if (j->by_rows) {
            size_t from = ROWS * unit, rows = least(of->m - from, ROWS * some);
            run_part(of, c + from * of->n, a + from * of->k, b, rows, of->k, of->n, j->add);
        } else {
            size_t from = COLUMNS * unit, width = least(of->n - from, COLUMNS * some);
            run_part(of, c + from, a, b + from * (j->turned ? of->k : 1), of->m, of->k, width, j->add);
        }
        first += some, count -= some;
    }
}

static void products(struct matrices of, size_t batch, int add, int turned)
{
    const int by_rows = of.m > of.n;
    const size_t units = by_rows ? (of.m + ROWS - 1) / ROWS : (of.n + COLUMNS - 1) / COLUMNS;
    const struct products job = {of, units, add, turned, by_rows};
    const size_t a_nanosecond = (of.m == 1 ? 2 : 4) * (of.run32 ? 2 : 1);
    mk_split(batch * units, 1, batch * of.m * of.k * of.n / a_nanosecond, products_piece, &job);
}

void mk_ring_matmul(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t b_apart, size_t batch, size_t m, size_t k,
                    size_t n, int add)
{
    const struct table *now = atomic_load_explicit(&active, memory_order_relaxed);
    const struct matrices of = {now->mk_ring_product, NULL, c, a, b, b_apart, m, k, n};
    if (m == 1) rows_times(of, batch, add);
    else products(of, batch, add, 0);
}

void mk_ring_matmul_nt(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t b_apart, size_t batch, size_t m,
                       size_t k, size_t n, int add)
{
    const struct table *now = atomic_load_explicit(&active, memory_order_relaxed);
    products((struct matrices){now->mk_ring_product_nt, NULL, c, a, b, b_apart, m, k, n}, batch, add, 1);
}

void mk_ring32_matmul(uint32_t *c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t n, int add)
{
    const struct table *now = atomic_load_explicit(&active, memory_order_relaxed);
    const struct matrices of = {NULL, now->mk_ring32_product, c, a, b, 0, m, k, n};
    if (m == 1) rows_times(of, 1, add);
    else products(of, 1, add, 0);
}
