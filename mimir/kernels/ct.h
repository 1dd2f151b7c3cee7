/* The only idioms by which secret bits choose anything. Compilers may turn `mask & x` into a branch when they can
 * prove that the mask is all zeros or all ones; each idiom hides from them the fact they would need. */
#ifndef MIMIR_CT_H
#define MIMIR_CT_H

#include <stddef.h>
#include <stdint.h>

/* The value x, about which the compiler knows nothing. */
static inline uint64_t ct_hide(uint64_t x)
{
    __asm__("" : "+r"(x));
    return x;
}

/* The constant 1, hidden. Take it once before a loop: the loop still vectorises, since it is invariant, yet
 * `word & one` is any word as far as the compiler can tell. */
static inline uint64_t ct_one(void)
{
    return ct_hide(1);
}

/* All ones if bit i of word is set, else zero; i is public and below 64, one comes from ct_one. */
static inline uint64_t ct_mask(uint64_t word, unsigned i, uint64_t one)
{
    return (uint64_t)0 - ((word >> i) & one);
}

/* Zero n bytes; the barrier makes the compiler believe that somebody reads them. */
static inline void ct_wipe(void *p, size_t n)
{
    volatile uint8_t *q = p;
    size_t i = 0;
    for (; i < n && ((uintptr_t)(q + i) & 7); i++) q[i] = 0;
    for (; i + 8 <= n; i += 8) *(volatile uint64_t *)(q + i) = 0;
    for (; i < n; i++) q[i] = 0;
    __asm__ __volatile__("" : : "r"(p) : "memory");
}

#endif
