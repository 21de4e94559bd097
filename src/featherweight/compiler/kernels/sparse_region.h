/* What stands around sparse 1x1 convolutions in a planar region: the dense convolution that enters it, a sparse
 * convolution joined with the depthwise one behind it, and the global pool that leaves it.
 *
 * FW_DEFINE_PLANAR_CONV(name, KH, KW, S, V, R, EPILOGUE) defines
 *   static void name(const fw_planar *shape, const fw_sparse *product, const fw_sparse_part *parts, int chunk,
 *                    int in_channels, const float *x, const float *aux, float *y, float *scratch, int tid,
 *                    int threads);
 *   A dense convolution: `chunk` output rows (chunk * columns is a multiple of VL, or they are all rows) are gathered
 *   to one row of pixels for every input channel and tap, and multiplied by the kernel of sparse.h, whose columns are
 *   these rows. V * R + R + 1 registers; V should divide the vectors of a chunk, what is left runs by single vectors.
 *   product->x_image is the pitch of these rows: chunk * columns rounded up to whole vectors, and one more vector.
 *   scratch: in_channels * KH * KW * pitch floats a thread.
 *
 * FW_DEFINE_SPARSE_DEPTHWISE(name, V, KH, S, EPILOGUE, DEPTHWISE) defines
 *   static void name(const fw_sparse *shape, const fw_sparse_part *parts, const fw_planar *planar, int strip,
 *                    const float *x, const float *aux, const float *w, const float *bias, const float *planar_aux,
 *                    float *y, float *scratch, int tid, int threads);
 *   A sparse layer (R = 1, one group, no residual) and DEPTHWISE, a function of FW_DEFINE_PLANAR_DEPTHWISE of KH rows
 *   and stride S, which convolves each channel as it is made, `strip` output rows at a time: what lies between the two
 *   stays in the first cache, and the rows that two strips need are made twice. planar->x_plane floats of scratch a
 *   thread, and a vector behind the last. Threads share the strips.
 *
 * fw_planar_mean(images * channels, pixels, x_plane, x, y, tid, threads): the mean of every plane. */
#ifndef FW_SPARSE_REGION_H
#define FW_SPARSE_REGION_H

#include "planar.h"
#include "sparse.h"

