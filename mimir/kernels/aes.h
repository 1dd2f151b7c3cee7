/* mk_prg_aes by the processor's instructions, on vectors of AES_WIDE blocks. Included after simd.h once for each width,
 * with AES_NAME, the function's name, and AES_WIDE: 1 takes AES-NI, 2 takes VAES, 4 takes VAES and AVX-512. */

#if AES_WIDE == 1
#define AES_TYPE __m128i
#define AES_BYTES _mm_shuffle_epi8
#define AES_ROUND _mm_aesenc_si128
#define AES_LAST _mm_aesenclast_si128
#elif AES_WIDE == 2
#define AES_TYPE __m256i
#define AES_BYTES _mm256_shuffle_epi8
#define AES_ROUND _mm256_aesenc_epi128
#define AES_LAST _mm256_aesenclast_epi128
#else
#define AES_TYPE __m512i
#define AES_BYTES _mm512_shuffle_epi8
#define AES_ROUND _mm512_aesenc_epi128
#define AES_LAST _mm512_aesenclast_epi128
#endif

void AES_NAME(uint8_t *out, size_t n, const uint8_t *key, uint64_t stream, uint64_t block)
{
    enum { FLIGHT = 8 }; /* a round takes some four cycles, of which two may begin in each */
    typedef uint64_t blocks __attribute__((vector_size(16 * AES_WIDE)));
    __m128i schedule[AES_ROUNDS + 1];
    blocks keys[AES_ROUNDS + 1], counter, step, reverse, x[FLIGHT];
    aes_schedule(schedule, key);
    for (int w = 0; w < AES_WIDE; w++) {
        for (int r = 0; r <= AES_ROUNDS; r++) memcpy((uint8_t *)&keys[r] + 16 * w, &schedule[r], 16);
        counter[2 * w] = stream, counter[2 * w + 1] = block + (uint64_t)w;
        step[2 * w] = 0, step[2 * w + 1] = AES_WIDE;
        reverse[2 * w] = 0x0001020304050607, reverse[2 * w + 1] = 0x08090a0b0c0d0e0f; /* each word big-endian */
    }
    while (n > 0) {
        size_t take = least(n, sizeof x);
        UNROLL for (int v = 0; v < FLIGHT; v++, counter += step)
            x[v] = (blocks)AES_BYTES((AES_TYPE)counter, (AES_TYPE)reverse) ^ keys[0];
        UNROLL for (int r = 1; r < AES_ROUNDS; r++)
            UNROLL for (int v = 0; v < FLIGHT; v++) x[v] = (blocks)AES_ROUND((AES_TYPE)x[v], (AES_TYPE)keys[r]);
        UNROLL for (int v = 0; v < FLIGHT; v++)
            x[v] = (blocks)AES_LAST((AES_TYPE)x[v], (AES_TYPE)keys[AES_ROUNDS]);
        if (take == sizeof x) {
            UNROLL for (int v = 0; v < FLIGHT; v++) memcpy(out + sizeof *x * (size_t)v, &x[v], sizeof *x);
        } else {
            blocks last[FLIGHT];
            UNROLL for (int v = 0; v < FLIGHT; v++) last[v] = x[v];
            memcpy(out, last, take);
            ct_wipe(last, sizeof last);
        }
        out += take, n -= take;
    }
    ct_wipe(schedule, sizeof schedule);
    ct_wipe(keys, sizeof keys);
}

#undef AES_NAME
#undef AES_WIDE
#undef AES_TYPE
#undef AES_BYTES
#undef AES_ROUND
#undef AES_LAST
