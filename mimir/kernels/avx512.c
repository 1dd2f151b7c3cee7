/* The avx512 level: simd.h on eight lanes, with AVX-512 F, DQ, BW, VL, VPCLMULQDQ and VAES. */
#include "ct.h"
#include "levels.h"

#if MK_X86
#pragma GCC target("avx2,pclmul,aes,avx512f,avx512dq,avx512bw,avx512vl,vpclmulqdq,vaes,prefer-vector-width=512")
#include <immintrin.h>

#define MK(name) name##_avx512
#define LANES 8

typedef uint64_t vec __attribute__((vector_size(64)));
typedef uint32_t vec32 __attribute__((vector_size(64)));
typedef __mmask8 bitmask;
typedef vec factor; /* see avx2.c: here the processor multiplies 64 bits */
typedef vec sum;

enum { MM_ROWS = 8, MM_VECS = 3, GR_VECS = 6 };

static inline vec load(const uint64_t *p)
{
    return (vec)_mm512_loadu_si512(p);
}

static inline void store(uint64_t *p, vec v)
{
    _mm512_storeu_si512(p, (__m512i)v);
}

static inline vec splat(uint64_t x)
{
    return (vec)_mm512_set1_epi64((long long)x);
}

static inline __mmask8 lanes_below(size_t count)
{
    return (__mmask8)((1u << count) - 1);
}

static inline vec load_first(const uint64_t *p, size_t count)
{
    return (vec)_mm512_maskz_loadu_epi64(lanes_below(count), p);
}

static inline void store_first(uint64_t *p, size_t count, vec v)
{
    _mm512_mask_storeu_epi64(p, lanes_below(count), (__m512i)v);
}

static inline __mmask16 lanes32_below(size_t count)
{
    return (__mmask16)((1u << count) - 1);
}

static inline vec32 load32_first(const uint32_t *p, size_t count)
{
    return (vec32)_mm512_maskz_loadu_epi32(lanes32_below(count), p);
}

static inline void store32_first(uint32_t *p, size_t count, vec32 v)
{
    _mm512_mask_storeu_epi32(p, lanes32_below(count), (__m512i)v);
}

static inline bitmask bits_of(uint64_t word, unsigned q)
{
    return (__mmask8)(word >> (LANES * q));
}

static inline vec keep(bitmask k, vec v)
{
    return (vec)_mm512_maskz_mov_epi64(k, (__m512i)v);
}

static inline vec add_where(vec to, bitmask k, vec v)
{
    return (vec)_mm512_mask_add_epi64((__m512i)to, k, (__m512i)to, (__m512i)v);
}

static inline uint64_t lowest_bits(vec v)
{
    return _mm512_test_epi64_mask((__m512i)v, _mm512_set1_epi64(1));
}

static inline uint64_t total(vec v)
{
    /* _mm512_reduce_add_epi64 of gcc adds signed numbers, whose overflow is undefined. */
    v += (vec)_mm512_shuffle_i64x2((__m512i)v, (__m512i)v, 0x4e);
    v += (vec)_mm512_shuffle_i64x2((__m512i)v, (__m512i)v, 0xb1);
    return v[0] + v[1];
}

static inline factor factor_of(vec v)
{
    return v;
}

static inline factor factor_splat(const uint64_t *p)
{
    return splat(*p);
}

static inline sum sum_zero(void)
{
    return splat(0);
}

static inline sum sum_mul(sum s, factor a, factor b)
{
    return s + (vec)_mm512_mullo_epi64((__m512i)a, (__m512i)b);
}

static inline vec sum_value(sum s)
{
    return s;
}

static inline void clmul(vec *even, vec *odd, vec a, vec b)
{
    *even = (vec)_mm512_clmulepi64_epi128((__m512i)a, (__m512i)b, 0x00);
    *odd = (vec)_mm512_clmulepi64_epi128((__m512i)a, (__m512i)b, 0x11);
}

static inline vec low_halves(vec even, vec odd)
{
    return (vec)_mm512_unpacklo_epi64((__m512i)even, (__m512i)odd);
}

static inline vec high_halves(vec even, vec odd)
{
    return (vec)_mm512_unpackhi_epi64((__m512i)even, (__m512i)odd);
}

/* Of the words of a then b, by number: those whose bit s is clear, those whose bit s is set, s a power of two below
 * LANES; and the way back. */
static inline vec pick_low(vec a, vec b, int s)
{
    const vec by4 = {0, 1, 2, 3, 8, 9, 10, 11}, by2 = {0, 1, 4, 5, 8, 9, 12, 13}, by1 = {0, 2, 4, 6, 8, 10, 12, 14};
    return __builtin_shuffle(a, b, s == 4 ? by4 : s == 2 ? by2 : by1);
}

static inline vec pick_high(vec a, vec b, int s)
{
    const vec by4 = {4, 5, 6, 7, 12, 13, 14, 15}, by2 = {2, 3, 6, 7, 10, 11, 14, 15}, by1 = {1, 3, 5, 7, 9, 11, 13, 15};
    return __builtin_shuffle(a, b, s == 4 ? by4 : s == 2 ? by2 : by1);
}

static inline vec unpick_first(vec low, vec high, int s)
{
    const vec by4 = {0, 1, 2, 3, 8, 9, 10, 11}, by2 = {0, 1, 8, 9, 2, 3, 10, 11}, by1 = {0, 8, 1, 9, 2, 10, 3, 11};
    return __builtin_shuffle(low, high, s == 4 ? by4 : s == 2 ? by2 : by1);
}

static inline vec unpick_second(vec low, vec high, int s)
{
    const vec by4 = {4, 5, 6, 7, 12, 13, 14, 15}, by2 = {4, 5, 12, 13, 6, 7, 14, 15}, by1 = {4, 12, 5, 13, 6, 14, 7, 15};
    return __builtin_shuffle(low, high, s == 4 ? by4 : s == 2 ? by2 : by1);
}

/* The words of a without bit s, each followed s places on by the word of b at its place; and those with bit s. */
static inline vec swap_low(vec a, vec b, int s)
{
    const vec by4 = {0, 1, 2, 3, 8, 9, 10, 11}, by2 = {0, 1, 8, 9, 4, 5, 12, 13}, by1 = {0, 8, 2, 10, 4, 12, 6, 14};
    return __builtin_shuffle(a, b, s == 4 ? by4 : s == 2 ? by2 : by1);
}

static inline vec swap_high(vec a, vec b, int s)
{
    const vec by4 = {4, 5, 6, 7, 12, 13, 14, 15}, by2 = {2, 3, 10, 11, 6, 7, 14, 15}, by1 = {1, 9, 3, 11, 5, 13, 7, 15};
    return __builtin_shuffle(a, b, s == 4 ? by4 : s == 2 ? by2 : by1);
}

#include "simd.h"

#include "online.h"
#include "gr8.h"

#define AES_NAME mk_prg_aes_avx512
#define AES_WIDE 4
#include "aes.h"
#endif
