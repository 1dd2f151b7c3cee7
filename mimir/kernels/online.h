/* The local halves of online operations: what is sent before an opening, and what is made of what was opened; and
 * numbers as they travel. Plain loops, one source for all levels: ref.c, avx2.c and avx512.c include this once each,
 * and the compiler makes vectors of it. A pass over all components at once, since each costs more to call than to run. */
#ifndef MK
#error "include this where MK names the level"
#endif

/* ---- truncation ---- */

void MK(mk_ring_trunc_mask)(uint64_t *restrict out, const uint64_t *x, size_t x_apart, const uint64_t *r,
                            size_t r_apart, const uint64_t *one, const uint64_t *items, size_t parts, size_t count)
{
    for (size_t c = 0; c < parts; c++, x += x_apart, r += r_apart)
        for (size_t i = 0, j = 0; i < count; i++) {
            uint64_t f = items[4 * i + 1], bare = items[4 * i + 2], lost = ((uint64_t)1 << bare) - 1;
            uint64_t most = (uint64_t)1 << items[4 * i + 3];
            uint64_t up = one[c] * (most - ((uint64_t)1 << f) + lost + 1 + (3 * lost >> 1));
            for (size_t end = j + items[4 * i]; j < end; j++) *out++ = ((x[j] + up) >> bare) + (r[j] >> bare);
        }
}

/* What an opened value says in public: a and b such that a - base + b over_at is truncated (ops.truncate). Its upper two
 * bits tell which of three `over` counts; where they are 3 none does. */
typedef struct {
    uint64_t a, b;
    size_t at;
} trunc_told;

static inline trunc_told trunc_tell(uint64_t opened, unsigned f, unsigned bare, unsigned up)
{
    uint64_t whole = opened << bare, high = whole >> 62, none = high & high >> 1;
    return (trunc_told){(whole >> f) - ((uint64_t)1 << (up - f)), (1 - none) << (64 - f), high - none};
}

void MK(mk_ring_trunc)(uint64_t *restrict out, const uint64_t *base, size_t base_apart, const uint64_t *over,
                       size_t over_apart, const uint64_t *one, const uint64_t *opened, const uint64_t *items,
                       size_t parts, size_t count)
{
    for (size_t c = 0; c < parts; c++, base += base_apart, over += over_apart)
        for (size_t i = 0, j = 0; i < count; i++) {
            unsigned f = (unsigned)items[4 * i + 1], bare = (unsigned)items[4 * i + 2];
            unsigned up = (unsigned)items[4 * i + 3];
            for (size_t end = j + items[4 * i]; j < end; j++) {
                trunc_told told = trunc_tell(opened[j], f, bare, up);
                *out++ = one[c] * told.a + told.b * over[3 * j + told.at] - base[j];
            }
        }
}

void MK(mk_ring_trunc_if)(uint64_t *restrict out, const uint64_t *ring, size_t ring_apart, const uint64_t *base,
                          size_t base_apart, const uint64_t *over, size_t over_apart, const uint64_t *z,
                          size_t z_apart, const uint64_t *one, const uint64_t *bits, const uint64_t *opened,
                          const uint64_t *items, size_t parts, size_t count)
{
    for (size_t c = 0; c < parts; c++, ring += ring_apart, base += base_apart, over += over_apart, z += z_apart)
        for (size_t i = 0, j = 0; i < count; i++) {
            unsigned f = (unsigned)items[4 * i + 1], bare = (unsigned)items[4 * i + 2];
            unsigned up = (unsigned)items[4 * i + 3];
            for (size_t end = j + items[4 * i]; j < end; j++) {
                uint64_t o = bits[j / 64] >> (j % 64) & 1, sign = 1 - 2 * o;
                trunc_told told = trunc_tell(opened[j], f, bare, up);
                *out++ = (ring[j] * sign + one[c] * o) * told.a +
                         (over[3 * j + told.at] * o + z[4 * j + 1 + told.at] * sign) * told.b -
                         (base[j] * o + z[4 * j] * sign);
            }
        }
}

