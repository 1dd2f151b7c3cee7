/* What the machine can do at best, for bench/kernels.py to compare with: reading memory, and multiplying. */
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vec __attribute__((vector_size(64), may_alias));

/* Read n words (n a multiple of 64) and return a value that depends on all. */
uint64_t read_all(const uint64_t *p, size_t n)
{
    vec s[8] = {0};
    for (size_t i = 0; i < n; i += 64)
        for (int j = 0; j < 8; j++) s[j] ^= *(const vec *)(p + i + 8 * j);
    for (int j = 1; j < 8; j++) s[0] ^= s[j];
    return s[0][0] ^ s[0][1] ^ s[0][2] ^ s[0][3] ^ s[0][4] ^ s[0][5] ^ s[0][6] ^ s[0][7];
}

enum { CHAINS = 16 }; /* enough to hide the latency of a product */

/* CHAINS times 8 products of 64-bit words per step, in registers. */
uint64_t multiply(uint64_t seed, size_t steps)
{
    vec a = (vec){1, 2, 3, 4, 5, 6, 7, 8} * seed, s[CHAINS];
    for (int j = 0; j < CHAINS; j++) s[j] = a + (uint64_t)j;
    for (size_t i = 0; i < steps; i++)
        for (int j = 0; j < CHAINS; j++) s[j] = s[j] * a + a;
    for (int j = 1; j < CHAINS; j++) s[0] ^= s[j];
    return s[0][0];
}
