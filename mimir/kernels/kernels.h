/* Every loop of Mimir: arithmetic in the rings Z_2^64 and Z_2^32, on packed bits, in GF(2^64) and in GR(2^64, 48).
 *
 * The contract, once for all functions:
 *  - Bounds. Any value of an unsigned type is a valid input; arithmetic wraps modulo 2^64 (ring32: 2^32). Sizes are counts of
 *    elements, may be zero unless stated, and are checked by the Python wrapper, not here.
 *  - Layout. Arrays are dense and row-major; u64 arrays are aligned to 8 bytes, u32 arrays to 4. Nothing is allocated.
 *  - Aliasing. Outputs overlap no input and no other output. Inputs may overlap one another.
 *  - Timing. Time and addresses depend on sizes and on the arguments called public below, never on other data.
 *  - Errors. Functions that return void cannot fail.
 *  - Padding. Where n bits are packed in ceil(n/64) words, outputs have zero padding and input padding is ignored.
 *
 * Each function exists at the levels ref, avx2 and avx512 (suffixes _ref, _avx2, _avx512; see levels.h); the names
 * below call the level in force. All levels give the same bits. build.py gives this file to cffi with the
 * preprocessor lines removed. */
#ifndef MIMIR_KERNELS_H
#define MIMIR_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Levels: 0 ref, 1 avx2, 2 avx512. mk_level_max is the highest this machine can run. mk_level_force returns 0, or -1
 * and changes nothing if the machine lacks the level. The best level is in force when the library loads. Forcing
 * while another thread is inside a kernel is safe: that call ends at the level it began with. */
int mk_level(void);
int mk_level_max(void);
int mk_level_force(int level);

/* How many threads one long kernel may use, 1 to MK_THREADS; 1 when the library loads. They give the same bits as one.
 * Kernels that run at the same time do not share them: the first has them all, the others run on their callers' own.
 * alone: from now on kernels that the calling thread calls run on that thread. */
#define MK_THREADS 64
size_t mk_threads(void);
void mk_threads_use(size_t n);
void mk_threads_alone(void);

/* Pseudo-random bytes: out[0..n) is the key stream of AES-256 in counter mode (FIPS 197; NIST SP 800-38A section 6.5)
 * under a key of 32 bytes. Block i of 16 bytes is the encryption of `stream`, then block + i modulo 2^64, either as 8
 * bytes, the most significant first: what the standard calls the counter blocks that follow this first one. Public:
 * stream, block. */
void mk_prg_aes(uint8_t *out, size_t n, const uint8_t *key, uint64_t stream, uint64_t block);

/* Matrix products, `batch` times over: c (m, n) = a (m, k) b (k, n), or with _nt the rows of b are its columns:
 * b (n, k). Each b begins b_apart words after the one before. With add nonzero the product is added to c. Public: add. */
void mk_ring_matmul(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t b_apart, size_t batch, size_t m, size_t k,
                    size_t n, int add);
void mk_ring_matmul_nt(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t b_apart, size_t batch, size_t m,
                       size_t k, size_t n, int add);

/* The same modulo 2^32, of one product: c (m, n) = a (m, k) b (k, n). Public: add. */
void mk_ring32_matmul(uint32_t *c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t n, int add);

/* A party's additive term of a product of replicated shares, x and y of shape (2, n):
 * out = x0 y0 + x0 y1 + x1 y0 + alpha, and over bits with & and ^. */
void mk_ring_rss_mul(uint64_t *out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha, size_t n);
void mk_bits_rss_and(uint64_t *out, const uint64_t *x, const uint64_t *y, const uint64_t *alpha, size_t n);

/* Bit slicing: bit l of planes[b, w] is bit b of x[64 w + l]; planes is (nbits, ceil(n/64)), nbits in 1..64.
 * unslice gives zero above nbits. */
void mk_bits_slice(uint64_t *planes, const uint64_t *x, size_t n, size_t nbits);
void mk_bits_unslice(uint64_t *x, const uint64_t *planes, size_t n, size_t nbits);

/* The `size` lowest bytes of n words, the lowest first, one after another in ceil(n size / 8) words, whose last is filled
 * with zeros; and back. */
void mk_bytes_pack(uint64_t *words, const uint64_t *x, size_t n, size_t size);
void mk_bytes_unpack(uint64_t *out, const uint64_t *words, size_t n, size_t size);