#define FW_DEFINE_PLANAR_CONV(name, KH, KW, S, V, R, EPILOGUE)                                                         \
    FW_SPARSE_STRIPE(name##_full, V, R, EPILOGUE, 0)                                                                   \
    FW_SPARSE_STRIPE(name##_one, 1, R, EPILOGUE, 0)                                                                    \
    /* Rows first to first + rows of the output, as all taps of one input channel see them. */                         \
    FW_INLINE void name##_gather(const fw_planar *s, const float *x, int first, int rows, ptrdiff_t pitch, float *to) {\
        for (int ty = 0; ty < (KH); ty++, to += (KW) * pitch) {                                                        \
            for (int r = 0; r < rows; r++) {                                                                           \
                const int row = (first + r) * (S) - s->pad_top + ty, inside = row >= 0 && row < s->in_rows;            \
                for (int column = 0; column < s->columns; column += VL) {                                              \
                    const int left = column * (S) - s->pad_left;                                                       \
                    fw_planar_span spans[KW];                                                                          \
                    vf taps[KW];                                                                                       \
                    FW_UNROLL for (int t = 0; t < (KW); t++) {                                                         \
                        spans[t] = fw_planar_inside(left + t, inside ? s->in_columns : left + t);                      \
                    }                                                                                                  \
                    fw_planar_taps(x + (ptrdiff_t)row * s->in_columns + left, spans, (KW), (S), taps);                 \
                    FW_UNROLL for (int t = 0; t < (KW); t++) {                                                         \
                        vf_store(to + t * pitch + (ptrdiff_t)r * s->columns + column, taps[t]);                        \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_planar *shape, const fw_sparse *product, const fw_sparse_part *parts, int chunk,    \
                          int in_channels, const float *x, const float *aux, float *y, float *scratch, int tid,        \
                          int threads) {                                                                               \
        const int chunks = fw_ceil_div(shape->rows, chunk);                                                            \
        const int64_t units = (int64_t)shape->images * chunks;                                                         \
        const ptrdiff_t pitch = product->x_image, taps = (ptrdiff_t)(KH) * (KW) * pitch;                               \
        float *from = scratch + tid * in_channels * taps;                                                              \
        for (int64_t unit = units * tid / threads; unit < units * (tid + 1) / threads; unit++) {                       \
            const int image = (int)(unit / chunks), first = (int)(unit % chunks) * chunk;                              \
            const int rows = fw_smaller(chunk, shape->rows - first), vectors = fw_ceil_div(rows * shape->columns, VL); \
            float *to = y + image * product->y_image + (ptrdiff_t)first * shape->columns;                              \
            for (int c = 0; c < in_channels; c++) {                                                                    \
                const float *plane = x + (image * in_channels + c) * shape->x_plane;                                   \
                name##_gather(shape, plane, first, rows, pitch, from + c * taps);                                      \
            }                                                                                                          \
            for (int v = 0; v < vectors;) {                                                                            \
                const int whole = v + (V) <= vectors;                                                                  \
                for (int p = 0; p < product->parts; p++) {                                                             \
                    (whole ? name##_full : name##_one)(product, parts + p, from + v * VL, aux, NULL, to + v * VL);     \
                }                                                                                                      \
                v += whole ? (V) : 1;                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }

#define FW_DEFINE_SPARSE_DEPTHWISE(name, V, KH, S, EPILOGUE, DEPTHWISE)                                                \
    FW_SPARSE_STRIPE(name##_full, V, 1, EPILOGUE, 0)                                                                   \
    FW_SPARSE_STRIPE(name##_one, 1, 1, EPILOGUE, 0)                                                                    \
    /* Vectors first to end of one channel, into `to`, whose first vector is `first`. */                               \
    FW_INLINE void name##_channel(const float *value, const int32_t *offset, int columns, const float *x,              \
                                  const float *aux, float *to, int first, int end) {                                   \
        int v = first;                                                                                                 \
        for (; v + (V) <= end; v += (V)) {                                                                             \
            name##_full_one(value, offset, columns, x + v * VL, aux, to + (v - first) * VL);                           \
        }                                                                                                              \
        for (; v < end; v++) name##_one_one(value, offset, columns, x + v * VL, aux, to + (v - first) * VL);           \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_sparse *shape, const fw_sparse_part *parts, const fw_planar *planar, int strip,     \
                          const float *x, const float *aux, const float *w, const float *bias,                         \
                          const float *planar_aux, float *y, float *scratch, int tid, int threads) {                   \
        const int strips = fw_ceil_div(planar->rows, strip);                                                           \
        const int64_t units = (int64_t)shape->images * strips;                                                         \
        float *plane = scratch + tid * planar->x_plane;                                                                \
        for (int64_t unit = units * tid / threads; unit < units * (tid + 1) / threads; unit++) {                       \
            const int image = (int)(unit / strips), row = (int)(unit % strips) * strip;                                \
            const int end = fw_smaller(row + strip, planar->rows), top = row * (S) - planar->pad_top;                  \
            const int low = top > 0 ? top * planar->in_columns / VL : 0;                                               \
            const int bottom = fw_smaller((end - 1) * (S) - planar->pad_top + (KH), planar->in_rows);                  \
            const int high = fw_ceil_div(bottom * planar->in_columns, VL);                                             \
            const float *from = x + image * shape->x_image;                                                            \
            for (int p = 0; p < shape->parts; p++) {                                                                   \
                const fw_sparse_part *part = parts + p;                                                                \
                const int32_t *offset = part->offset;                                                                  \
                const float *value = part->values;                                                                     \
                for (int b = 0; b < part->blocks; b++) {                                                               \
                    const int c = part->row[b], columns = part->count[b];                                              \
                    name##_channel(value, offset, columns, from, aux ? aux + c : aux, plane, low, high);               \
                    DEPTHWISE##_rows(planar, plane - (ptrdiff_t)low * VL, w + (ptrdiff_t)c * planar->taps, bias[c],    \
                                     planar_aux ? planar_aux + c : planar_aux,                                         \
                                     y + ((ptrdiff_t)image * planar->channels + c) * planar->y_plane, row, end);       \
                    offset += columns;                                                                                 \
                    value += columns + 1;                                                                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

static inline void fw_planar_mean(int64_t planes, int pixels, ptrdiff_t x_plane, const float *x, float *y, int tid,
                                  int threads) {
    for (int64_t plane = planes * tid / threads; plane < planes * (tid + 1) / threads; plane++) {
        const float *from = x + plane * x_plane;
        vf sum = vf_zero();
        int p = 0;
        for (; p + VL <= pixels; p += VL) sum = sum + vf_load(from + p);
        if (p < pixels) sum = sum + vf_load_n(from + p, pixels - p);
        y[plane] = vf_sum(sum) / (float)pixels;
    }
}

#endif