void MK(mk_ring_norm)(uint64_t *restrict rows, uint64_t *restrict squares, const uint64_t *base, size_t base_apart,
                      const uint64_t *over, size_t over_apart, const uint64_t *both, size_t both_apart,
                      const uint64_t *q, size_t q_apart, const uint64_t *one, const uint64_t *opened, size_t parts,
                      size_t n, size_t width, unsigned f, unsigned bare)
{
    for (size_t c = 0; c < parts; c++, base += base_apart, over += over_apart, both += both_apart, q += q_apart)
        for (size_t i = 0; i < n; i++, rows += width, squares++) {
            uint64_t sum = q[i];
            for (size_t j = i * width, k = 0; k < width; j++, k++) {
                trunc_told told = trunc_tell(opened[j], f, bare, 61);
                uint64_t g = over[3 * j + told.at], product = both[3 * j + told.at];
                rows[k] = one[c] * told.a + told.b * g - base[j];
                sum += 2 * (told.b * (told.a * g - product) - told.a * base[j]);
                sum += told.b * told.b * g + one[c] * told.a * told.a;
            }
            *squares = sum;
        }
}

/* ---- numbers of fewer bytes than a word, as they travel: the lowest byte first, one number after another ---- */

/* The whole word is written, and of what follows the number the next overwrites all; at the end there is no room. */
void MK(mk_bytes_pack)(uint64_t *restrict words, const uint64_t *x, size_t n, size_t size)
{
    uint8_t *out = (uint8_t *)words;
    size_t room = (n * size + 7) / 8 * 8, j = 0;
    for (; j < n && j * size + 8 <= room; j++) memcpy(out + j * size, x + j, 8);
    for (; j < n; j++) memcpy(out + j * size, x + j, size);
    memset(out + n * size, 0, room - n * size);
}

void MK(mk_bytes_unpack)(uint64_t *restrict out, const uint64_t *words, size_t n, size_t size)
{
    const uint8_t *in = (const uint8_t *)words;
    size_t room = (n * size + 7) / 8 * 8, j = 0;
    uint64_t mask = ~(uint64_t)0 >> (64 - 8 * size);
    for (; j < n && j * size + 8 <= room; j++) {
        memcpy(out + j, in + j * size, 8);
        out[j] &= mask;
    }
    for (; j < n; j++) {
        out[j] = 0;
        memcpy(out + j, in + j * size, size);
    }
}

/* ---- values that are read or compared ---- */

void MK(mk_ring_drop)(uint64_t *restrict out, const uint64_t *x, size_t x_apart, const uint64_t *one,
                      const uint64_t *low, size_t parts, size_t pieces, size_t n, unsigned width)
{
    for (size_t c = 0; c < parts; c++, x += x_apart)
        for (size_t p = 0; p < pieces; p++, out += n) {
            uint64_t lost = ((uint64_t)1 << low[p]) - 1, up = one[c] * 3 * lost;
            uint64_t mask = ~(uint64_t)0 >> (64 - width) << low[p] | lost;
            for (size_t j = 0; j < n; j++) out[j] = ((x[j] + up) & mask) >> low[p];
        }
}

enum { PLACES = 64 }; /* entries of a vector at once */

/* (rest - v)^d = sum over i of choose(d, i) rest^(d - i) v^i: so of each power of v the sum of what all tables give it,
 * times the vector that has it. */
void MK(mk_ring_pieces)(uint64_t *restrict out, const uint64_t *e, size_t apart, const uint64_t *opened,
                        const uint64_t *turned, size_t parts, size_t groups, size_t n, size_t size, size_t degree,
                        size_t flags, unsigned rest)
{
    uint64_t choose[MK_DEGREE + 1][MK_DEGREE + 1], factors[PLACES];
    for (size_t i = 0; i <= degree; i++) {
        choose[i][0] = 1;
        for (size_t j = 1; j <= i; j++) choose[i][j] = -choose[i - 1][j - 1] + (j < i ? choose[i - 1][j] : 0);
    }
    size_t all = groups * n, tables = degree + 1 + flags;
    for (size_t k = 0; k < (1 + flags) * parts * all; k++) out[k] = 0;
    for (size_t k = 0; k < all; k++) {
        const uint64_t *run = turned + 2 * size * tables * (k / n) + (0 - (opened[k] >> rest)) % size;
        const uint64_t *rows = e + k * (degree + 1) * size;
        uint64_t power[MK_DEGREE + 1] = {1}, told = opened[k] & (((uint64_t)1 << rest) - 1);
        for (size_t d = 1; d <= degree; d++) power[d] = power[d - 1] * told;
        for (size_t at = 0; at < size; at += PLACES) {
            size_t left = size - at < PLACES ? size - at : PLACES;
            for (size_t i = 0; i <= degree; i++) {
                for (size_t j = 0; j < left; j++) factors[j] = 0;
                for (size_t d = i; d <= degree; d++) {
                    uint64_t times = choose[d][i] * power[d - i];
                    for (size_t j = 0; j < left; j++) factors[j] += times * run[2 * size * d + at + j];
                }
                for (size_t c = 0; c < parts; c++) {
                    const uint64_t *row = rows + c * apart + i * size + at;
                    uint64_t sum = 0;
                    for (size_t j = 0; j < left; j++) sum += factors[j] * row[j];
                    out[c * (1 + flags) * all + k] += sum;
                }
            }
            for (size_t f = 0; f < flags; f++)
                for (size_t c = 0; c < parts; c++) {
                    const uint64_t *row = rows + c * apart + at, *table = run + 2 * size * (degree + 1 + f) + at;
                    uint64_t sum = 0;
                    for (size_t j = 0; j < left; j++) sum += table[j] * row[j];
                    out[(c * (1 + flags) + 1 + f) * all + k] += sum;
                }
        }
    }
}