/* In each of so many rows: n packed bits to words 0 or 1, and the lowest bits of n words packed. */
void mk_bits_to_ring(uint64_t *out, const uint64_t *words, size_t rows, size_t n);
void mk_ring_lsb(uint64_t *words, const uint64_t *x, size_t rows, size_t n);

/* Lane by lane a bit of one of many planes of n lanes, (.., ceil(n/64)) words: bit l of out[w] is that of
 * planes[row[64 w + l], w]; padding is zero. Public: row. */
void mk_bits_pick(uint64_t *out, const uint64_t *planes, const uint64_t *row, size_t n);

/* Doubling one-hot vectors, rows of e (2, n, size) of which the first `have` entries are in use, by bits b (2, n).
 * double_part: a party's term of e b, added to out (n, have): out += e0 b0 + e0 b1 + e1 b0; components lie _apart.
 * double: given one component e (n, size) and that of the product, high (n, have): the next `have` entries of each row
 * become high, and the first lose it. Here e is read and written.
 * half_, byte_: the same for entries of 16 and of 8 bits. */
void mk_ring_double_part(uint64_t *out, const uint64_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n,
                         size_t size, size_t have);
void mk_ring_double(uint64_t *e, const uint64_t *high, size_t n, size_t size, size_t have);
void mk_half_double_part(uint16_t *out, const uint16_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n,
                         size_t size, size_t have);
void mk_half_double(uint16_t *e, const uint16_t *high, size_t n, size_t size, size_t have);
void mk_byte_double_part(uint8_t *out, const uint8_t *e, size_t e_apart, const uint64_t *b, size_t b_apart, size_t n,
                         size_t size, size_t have);
void mk_byte_double(uint8_t *e, const uint8_t *high, size_t n, size_t size, size_t have);

/* A secret one-hot vector e_i turned by a public amount c_i; size is a power of two.
 * rotate: out (n, size), out[i, j] = e[i, (c_i - j) mod size].
 * half_rotate, byte_rotate: the same as rotate for entries of 16 and of 8 bits.
 * Public: c. */
void mk_ring_rotate(uint64_t *out, const uint64_t *e, const uint64_t *c, size_t n, size_t size);
void mk_half_rotate(uint16_t *out, const uint16_t *e, const uint64_t *c, size_t n, size_t size);
void mk_byte_rotate(uint8_t *out, const uint8_t *e, const uint64_t *c, size_t n, size_t size);

/* The local halves of online operations (ops.py says why they are right). An array of shares has `parts` components,
 * each dense; those of inputs lie `_apart` words apart, those of outputs are adjacent. one (parts) holds the components
 * of the public number 1, so that one[c] k adds the public k to a share. Public: one, opened, delta, rest, told, plan,
 * and in trunc_if, unmask and pick also bits: words of lanes that were opened.
 *
 * Truncation: items (count, 4) tell how many elements lose how many bits f, of which `bare` lie below what is opened, and
 * how far they are raised, 2^up; 0 < f <= up < 62, of norms up = 61. With w = opened << bare, a = (w >> f) - 2^(up - f) is
 * public; of three `over` an element, w's upper two bits tell which is meant, and b = 2^(64 - f), or b = 0 where they are
 * 3. Public: items.
 * trunc_mask: out = (x + raise >> bare) + (r >> bare), raise = 2^up - 2^f + 2^bare + floor(3 (2^bare - 1) / 2).
 * trunc: out = a - base + b over; over (n, 3).
 * trunc_if: with o the bits, sign = 1 - 2 o, of z (n, 4), first z_base, then z_over: out = (ring sign + o) a + (over o +
 * z_over sign) b - (base o + z_base sign).
 * norm: of base (n, width), over and both (n, width, 3), and q (n): rows as trunc, squares (parts, n) the sums of their
 * squares, which are q + sum of a^2 - 2 a base + 2 b (a over - both) + b^2 over. */
void mk_ring_trunc_mask(uint64_t *out, const uint64_t *x, size_t x_apart, const uint64_t *r, size_t r_apart,
                        const uint64_t *one, const uint64_t *items, size_t parts, size_t count);
void mk_ring_trunc(uint64_t *out, const uint64_t *base, size_t base_apart, const uint64_t *over, size_t over_apart,
                   const uint64_t *one, const uint64_t *opened, const uint64_t *items, size_t parts, size_t count);
void mk_ring_trunc_if(uint64_t *out, const uint64_t *ring, size_t ring_apart, const uint64_t *base, size_t base_apart,
                      const uint64_t *over, size_t over_apart, const uint64_t *z, size_t z_apart, const uint64_t *one,
                      const uint64_t *bits, const uint64_t *opened, const uint64_t *items, size_t parts,
                      size_t count);
