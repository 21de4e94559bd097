/* 1x1 convolution with sparse float32 weights on planar activations: the vectors run over the pixels of a channel.
 *
 *   y[i][o][p] = EPILOGUE(bias[o] + sum over the nonzeros (o, k) of weight * x[i][k][p], residual)
 *
 * Planes start a multiple of VL floats apart and are read and written in whole vectors: what lies between the last
 * pixel and the next plane is finite or not, and never meets a pixel.
 *
 * FW_DEFINE_SPARSE(name, V, VT, R, EPILOGUE, RESIDUAL) defines
 *   static void name(const fw_sparse *shape, const fw_sparse_part *parts, const float *x, const float *aux,
 *                    const float *r, float *y, int tid, int threads);
 *   V         vectors of pixels of a stripe; V * R + R + 1 registers: 7 to 14 for R = 1, 7 for R = 2, 4 to 6 for R = 4
 *   VT        vectors of the last stripe: shape->vectors modulo V, or V where that is 0
 *   R         output channels that share their columns: 1 (unstructured), 2 or 4
 *   EPILOGUE  macro (v, r, aux) -> vf as in conv.h; aux points at this output's entry of the array `aux` (use vf_set)
 *   RESIDUAL  1: r (laid out like y by r_plane and r_image) is read
 *
 * The columns are cut into `groups`, so that a stripe of a group's input channels, V * VL * 4 bytes each, stays in the
 * first cache while the group's weights pass; between two groups the sums wait in y. So y may be r only where there is
 * one group, and never overlaps x. Inside a group the rows are sorted by their number of nonzeros, so that the ends of
 * the inner loop are predictable; `row` says where each goes. Rows without nonzeros give EPILOGUE(bias).
 * The output channels are cut into `parts` of equal work, which threads share where there are few stripes.
 * Packed (pack_sparse.sparse_weights), for each part, all read strictly forward:
 *   values: for each group, for each row block: its R biases (in the first group only), then R values a nonzero column;
 *   offset: for each nonzero column the BYTES from the first input channel to it; count: for each group and block the
 *   number of its columns; row: for each group and block its first output channel.
 * A matrix packed with blocks has further parts for the rows left over (R = 1), run by a second kernel. */
#ifndef FW_SPARSE_H
#define FW_SPARSE_H

#include "conv.h"

typedef struct fw_sparse_part {
    int blocks;
    const float *values;
    const int32_t *offset, *count, *row;
} fw_sparse_part;

typedef struct fw_sparse {
    int images, vectors, groups, parts;
    ptrdiff_t x_image, y_image, y_plane, r_image, r_plane; /* floats */
} fw_sparse;

/* All blocks of a part on one stripe; x, r, y at the stripe's first pixel. */
typedef void fw_sparse_stripe(const fw_sparse *shape, const fw_sparse_part *part, const float *x, const float *aux,
                              const float *r, float *y);

/* name##_row: one block of a group, from `w` (behind the biases) and `offset` on; acc holds the sums so far.
 * name##_one: one block alone. */