void MK(mk_ring_choose)(uint64_t *restrict out, const uint64_t *hot, size_t hot_apart, const uint64_t *z, size_t z_apart,
                        const uint64_t *bits, const uint64_t *opened, const uint64_t *items, size_t parts, size_t n,
                        size_t count)
{
    size_t ones = ((size_t)1 << count) - 2, others = 4 * (ones + ((size_t)1 << (count - 1)));
    for (size_t i = 0; i < n; i++) {
        size_t place = 0;
        for (size_t v = 0, at = i * (count - 1); v + 1 < count; v++, at++)
            place |= (size_t)(bits[at / 64] >> (at % 64) & 1) << v;
        for (size_t c = 0; c < parts; c++) {
            const uint64_t *one = hot + c * hot_apart + i * ones, *row = z + c * z_apart + i * others;
            for (size_t w = 0; w < count; w++) {
                size_t size = (size_t)1 << (count - (w ? w : 1)), j = w ? place >> (w - 1) ^ 1 : place;
                trunc_told told =
                    trunc_tell(opened[i * count + w], (unsigned)items[2 * w], (unsigned)items[2 * w + 1], 61);
                out[(c * n + i) * count + w] = told.a * one[j] + told.b * row[(1 + told.at) * size + j] - row[j];
                row += 4 * size;
                if (w) one += size;
            }
        }
    }
}

/* ---- public doubles ---- */

#define EXACT 0x1.8p52 /* next to it doubles are integers: adding it rounds to the nearest, as processors do by default */

/* A word below 2^52 as a double, and a double below 2^51 as a word, rounded: neither is a vector's conversion in AVX2. */
static inline double double_of(uint64_t word)
{
    union { uint64_t word; double value; } u = {.word = word | 0x4330000000000000};
    return u.value - 0x1p52;
}

static inline uint64_t rounded(double x)
{
    union { double value; uint64_t word; } u = {.value = x + EXACT}, zero = {.value = EXACT};
    return u.word - zero.word;
}

enum { ABREAST = 16 }; /* elements side by side */

void MK(mk_ring_wave)(uint64_t *restrict out, const uint64_t *waves, size_t apart, const uint64_t *opened,
                      const uint64_t *turns, const double *terms, const double *polynomials, size_t degree,
                      size_t parts, size_t n, size_t count, unsigned bits)
{
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    const double unit = 1 / (double)((uint64_t)1 << bits);
    uint64_t factors[2 * MK_TURNS][ABREAST];
    for (size_t at = 0; at < n; at += ABREAST) {
        size_t some = n - at < ABREAST ? n - at : ABREAST;
        uint64_t told[ABREAST] = {0};
        for (size_t i = 0; i < some; i++) told[i] = opened[at + i];
        for (size_t k = 0; k < count; k++) {
            double u[ABREAST], square[ABREAST], cos[ABREAST], sin[ABREAST];
            for (size_t i = 0; i < ABREAST; i++) {
                u[i] = double_of(told[i] * turns[k] & mask) * unit - 0.5;
                square[i] = u[i] * u[i];
                cos[i] = polynomials[0];
                sin[i] = polynomials[degree + 1];
            }
            for (size_t d = 1; d <= degree; d++)
                for (size_t i = 0; i < ABREAST; i++) {
                    cos[i] = cos[i] * square[i] + polynomials[d];
                    sin[i] = sin[i] * square[i] + polynomials[degree + 1 + d];
                }
            double re = terms[k], im = terms[count + k], amplitude = terms[2 * count + k];
            for (size_t i = 0; i < ABREAST; i++) {
                double c = -cos[i], s = -u[i] * sin[i];
                factors[k][i] = rounded((c * re - s * im) * amplitude);
                factors[count + k][i] = rounded((c * im + s * re) * amplitude);
            }
        }
        for (size_t p = 0; p < parts; p++)
            for (size_t i = 0; i < some; i++) {
                const uint64_t *row = waves + p * apart + (at + i) * 2 * count;
                uint64_t sum = 0;
                for (size_t k = 0; k < 2 * count; k++) sum += row[k] * factors[k][i];
                out[p * n + at + i] = sum;
            }
    }
}

