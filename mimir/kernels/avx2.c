/* The avx2 level: simd.h on four lanes, with AVX2, PCLMULQDQ and AES-NI. */
#include "ct.h"
#include "levels.h"

#if MK_X86
#pragma GCC target("avx2,pclmul,aes")
#include <immintrin.h>

#define MK(name) name##_avx2
#define LANES 4

typedef uint64_t vec __attribute__((vector_size(32)));
typedef uint32_t vec32 __attribute__((vector_size(32)));
typedef vec bitmask;

/* AVX2 has no 64-bit multiply. A product mod 2^64 is lo lo + 2^32 (lo hi + hi lo). The second part is wanted mod 2^32
 * alone, so one multiplication of 32-bit lanes gives both its terms, once the halves of one factor have changed places;
 * sums of products keep them apart to the end. */
typedef struct {
    vec v, turned;
} factor;
typedef struct {
    vec low, cross;
} sum;

/* Rows and vectors in the register block of a matrix product, vectors in that of a combination in GR. */
enum { MM_ROWS = 2, MM_VECS = 2, GR_VECS = 4 };

static inline vec load(const uint64_t *p)
{
    return (vec)_mm256_loadu_si256((const __m256i *)p);
}

static inline void store(uint64_t *p, vec v)
{
    _mm256_storeu_si256((__m256i *)p, (__m256i)v);
}

static inline vec splat(uint64_t x)
{
    return (vec)_mm256_set1_epi64x((long long)x);
}

/* All ones in lanes below count. */
static inline __m256i lanes_below(size_t count)
{
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x((long long)count), _mm256_set_epi64x(3, 2, 1, 0));
}

/* The first count words at p, zero in other lanes; only these are read. count <= LANES. */
static inline vec load_first(const uint64_t *p, size_t count)
{
    return count == LANES ? load(p) : (vec)_mm256_maskload_epi64((const long long *)p, lanes_below(count));
}

static inline void store_first(uint64_t *p, size_t count, vec v)
{
    if (count == LANES) store(p, v);
    else _mm256_maskstore_epi64((long long *)p, lanes_below(count), (__m256i)v);
}

/* The same for twice as many numbers of 32 bits. */
static inline __m256i lanes32_below(size_t count)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

static inline vec32 load32_first(const uint32_t *p, size_t count)
{
    return (vec32)_mm256_maskload_epi32((const int *)p, lanes32_below(count));
}

static inline void store32_first(uint32_t *p, size_t count, vec32 v)
{
    _mm256_maskstore_epi32((int *)p, lanes32_below(count), (__m256i)v);
}

/* Bits LANES q .. LANES q + LANES - 1 of word as lane masks. */
static inline bitmask bits_of(uint64_t word, unsigned q)
{
    const vec bit = (vec){1, 2, 4, 8} << (LANES * q);
    return (bitmask)_mm256_cmpeq_epi64((__m256i)(splat(word) & bit), (__m256i)bit);
}

static inline vec keep(bitmask k, vec v)
{
    return v & k;
}

static inline vec add_where(vec to, bitmask k, vec v)
{
    return to + (v & k);
}

/* The lowest bits of the lanes, packed. */
static inline uint64_t lowest_bits(vec v)
{
    return (uint64_t)_mm256_movemask_pd((__m256d)_mm256_slli_epi64((__m256i)v, 63));
}

static inline uint64_t total(vec v)
{
    __m128i s = _mm_add_epi64(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    return (uint64_t)_mm_cvtsi128_si64(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s)));
}

static inline factor factor_of(vec v)
{
    return (factor){v, (vec)_mm256_shuffle_epi32((__m256i)v, 0xb1)};
}

static inline factor factor_splat(const uint64_t *p)
{
    return factor_of(splat(*p));
}

static inline sum sum_zero(void)
{
    return (sum){splat(0), splat(0)};
}

static inline vec mul32(vec a, vec b)
{
    return (vec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

/* Of b the turned form is not needed: it is better what changes more often. */
static inline sum sum_mul(sum s, factor a, factor b)
{
    s.low += mul32(a.v, b.v);
    s.cross = (vec)_mm256_add_epi32((__m256i)s.cross, _mm256_mullo_epi32((__m256i)a.turned, (__m256i)b.v));
    return s;
}

static inline vec sum_value(sum s)
{
    const vec high = splat(0xffffffff00000000);
    return s.low + (s.cross << 32) + (s.cross & high);
}

/* Carry-less products of 128 bits: of lanes 0 and 2 in *even, of lanes 1 and 3 in *odd. */
static inline void clmul(vec *even, vec *odd, vec a, vec b)
{
    __m128i a0 = _mm256_castsi256_si128((__m256i)a), a1 = _mm256_extracti128_si256((__m256i)a, 1);
    __m128i b0 = _mm256_castsi256_si128((__m256i)b), b1 = _mm256_extracti128_si256((__m256i)b, 1);
    *even = (vec)_mm256_set_m128i(_mm_clmulepi64_si128(a1, b1, 0x00), _mm_clmulepi64_si128(a0, b0, 0x00));
    *odd = (vec)_mm256_set_m128i(_mm_clmulepi64_si128(a1, b1, 0x11), _mm_clmulepi64_si128(a0, b0, 0x11));
}

static inline vec low_halves(vec even, vec odd)
{
    return (vec)_mm256_unpacklo_epi64((__m256i)even, (__m256i)odd);
}

static inline vec high_halves(vec even, vec odd)
{
    return (vec)_mm256_unpackhi_epi64((__m256i)even, (__m256i)odd);
}

/* Of the words of a and b, in pairs that suit: those whose bit s is clear, those whose bit s is set, s being 1 or 2;
 * and the way back. */
static inline vec pick_low(vec a, vec b, int s)
{
    return s == 2 ? (vec)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20) : low_halves(a, b);
}

static inline vec pick_high(vec a, vec b, int s)
{
    return s == 2 ? (vec)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31) : high_halves(a, b);
}

static inline vec unpick_first(vec low, vec high, int s)
{
    return pick_low(low, high, s);
}

static inline vec unpick_second(vec low, vec high, int s)
{
    return pick_high(low, high, s);
}

/* The words of a without bit s, each followed s places on by the word of b at its place; and those with bit s. */
static inline vec swap_low(vec a, vec b, int s)
{
    return pick_low(a, b, s);
}

static inline vec swap_high(vec a, vec b, int s)
{
    return pick_high(a, b, s);
}

#include "simd.h"

#include "online.h"
#include "gr8.h"

#define AES_NAME mk_prg_aes_avx2
#define AES_WIDE 1
#include "aes.h"

#pragma GCC target("vaes")
#define AES_NAME mk_prg_aes_vaes
#define AES_WIDE 2
#include "aes.h"
#endif
