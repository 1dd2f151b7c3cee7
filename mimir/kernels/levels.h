/* The kernels that exist once per level, and their suffixed declarations. Add a kernel here, in kernels.h, in ref.c,
 * in simd.h (or the two level files) and in dispatch.c, the former three or online.h; the compiler names whichever was
 * forgotten. A kernel that is long is split in dispatch.c; its loops know of no threads. */
#ifndef MIMIR_LEVELS_H
#define MIMIR_LEVELS_H

#include "kernels.h"

/* What mk_ring_matmul, _nt and mk_ring32_matmul are made of: `width` columns of one product, c and b being those of the
 * first; rows of c and of an untransposed b are n numbers apart. */
void mk_ring_product(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n, size_t width,
                     int add);
void mk_ring_product_nt(uint64_t *c, const uint64_t *a, const uint64_t *b, size_t m, size_t k, size_t n, size_t width,
                        int add);
void mk_ring32_product(uint32_t *c, const uint32_t *a, const uint32_t *b, size_t m, size_t k, size_t n, size_t width,
                       int add);

#define MK_EACH(X)                                                                                                     \
    X(mk_prg_aes)                                                                                                      \
    X(mk_ring_product)                                                                                                 \
    X(mk_ring_product_nt)                                                                                              \
    X(mk_ring32_product)                                                                                               \
    X(mk_ring_rss_mul)                                                                                                 \
    X(mk_bits_rss_and)                                                                                                 \
    X(mk_bits_slice)                                                                                                   \
    X(mk_bits_unslice)                                                                                                 \
    X(mk_bytes_pack)                                                                                                   \
    X(mk_bytes_unpack)                                                                                                 \
    X(mk_bits_to_ring)                                                                                                 \
    X(mk_ring_lsb)                                                                                                     \
    X(mk_bits_pick)                                                                                                    \
    X(mk_ring_double_part)                                                                                             \
    X(mk_ring_double)                                                                                                  \
    X(mk_half_double_part)                                                                                             \
    X(mk_half_double)                                                                                                  \
    X(mk_byte_double_part)                                                                                             \
    X(mk_byte_double)                                                                                                  \
    X(mk_ring_trunc_mask)                                                                                              \
    X(mk_ring_trunc)                                                                                                   \
    X(mk_ring_trunc_if)                                                                                                \
    X(mk_ring_norm)                                                                                                    \
    X(mk_ring_drop)                                                                                                    \
    X(mk_ring_pieces)                                                                                                  \
    X(mk_ring_choose)                                                                                                  \
    X(mk_ring_wave)                                                                                                    \
    X(mk_ring_decay)                                                                                                   \
    X(mk_bits_mask)                                                                                                    \
    X(mk_ring_unmask)                                                                                                  \
    X(mk_ring_pick)                                                                                                    \
    X(mk_bits_at_most)                                                                                                 \
    X(mk_bits_products)                                                                                                \
    X(mk_ring_rotate)                                                                                                  \
    X(mk_half_rotate)                                                                                                  \
    X(mk_byte_rotate)                                                                                                  \
    X(mk_gf_mul)                                                                                                       \
    X(mk_gf_scale)                                                                                                     \
    X(mk_gf_inner)                                                                                                     \
    X(mk_gf_fold)                                                                                                      \
    X(mk_gf_cross)                                                                                                     \
    X(mk_gf_combine)                                                                                                   \
    X(mk_gf_blend)                                                                                                     \
    X(mk_gr_inner)                                                                                                     \
    X(mk_gr_mul01)                                                                                                     \
    X(mk_gr_fold)                                                                                                      \
    X(mk_gr_halves)                                                                                                    \
    X(mk_gr_fold_block)                                                                                                \
    X(mk_gr_scale01)                                                                                                   \
    X(mk_gr_combine)                                                                                                   \
    X(mk_gr_combine32)                                                                                                 \
    X(mk_gr_combine_cols)                                                                                              \
    X(mk_gr_cross)                                                                                                     \
    X(mk_gr_hot)                                                                                                       \
    X(mk_gr_half_hot)                                                                                                  \
    X(mk_gr8_hot)                                                                                                      \
    X(mk_gr8_fold)                                                                                                     \
    X(mk_gr8_inner)

#define MK_DECLARE(name)                                                                                               \
    __typeof__(name) name##_ref;                                                                                       \
    __typeof__(name) name##_avx2;                                                                                      \
    __typeof__(name) name##_avx512;
MK_EACH(MK_DECLARE)
#undef MK_DECLARE

/* The generator of the avx2 level where the processor has VAES: the same bits, two blocks at a time. */
__typeof__(mk_prg_aes) mk_prg_aes_vaes;

/* avx2 asks of the machine AVX2, PCLMULQDQ and AES-NI; avx512 asks F, DQ, BW, VL, VPCLMULQDQ and VAES on top. */
#if defined(__x86_64__) && defined(__GNUC__)
#define MK_X86 1
#else
#define MK_X86 0
#endif

#define MK_GR 48 /* degree of the Galois ring */

#endif