void MK(mk_ring_decay)(uint64_t *restrict out, const uint64_t *e, size_t apart, const uint64_t *opened,
                       const double *turned, const double *polynomial, size_t degree, double factor, double offset,
                       size_t parts, size_t n, size_t size, unsigned rest)
{
    for (size_t at = 0; at < n; at += ABREAST) {
        size_t some = n - at < ABREAST ? n - at : ABREAST;
        double y[ABREAST] = {0}, within[ABREAST];
        for (size_t i = 0; i < some; i++) y[i] = double_of(opened[at + i] & (((uint64_t)1 << rest) - 1));
        for (size_t i = 0; i < ABREAST; i++) {
            y[i] = y[i] * factor - offset;
            within[i] = polynomial[0];
        }
        for (size_t d = 1; d <= degree; d++)
            for (size_t i = 0; i < ABREAST; i++) within[i] = within[i] * y[i] + polynomial[d];
        for (size_t i = 0; i < some; i++) {
            const double *bins = turned + (-(opened[at + i] >> rest) & (size - 1));
            for (size_t p = 0; p < parts; p++) {
                const uint64_t *row = e + p * apart + (at + i) * size;
                uint64_t sum = 0;
                for (size_t j = 0; j < size; j++) sum += row[j] * rounded(within[i] * bins[j]);
                out[p * n + at + i] = sum;
            }
        }
    }
}

/* ---- bits ---- */

void MK(mk_bits_mask)(uint64_t *restrict out, const uint64_t *bits, size_t bits_apart, const uint64_t *ring,
                      size_t ring_apart, size_t parts, size_t n)
{
    for (size_t c = 0; c < parts; c++, bits += bits_apart, ring += ring_apart)
        for (size_t w = 0; 64 * w < n; w++) {
            uint64_t word = 0;
            size_t lanes = n - 64 * w < 64 ? n - 64 * w : 64;
            for (size_t l = 0; l < lanes; l++) word |= (ring[64 * w + l] & 1) << l;
            *out++ = bits[w] ^ word;
        }
}

void MK(mk_ring_unmask)(uint64_t *restrict out, const uint64_t *ring, size_t ring_apart, const uint64_t *one,
                        const uint64_t *bits, size_t parts, size_t n)
{
    for (size_t c = 0; c < parts; c++, out += n, ring += ring_apart)
        for (size_t j = 0; j < n; j++) {
            uint64_t o = bits[j / 64] >> (j % 64) & 1;
            out[j] = ring[j] * (1 - 2 * o) + one[c] * o;
        }
}

void MK(mk_ring_pick)(uint64_t *restrict out, const uint64_t *w, size_t apart, const uint64_t *one,
                      const uint64_t *delta, const uint64_t *bits, size_t parts, size_t n, size_t width, unsigned flags)
{
    size_t row = width + 1, sets = (size_t)1 << flags, packed = (n + 63) / 64;
    for (size_t c = 0; c < parts; c++, w += apart)
        for (size_t j = 0; j < n; j++, out += row) {
            const uint64_t *of = w + j * (row * sets - 1); /* 1, of the empty set, is not there */
            uint64_t factor[1 << MK_FLAGS] = {1};
            for (unsigned f = 0; f < flags; f++) {
                uint64_t o = bits[f * packed + j / 64] >> (j % 64) & 1;
                for (size_t s = (size_t)1 << f; s--;) {
                    factor[s + ((size_t)1 << f)] = factor[s] * (1 - 2 * o);
                    factor[s] *= o;
                }
            }
            out[0] = factor[0] * one[c];
            for (size_t s = 1; s < sets; s++) out[0] += factor[s] * of[s * row - 1];
            for (size_t k = 1; k < row; k++) {
                out[k] = out[0] * delta[j * width + k - 1];
                for (size_t s = 0; s < sets; s++) out[k] -= factor[s] * of[s * row + k - 1];
            }
        }
}

