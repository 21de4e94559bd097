/* 1x1 convolution with sparse float32 weights. Activations are planar (the ONNX order): a channel's pixels are contiguous,
 * and the vectors run over pixels.
 *
 *   y[i][o][p] = EPILOGUE(bias[o] + sum over the nonzeros (o, k) of weight * x[i][k][p], residual)
 *
 * FW_DEFINE_SPARSE(name, V, VT, R, EPILOGUE, RESIDUAL) defines
 *   static void name(const fw_sparse *shape, const float *x, const float *aux, const float *r, float *y, int tid,
 *                    int threads);
 *   V         vectors of pixels of a stripe; V * R + R + 1 registers: 7 to 14 for R = 1, 7 for R = 2, 4 or 5 for R = 4
 *   VT        vectors of the last stripe: those of pixels modulo V * VL, or V where that is 0
 *   R         output channels that share their columns: 1 (unstructured), 2 or 4
 *   EPILOGUE  macro (v, r, aux) -> vf as in conv.h; aux points at this output's entry of the array `aux` (use vf_set)
 *   RESIDUAL  1: r (laid out like y by r_plane and r_image) is read
 *
 * A stripe of all input channels, V * VL * 4 * channels bytes, stays in the cache while the whole weight stream passes.
 * Rows are sorted by their number of nonzeros, so that the ends of the inner loop are predictable; `row` says where
 * each goes. Rows without nonzeros give EPILOGUE(bias).
 * Packed (pack_sparse.sparse_weights): values: for each row block its R biases, then R values for each nonzero column;
 *   offset: for each nonzero column the BYTES from the first input channel to it; start[b]: index of block b's first
 *   column, start[blocks] their number; row[b]: first output channel of the block.
 * A matrix packed with blocks has a second part (rows left over, R = 1), run by a second kernel.
 * Up to VL - 1 floats behind the last plane of x and r are read and not used. y may be r; it must not overlap x. */
#ifndef FW_SPARSE_H
#define FW_SPARSE_H

#include "conv.h"

typedef struct fw_sparse {
    int images, pixels, blocks;
    ptrdiff_t x_image, y_image, y_plane, r_image, r_plane; /* floats */
    const float *values;
    const int32_t *offset, *start, *row;
} fw_sparse;

/* One stripe, the blocks from `first` to `end`; x, r, y at the stripe's first pixel. */
typedef void fw_sparse_stripe(const fw_sparse *shape, const float *x, const float *aux, const float *r, float *y,
                              int lanes, int first, int end);

#define FW_SPARSE_STRIPE(name, V, R, EPILOGUE, RESIDUAL)                                                               \
    FW_NOINLINE void name(const fw_sparse *shape, const float *x, const float *aux, const float *r, float *y,         \
                          int lanes, int first, int end) {                                                            \
        const int32_t *offset = shape->offset + shape->start[first];                                                  \
        const float *w = shape->values + (ptrdiff_t)(first + shape->start[first]) * (R);                              \
        (void)r, (void)aux;                                                                                            \
        for (int b = first; b < end; b++) {                                                                            \
            const int32_t *stop = shape->offset + shape->start[b + 1];                                                 \
            vf acc[R][V];                                                                                              \
            FW_UNROLL for (int o = 0; o < (R); o++) {                                                                  \
                FW_UNROLL for (int v = 0; v < (V); v++) acc[o][v] = vf_set(w[o]);                                      \
            }                                                                                                          \
            for (w += (R); offset < stop; offset++, w += (R)) {                                                        \
                const float *xk = (const float *)(const void *)((const char *)x + *offset);                            \
                vf wk[R];                                                                                              \
                FW_OPAQUE(xk);                                                                                         \
                FW_UNROLL for (int o = 0; o < (R); o++) wk[o] = vf_set(w[o]);                                          \
                FW_UNROLL for (int v = 0; v < (V); v++) {                                                              \
                    const vf xv = vf_load(xk + v * VL);                                                                \
                    FW_UNROLL for (int o = 0; o < (R); o++) acc[o][v] = vf_fma(xv, wk[o], acc[o][v]);                  \
                }                                                                                                      \
            }                                                                                                          \
            FW_UNROLL for (int o = 0; o < (R); o++) {                                                                  \
                const int output = shape->row[b] + o;                                                                  \
                FW_UNROLL for (int v = 0; v < (V); v++) {                                                              \
                    const int part = v + 1 < (V) ? VL : lanes;                                                         \
                    const float *from = (RESIDUAL) ? r + output * shape->r_plane + v * VL : x;                         \
                    const vf rv = (RESIDUAL) ? vf_load(from) : vf_zero();                                              \
                    const vf out = EPILOGUE(acc[o][v], rv, aux + output);                                              \
                    (void)rv;                                                                                          \
                    fw_store_part(y + output * shape->y_plane + v * VL, out, part);                                    \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

/* Stripes are split over the threads where there are enough of them, else the rows, by their share of nonzeros. */
static inline void fw_sparse_run(const fw_sparse *s, int vectors, fw_sparse_stripe *full, fw_sparse_stripe *last,
                                 const float *x, const float *aux, const float *r, float *y, int tid, int threads) {
    const int step = vectors * VL, stripes = fw_ceil_div(s->pixels, step), units = s->images * stripes;
    const int by_rows = units < 4 * threads && threads > 1, work = s->blocks + s->start[s->blocks];
    int first = 0, end = s->blocks;
    if (by_rows) {
        while (first < s->blocks && (int64_t)(first + s->start[first]) * threads < (int64_t)work * tid) first++;
        end = first;
        while (end < s->blocks && (int64_t)(end + s->start[end]) * threads < (int64_t)work * (tid + 1)) end++;
    }
    const int from = by_rows ? 0 : (int)((int64_t)units * tid / threads);
    const int to = by_rows ? units : (int)((int64_t)units * (tid + 1) / threads);
    for (int unit = from; unit < to; unit++) {
        const int image = unit / stripes, pixel = unit % stripes * step, left = s->pixels - pixel;
        (left > step - VL ? full : last)(s, x + image * s->x_image + pixel, aux, r ? r + image * s->r_image + pixel : r,
                                         y + image * s->y_image + pixel, left >= step ? VL : (left - 1) % VL + 1, first,
                                         end);
    }
}

#define FW_DEFINE_SPARSE(name, V, VT, R, EPILOGUE, RESIDUAL)                                                           \
    FW_SPARSE_STRIPE(name##_full, V, R, EPILOGUE, RESIDUAL)                                                            \
    FW_SPARSE_STRIPE(name##_last, VT, R, EPILOGUE, RESIDUAL)                                                           \
    FW_NOINLINE void name(const fw_sparse *shape, const float *x, const float *aux, const float *r, float *y, int tid, \
                          int threads) {                                                                               \
        fw_sparse_run(shape, V, name##_full, (VT) == (V) ? name##_full : name##_last, x, aux, r, y, tid, threads);    \
    }

#endif
