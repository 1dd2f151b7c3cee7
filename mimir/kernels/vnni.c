/* Combinations of words of 32 bits at the avx512 level where the processor has VNNI, which multiplies bytes: 64 at once,
 * adding four neighbours each. Coefficients of 01 elements are such bytes, 0 or 1, and words are taken apart into theirs:
 * so a sum of words times elements is 48 sums a byte, shifted and added. For words of 64 bits sums of subsets are as fast. */
#include "levels.h"

#if MK_X86
#pragma GCC target("avx2,pclmul,aes,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,prefer-vector-width=512")
#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 16")

/* SOME words make one vector. So many POWERS of so many ROWS form a block of sums that stays in registers, over CHUNK
 * words. Coefficients of a chunk, 192 kB, stay in the second-level cache. For fewer than LEAST results they are not laid
 * out. */
enum { SOME = 16, POWERS = 4, ROWS = 6, BLOCKS = 64, CHUNK = SOME * BLOCKS, LEAST = 16 };

/* Coefficients: [power / POWERS][block of SOME words][power % POWERS], a vector each. */
struct coefficients {
    __m512i v[MK_GR / POWERS][BLOCKS][POWERS];
};

/* In each 128 bits the coefficients of four words, four times. */
static void lay_out(struct coefficients *to, const uint64_t *r, size_t n)
{
    uint64_t planes[MK_GR * (CHUNK / 64)];
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const size_t words = (n + 63) / 64;
    mk_bits_slice_avx512(planes, r, n, MK_GR);
    for (size_t t = 0; t < MK_GR; t++)
        for (size_t b = 0; b * SOME < n; b++) {
            __m128i ones = _mm_maskz_set1_epi8((__mmask16)(planes[t * words + b * SOME / 64] >> b * SOME % 64), 1);
            to->v[t / POWERS][b][t % POWERS] = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(ones));
        }
}

/* SOME words, in each 128 bits the lowest bytes of four, then the next ones, and so on. */
static inline __m512i bytes(const uint32_t *x, __mmask16 there)
{
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(_mm512_maskz_loadu_epi32(there, x), _mm512_broadcast_i32x4(turn));
}

/* Of a sum by byte: all of byte j in 32 bits j. */
static inline __m128i by_byte(__m512i v)
{
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* The POWERS numbers that sums by byte make, each below 2^42. */
static inline __m256i numbers(const __m512i s[POWERS])
{
    __m128i v0 = by_byte(s[0]), v1 = by_byte(s[1]), v2 = by_byte(s[2]), v3 = by_byte(s[3]);
    __m128i a = _mm_unpacklo_epi32(v0, v1), b = _mm_unpacklo_epi32(v2, v3);
    __m128i c = _mm_unpackhi_epi32(v0, v1), d = _mm_unpackhi_epi32(v2, v3);
    __m256i sum = _mm256_cvtepu32_epi64(_mm_unpacklo_epi64(a, b));
    sum = _mm256_add_epi64(sum, _mm256_slli_epi64(_mm256_cvtepu32_epi64(_mm_unpackhi_epi64(a, b)), 8));
    sum = _mm256_add_epi64(sum, _mm256_slli_epi64(_mm256_cvtepu32_epi64(_mm_unpacklo_epi64(c, d)), 16));
    return _mm256_add_epi64(sum, _mm256_slli_epi64(_mm256_cvtepu32_epi64(_mm_unpackhi_epi64(c, d)), 24));
}

/* out += for so many rows, n words apart, some of their words times elements; or = if they are the first. The last row
 * stands for those that lack. Meanwhile those `ahead` are fetched, of which what is read here is a short run. */
static void some_rows(uint64_t *out, const uint32_t *x, const struct coefficients *r, size_t rows, size_t ahead, size_t n,
                      size_t words, int add)
{
    const uint32_t *row[ROWS];
    UNROLL for (unsigned i = 0; i < ROWS; i++) row[i] = x + n * (i < rows ? i : rows - 1);
    for (size_t t = 0; t < MK_GR / POWERS; t++) {
        __m512i s[ROWS][POWERS];
        UNROLL for (unsigned i = 0; i < ROWS; i++) UNROLL for (unsigned j = 0; j < POWERS; j++) s[i][j] = _mm512_setzero_si512();
        for (size_t b = 0; b * SOME < words; b++) {
            const size_t left = words - b * SOME;
            const __mmask16 there = left < SOME ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
            const __m512i *c = r->v[t][b];
            __m512i v[ROWS];
            if (t < ahead) _mm_prefetch((const char *)(x + n * (ROWS + t) + b * SOME), _MM_HINT_T0);
            UNROLL for (unsigned i = 0; i < ROWS; i++) v[i] = bytes(row[i] + b * SOME, there);
            UNROLL for (unsigned j = 0; j < POWERS; j++)
                UNROLL for (unsigned i = 0; i < ROWS; i++) s[i][j] = _mm512_dpbusd_epi32(s[i][j], v[i], c[j]);
        }
        UNROLL for (unsigned i = 0; i < ROWS; i++)
        {
            if (i >= rows) break;
            __m256i *to = (__m256i *)(out + MK_GR * i + POWERS * t), sum = numbers(s[i]);
            _mm256_storeu_si256(to, add ? _mm256_add_epi64(sum, _mm256_loadu_si256(to)) : sum);
        }
    }
}

void mk_gr_combine32_vnni(uint64_t *restrict out, const uint32_t *x, const uint64_t *r, size_t m, size_t n)
{
    struct coefficients laid;
    if (m < LEAST || n == 0) {
        mk_gr_combine32_avx512(out, x, r, m, n);
        return;
    }
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t words = n - at < CHUNK ? n - at : CHUNK;
        lay_out(&laid, r + at, words);
        for (size_t i = 0; i < m; i += ROWS) {
            size_t rows = m - i < ROWS ? m - i : ROWS, more = m - i - rows;
            some_rows(out + MK_GR * i, x + i * n + at, &laid, rows, more < ROWS ? more : ROWS, n, words, at > 0);
        }
    }
}

#endif