void mk_ring_norm(uint64_t *rows, uint64_t *squares, const uint64_t *base, size_t base_apart, const uint64_t *over,
                  size_t over_apart, const uint64_t *both, size_t both_apart, const uint64_t *q, size_t q_apart,
                  const uint64_t *one, const uint64_t *opened, size_t parts, size_t n, size_t width, unsigned f,
                  unsigned bare);

/* Values that are read or compared.
 * drop: out (parts, pieces, n), x without its low_p lowest bits, after raising by 3 (2^low_p - 1), modulo 2^width;
 * low_p + width <= 64, width > 0. Public: low.
 * pieces: polynomials of t = rest_i - v at the place c_i - u, c_i = opened_i >> rest and rest_i what is left, where e
 * (groups n, degree + 1, size), size a power of two, holds v^d at place u and 0 elsewhere. Each group of n rows has tables
 * of its own, turned (groups, degree + 1 + flags, 2 size), turned[d, j] = table[d, -j mod size], so that each row reads one
 * run. out (parts, 1 + flags, groups n): sum over d <= degree of table[d, c_i - u] t^d; then table[d, c_i - u] of each
 * other table. degree <= MK_DEGREE. Public: turned.
 * choose: of `count` values a row the one that a random one-hot points at, after bits were opened under its place; of the
 * others 0. Row i
 * has count - 1 bits, o_i, the lowest for value 1; place 0 is o_i, place w > 0 is o_i >> w - 1 with its lowest bit turned.
 * hot (n, 2^count - 2) has 2^(count - w) entries for w = 1, 2, ..; z (n, ..) has for w = 0, 1, .. four rows of as many
 * (of w = 0 as of w = 1): base, and three of over. out (parts, n, count) = hot a + over b - base at place w (w = 0 reads
 * the same of hot as w = 1), a and b of opened (n, count) as above; items (count, 2): f and bare. */
#define MK_DEGREE 8
void mk_ring_drop(uint64_t *out, const uint64_t *x, size_t x_apart, const uint64_t *one, const uint64_t *low,
                  size_t parts, size_t pieces, size_t n, unsigned width);
void mk_ring_pieces(uint64_t *out, const uint64_t *e, size_t apart, const uint64_t *opened, const uint64_t *turned,
                    size_t parts, size_t groups, size_t n, size_t size, size_t degree, size_t flags, unsigned rest);
void mk_ring_choose(uint64_t *out, const uint64_t *hot, size_t hot_apart, const uint64_t *z, size_t z_apart,
                    const uint64_t *bits, const uint64_t *opened, const uint64_t *items, size_t parts, size_t n,
                    size_t count);

/* Sums of products of material with public functions of what was opened, which are doubles, rounded to the nearest
 * integer: every party must get the same, so additions and multiplications are those of waves.py, in their order.
 * wave: out = sum over k < count of waves_k a_k + waves_{count + k} b_k, waves (n, 2 count), where a_k + i b_k =
 * (re_k + i im_k) e^{2 pi i t} amplitude_k, t = turns_k opened / 2^bits modulo 1; terms (3, count) are re, im and
 * amplitude. bits <= MK_EXACT; count <= MK_TURNS.
 * decay: out = sum over j of e_j bins[(opened >> rest) - j mod size] e^y, e (n, size), y = (opened mod 2^rest) factor -
 * offset; turned (2 size) is bins turned as for pieces; size is a power of two, rest <= MK_EXACT.
 * Polynomials come as waves.py has them, the highest power first: of wave that of cos(2 pi u), then that of
 * sin(2 pi u) / u, in u^2, u = t - 1/2; of decay that of e^y. What is rounded must be below 2^MK_EXACT. All but waves
 * and e is public. */
#define MK_EXACT 50
#define MK_TURNS 16
void mk_ring_wave(uint64_t *out, const uint64_t *waves, size_t apart, const uint64_t *opened, const uint64_t *turns,
                  const double *terms, const double *polynomials, size_t degree, size_t parts, size_t n, size_t count,
                  unsigned bits);
void mk_ring_decay(uint64_t *out, const uint64_t *e, size_t apart, const uint64_t *opened, const double *turned,
                   const double *polynomial, size_t degree, double factor, double offset, size_t parts, size_t n,
                   size_t size, unsigned rest);