void MK(mk_bits_at_most)(uint64_t *restrict out, const uint64_t *planes, size_t apart, size_t row_apart,
                         const uint64_t *sizes, const uint64_t *told, size_t parts, size_t digits, size_t count,
                         size_t n)
{
    size_t words = (n + 63) / 64;
    for (size_t c = 0; c < parts; c++, planes += apart, out += (2 * digits - 1) * count * words)
        for (size_t w = 0; w < words; w++) {
            const uint64_t *rows = planes + w;
            size_t lanes = n - 64 * w < 64 ? n - 64 * w : 64;
            unsigned shift = 0;
            for (size_t d = 0; d < digits; d++) {
                size_t many = (size_t)1 << sizes[d];
                uint64_t hot[1 << MK_DIGIT], up_to[1 << MK_DIGIT], running = 0;
                for (size_t i = 0; i < many; i++, rows += row_apart) {
                    hot[i] = *rows;
                    up_to[i] = running ^= hot[i];
                }
                for (size_t k = 0; k < count; k++) {
                    const uint64_t *value = told + k * n + 64 * w;
                    uint64_t same = 0, most = 0;
                    for (size_t l = 0; l < lanes; l++) {
                        uint64_t digit = value[l] >> shift & (many - 1), lane = (uint64_t)1 << l;
                        same |= hot[digit] & lane;
                        most |= up_to[digit] & lane;
                    }
                    uint64_t *to = out + k * words + w;
                    size_t less = d == digits - 1 ? 0 : 2 * (digits - 1) - d;
                    if (d > 0) to[(digits - d) * count * words] = same, most ^= same;
                    to[less * count * words] = most;
                }
                shift += (unsigned)sizes[d];
            }
        }
}

enum { SIDE = 8 }; /* words of a product side by side */

/* `width` words of a product: a variable at a time, o P(without) + P(with), of neighbours in the order of subsets; what
 * comes first waits in `left`, by how many variables have been joined. */
static inline __attribute__((always_inline)) void bits_product(uint64_t *out, const uint64_t *planes,
                                                               size_t row_apart, uint64_t empty,
                                                               const uint64_t *opened, size_t n, size_t degree,
                                                               const uint64_t *variables, const uint64_t *subsets,
                                                               const size_t width)
{
    uint64_t left[MK_MONOMIAL + 1][SIDE], sum[SIDE];
    for (size_t s = 0; s < (size_t)1 << degree; s++) {
        size_t j = 0;
        for (size_t v = 0; v < width; v++) sum[v] = s ? planes[subsets[s - 1] * row_apart + v] : empty;
        for (; s >> j & 1; j++)
            for (size_t v = 0; v < width; v++) sum[v] ^= left[j][v] & opened[variables[j] * n + v];
        for (size_t v = 0; v < width; v++) left[j][v] = sum[v];
    }
    for (size_t v = 0; v < width; v++) out[v] = left[degree][v];
}

void MK(mk_bits_products)(uint64_t *restrict out, const uint64_t *planes, size_t apart, size_t row_apart,
                          const uint64_t *one, const uint64_t *opened, const uint64_t *plan, size_t parts,
                          size_t products, size_t n)
{
    for (size_t c = 0; c < parts; c++, planes += apart) {
        const uint64_t *next = plan;
        for (size_t p = 0; p < products; p++, out += n) {
            size_t degree = *next, w = 0;
            const uint64_t *variables = next + 1, *subsets = variables + degree;
            for (; w + SIDE <= n; w += SIDE)
                bits_product(out + w, planes + w, row_apart, -one[c], opened + w, n, degree, variables, subsets, SIDE);
            if (w < n)
                bits_product(out + w, planes + w, row_apart, -one[c], opened + w, n, degree, variables, subsets, n - w);
            next = subsets + ((size_t)1 << degree) - 1;
        }
    }
}