#define FW_SPARSE_STRIPE(name, V, R, EPILOGUE, RESIDUAL)                                                               \
    FW_INLINE void name##_row(const float *w, const int32_t *offset, const int32_t *stop, const float *x,              \
                              vf acc[R][V]) {                                                                          \
        for (; offset < stop; offset++, w += (R)) {                                                                    \
            const float *xk = (const float *)(const void *)((const char *)x + *offset);                                \
            vf wk[R];                                                                                                  \
            FW_OPAQUE(xk);                                                                                             \
            FW_UNROLL for (int o = 0; o < (R); o++) wk[o] = vf_set(w[o]);                                              \
            FW_UNROLL for (int v = 0; v < (V); v++) {                                                                  \
                const vf xv = vf_load(xk + v * VL);                                                                    \
                FW_UNROLL for (int o = 0; o < (R); o++) acc[o][v] = vf_fma(xv, wk[o], acc[o][v]);                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INLINE void name##_end(vf acc[R][V], const float *aux, const float *r, ptrdiff_t r_plane, float *y,             \
                              ptrdiff_t y_plane) {                                                                     \
        (void)r, (void)aux, (void)r_plane;                                                                             \
        FW_UNROLL for (int o = 0; o < (R); o++) {                                                                      \
            FW_UNROLL for (int v = 0; v < (V); v++) {                                                                  \
                const vf rv = (RESIDUAL) ? vf_load(r + o * r_plane + v * VL) : vf_zero();                              \
                (void)rv;                                                                                              \
                vf_store(y + o * y_plane + v * VL, EPILOGUE(acc[o][v], rv, aux + o));                                  \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INLINE void name##_one(const float *w, const int32_t *offset, int columns, const float *x, const float *aux,    \
                              float *y) {                                                                              \
        vf acc[R][V];                                                                                                  \
        FW_UNROLL for (int o = 0; o < (R); o++) {                                                                      \
            FW_UNROLL for (int v = 0; v < (V); v++) acc[o][v] = vf_set(w[o]);                                          \
        }                                                                                                              \
        name##_row(w + (R), offset, offset + columns, x, acc);                                                         \
        name##_end(acc, aux, NULL, 0, y, 0);                                                                           \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_sparse *shape, const fw_sparse_part *part, const float *x, const float *aux,       \
                          const float *r, float *y) {                                                                  \
        const int blocks = part->blocks, groups = shape->groups;                                                       \
        const ptrdiff_t y_plane = shape->y_plane, r_plane = shape->r_plane;                                            \
        const int32_t *offset = part->offset, *count = part->count, *row = part->row;                                  \
        const float *w = part->values;                                                                                 \
        for (int g = 0; g < groups; g++) {                                                                             \
            for (int b = 0; b < blocks; b++, row++) {                                                                  \
                const int32_t *stop = offset + *count++;                                                               \
                float *to = y + *row * y_plane;                                                                        \
                vf acc[R][V];                                                                                          \
                if (g == 0) {                                                                                          \
                    FW_UNROLL for (int o = 0; o < (R); o++) {                                                          \
                        FW_UNROLL for (int v = 0; v < (V); v++) acc[o][v] = vf_set(w[o]);                              \
                    }                                                                                                  \
                    w += (R);                                                                                          \
                } else {                                                                                               \
                    FW_UNROLL for (int o = 0; o < (R); o++) {                                                          \
                        FW_UNROLL for (int v = 0; v < (V); v++) acc[o][v] = vf_load(to + o * y_plane + v * VL);        \
                    }                                                                                                  \
                }                                                                                                      \
                name##_row(w, offset, stop, x, acc);                                                                   \
                w += (stop - offset) * (R);                                                                            \
                offset = stop;                                                                                         \
                if (g + 1 == groups) {                                                                                 \
                    name##_end(acc, aux ? aux + *row : aux, r ? r + *row * r_plane : r, r_plane, to, y_plane);         \
                } else {                                                                                               \
                    FW_UNROLL for (int o = 0; o < (R); o++) {                                                          \
                        FW_UNROLL for (int v = 0; v < (V); v++) vf_store(to + o * y_plane + v * VL, acc[o][v]);        \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

/* Units of (part, image, stripe) are split over the threads, the stripes innermost. */
static inline void fw_sparse_run(const fw_sparse *s, const fw_sparse_part *parts, int vectors, fw_sparse_stripe *full,
                                 fw_sparse_stripe *last, const float *x, const float *aux, const float *r, float *y,
                                 int tid, int threads) {
    const int stripes = fw_ceil_div(s->vectors, vectors);
    const int64_t units = (int64_t)s->parts * s->images * stripes;
    for (int64_t unit = units * tid / threads; unit < units * (tid + 1) / threads; unit++) {
        const int stripe = (int)(unit % stripes), image = (int)(unit / stripes % s->images);
        const ptrdiff_t pixel = (ptrdiff_t)stripe * vectors * VL;
        (stripe + 1 < stripes ? full : last)(s, parts + unit / stripes / s->images, x + image * s->x_image + pixel, aux,
                                             r ? r + image * s->r_image + pixel : r, y + image * s->y_image + pixel);
    }
}

#define FW_DEFINE_SPARSE(name, V, VT, R, EPILOGUE, RESIDUAL)                                                           \
    FW_SPARSE_STRIPE(name##_full, V, R, EPILOGUE, RESIDUAL)                                                            \
    FW_SPARSE_STRIPE(name##_last, VT, R, EPILOGUE, RESIDUAL)                                                           \
    FW_NOINLINE void name(const fw_sparse *shape, const fw_sparse_part *parts, const float *x, const float *aux,      \
                          const float *r, float *y, int tid, int threads) {                                           \
        fw_sparse_run(shape, parts, V, name##_full, name##_last, x, aux, r, y, tid, threads);                          \
    }

#endif