/* Bits, as words of lanes or as ring elements 0 or 1.
 * mask: out = bits ^ the lowest bits of ring (n), packed; padding is that of bits.
 * unmask: out = ring (1 - 2 o) + o, o the opened bits.
 * pick: of w (n, 2^flags (width + 1) - 1) and delta (n, width), bits (flags, ceil(n/64)) opened: out (parts, n, width + 1).
 * A row of w has for each set of flags, in binary order, the product of their masks, and times this x (width); 1, that of
 * the empty set, is left out. out has first the product of all o xor masks, and then times that delta - x.
 * at_most: planes hold for each digit, the lowest first, the one-hot of its value, 2^sizes[d] rows `row_apart` words
 * apart; told (count, n). out (parts, 2 digits - 1, count, ceil(n/64)): whether the highest digit is below that of
 * told; then whether digits are equal, from the highest to the second; then whether they are below, from the second
 * highest to the lowest, whose may be equal as well. sizes[d] <= MK_DIGIT. Public: sizes, told.
 * products: out (parts, products, n), products over GF(2) of variables o_v ^ x_v, opened (.., n) the rows o_v. plan tells
 * of each product the number of variables, the variables, and the rows of planes, `row_apart` words apart, with the
 * product of the x_v of each subset but the empty one, in binary order; at most MK_MONOMIAL variables. */
#define MK_DIGIT 10
#define MK_MONOMIAL 16
#define MK_FLAGS 4
void mk_bits_mask(uint64_t *out, const uint64_t *bits, size_t bits_apart, const uint64_t *ring, size_t ring_apart,
                  size_t parts, size_t n);
void mk_ring_unmask(uint64_t *out, const uint64_t *ring, size_t ring_apart, const uint64_t *one, const uint64_t *bits,
                    size_t parts, size_t n);
void mk_ring_pick(uint64_t *out, const uint64_t *w, size_t apart, const uint64_t *one, const uint64_t *delta,
                  const uint64_t *bits, size_t parts, size_t n, size_t width, unsigned flags);
void mk_bits_at_most(uint64_t *out, const uint64_t *planes, size_t apart, size_t row_apart, const uint64_t *sizes,
                     const uint64_t *told, size_t parts, size_t digits, size_t count, size_t n);
void mk_bits_products(uint64_t *out, const uint64_t *planes, size_t apart, size_t row_apart, const uint64_t *one,
                      const uint64_t *opened, const uint64_t *plan, size_t parts, size_t products, size_t n);

/* GF(2^64) modulo x^64 + x^4 + x^3 + x + 1; bit i of a word is the coefficient of x^i.
 * scale: out_j = a_j s.  inner: *out = sum a_j b_j.  fold: out has `half` elements, a has 2 half:
 * out_j = a_j + xi (a_j + a_{half+j}).
 * cross: the products of bits that tie rows to their folding (see check.py). x0, x1, y0 and y1 are (n, rows), word
 * [g, i] of block i holding 64 lanes; rows is a power of two, at most MK_ROWS. Halving the blocks again and again, into the low
 * half, the high half and their difference, gives 3^levels vectors of words (n); out has one element for each that took
 * a difference, in that order: sum over g, l of rho[g, l] times lane l of x0 y0 + x0 y1 + x1 y0, rho[g, l] having bit s
 * of planes[s, g] lane l as its bit s. planes is (64, n). Public: planes.
 * combine: out_i = sum over g, l of rho[g, l] where lane l of x[g, i] is set; x (n, rows), planes as for cross, public.
 * blend: out[64 g + l] = sum over i of w_i where lane l of x[g, i] is set; x (n, rows). Public: w. */
#define MK_ROWS 64
void mk_gf_mul(uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n);
void mk_gf_scale(uint64_t *out, const uint64_t *a, uint64_t s, size_t n);
void mk_gf_inner(uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n);
void mk_gf_fold(uint64_t *out, const uint64_t *a, uint64_t xi, size_t half);
void mk_gf_cross(uint64_t *out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0, const uint64_t *y1,
                 const uint64_t *planes, size_t rows, size_t n);
void mk_gf_combine(uint64_t *out, const uint64_t *x, const uint64_t *planes, size_t rows, size_t n);
void mk_gf_blend(uint64_t *out, const uint64_t *x, const uint64_t *w, size_t rows, size_t n);

/* The Galois ring GR(2^64, 48) = Z_2^64[X] / (X^48 + X^5 + X^3 + X^2 + 1); an element is 48 words, word i the
 * coefficient of X^i. A "01" element has coefficients 0 and 1 and is packed in one word, bit i for X^i; bits 48 and
 * up are ignored. Names: x ring words, r and xi 01 elements, a, b full elements.
 * inner: sum a_j b_j, one element.  mul01: a_j r_j.  scale01: x_j r_j.
 * fold: out_j = a_j + xi (a_{half+j} - a_j), a has 2 half elements.
 * halves: for replicated vectors of 2 half elements, given by component, out has two elements: with a.w short for
 * sum (a0 + a1)_j w0_j + a0_j w1_j, the first is a.w over the lower halves, the second over upper less lower halves.
 * NULL stands for a component that is zero.
 * fold_block: a0, a1, w0, w1 of 2 here elements are folded in place, and b0, b1, v0, v1 of 2 there ones, of which there
 * are not more, to behind them, and zeros follow up to an even number; out are the halves of that. NULL as above, but
 * what is NULL in the first four is so in the last.
 * combine: x (m, n), out_i = sum_j x[i, j] r_j, m elements.  combine_cols: out_j = sum_i x[i, j] r_i, n elements.
 * cross: as over GF(2^64), of ring words: x0, x1, y0, y1 (n, rows), out_t = sum_g r_g (x0 y0 + x0 y1 + x1 y0)[t, g].
 * x1 and y1 may be NULL, both of them: they are zero.
 * hot: what the claims of one-hots are made of (see check.py), for one component e (n, size), size at most MK_ENTRIES, and
 * b (bits, n), bits at most 48: a_i = r_i sum_t b[t, i] X^t, w_i = sum_j e[i, j] q_j, columns_j = sum_i e[i, j] r_i.
 * half_hot: the same for entries of 16 bits.
 * Public: xi, q and all r. */
#define MK_ENTRIES 512
void mk_gr_inner(uint64_t *out, const uint64_t *a, const uint64_t *b, size_t n);
void mk_gr_mul01(uint64_t *out, const uint64_t *a, const uint64_t *r, size_t n);
void mk_gr_fold(uint64_t *out, const uint64_t *a, uint64_t xi, size_t half);
void mk_gr_halves(uint64_t *out, const uint64_t *a0, const uint64_t *a1, const uint64_t *w0, const uint64_t *w1,
                  size_t half);
void mk_gr_fold_block(uint64_t *out, uint64_t *a0, uint64_t *a1, uint64_t *w0, uint64_t *w1, const uint64_t *b0,
                      const uint64_t *b1, const uint64_t *v0, const uint64_t *v1, uint64_t xi, size_t here,
                      size_t there);
void mk_gr_scale01(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t n);
void mk_gr_combine(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t m, size_t n);
void mk_gr_combine32(uint64_t *out, const uint32_t *x, const uint64_t *r, size_t m, size_t n);
void mk_gr_combine_cols(uint64_t *out, const uint64_t *x, const uint64_t *r, size_t m, size_t n);
void mk_gr_cross(uint64_t *out, const uint64_t *x0, const uint64_t *x1, const uint64_t *y0, const uint64_t *y1,
                 const uint64_t *r, size_t rows, size_t n);

void mk_gr_hot(uint64_t *a, uint64_t *w, uint64_t *columns, const uint64_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits);
void mk_gr_half_hot(uint64_t *a, uint64_t *w, uint64_t *columns, const uint16_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits);

/* The same ring modulo 2^8, for claims of one-hots of bytes: groups of MK_GROUP elements, (48, MK_GROUP) bytes each, lane
 * by lane; of n elements the last group has zeros. e, b, q, r, xi as above, of b the lowest 8 bits count.
 * hot: as hot, columns (48, size).  fold: out (half groups) of a (2 half), as fold.  inner: sum of a_j b_j over all
 * lanes of all groups, 48 words below 2^8. */
#define MK_GROUP 64
void mk_gr8_hot(uint8_t *a, uint8_t *w, uint8_t *columns, const uint8_t *e, const uint64_t *b, const uint64_t *q, const uint64_t *r, size_t n, size_t size, size_t bits);
void mk_gr8_fold(uint8_t *out, const uint8_t *a, uint64_t xi, size_t half);
void mk_gr8_inner(uint64_t *out, const uint8_t *a, const uint8_t *b, size_t groups);

/* Zero n bytes in a way no compiler drops. One level only: it is bound by memory. */
void mk_bytes_wipe(uint8_t *out, size_t n);

#endif
