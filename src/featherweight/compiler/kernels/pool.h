/* Pooling of channels-last float32: maximum, average, global average and global maximum.
 *
 *   fw_max_pool, fw_average_pool(const fw_pool *shape, const float *x, float *y, int tid, int threads)
 *       The window of output (r, c) starts at input (r * stride_rows - pad_top, c * stride_columns - pad_left); taps
 *       outside the input do not count. A maximum without any tap is -FLT_MAX, an average 0.
 *       Average: divisor_rows x divisor_columns say how far a window counts in the divisor: the input's size (count
 *       only what exists), or input + bottom and right padding with include_pad = 1 (count the padding, on all sides).
 *       The rows of all images are split over the threads.
 *   fw_global_pool(const fw_pool *shape, int maximum, const float *x, float *y, int tid, int threads)
 *       The mean or maximum of in_rows x in_columns; y has y_image floats an image. Vectors are split over the threads.
 *
 * x and y are read and written in whole vectors. NaN: a maximum may drop it. */
#ifndef FW_POOL_H
#define FW_POOL_H

#include <float.h>

#include "vector.h"

typedef struct fw_pool {
    int images, rows, columns;                         /* of the output */
    int in_rows, in_columns;
    int tap_rows, tap_columns, stride_rows, stride_columns, dilation_rows, dilation_columns, pad_top, pad_left;
    int vectors;                                       /* channels / VL, rounded up */
    int include_pad, divisor_rows, divisor_columns;    /* average only */
    ptrdiff_t x_image, x_row, x_column, y_image, y_row, y_column; /* floats from one to the next */
} fw_pool;

/* The taps of a window along one axis that lie in 0 .. size - 1: first <= t < end. */
typedef struct fw_taps {
    int first, end;
} fw_taps;

FW_INLINE fw_taps fw_taps_inside(int start, int step, int taps, int size) {
    fw_taps t;
    t.first = start < 0 ? (step - 1 - start) / step : 0;
    t.end = start < size ? (size - start + step - 1) / step : 0;
    if (t.end > taps) t.end = taps;
    if (t.first > t.end) t.first = t.end;
    return t;
}

#define FW_POOL_JOIN(maximum, a, b) ((maximum) ? vf_max(a, b) : (a) + (b))

/* B vectors of channels of one output; x stands at the first valid tap. */
#define FW_POOL_WINDOW(B, maximum, start, finish)                                                                      \
    {                                                                                                                  \
        vf acc[B];                                                                                                     \
        FW_UNROLL for (int b = 0; b < (B); b++) acc[b] = vf_set(start);                                                \
        for (int ty = 0; ty < taps_y; ty++) {                                                                          \
            for (int tx = 0; tx < taps_x; tx++) {                                                                      \
                const float *from = x + ty * row + tx * column + c * VL;                                               \
                FW_UNROLL for (int b = 0; b < (B); b++)                                                                \
                    acc[b] = FW_POOL_JOIN(maximum, acc[b], vf_load(from + b * VL));                                    \
            }                                                                                                          \
        }                                                                                                              \
        FW_UNROLL for (int b = 0; b < (B); b++) vf_store(y + (c + b) * VL, acc[b] * vf_set(finish));                   \
    }

FW_INLINE void fw_pool_window(int maximum, const float *x, float *y, int vectors, int taps_y, int taps_x, ptrdiff_t row,
                              ptrdiff_t column, float scale) {
    const float start = maximum ? -FLT_MAX : 0.0f;
    int c = 0;
    for (; c + 4 <= vectors; c += 4) FW_POOL_WINDOW(4, maximum, start, scale)
    for (; c < vectors; c++) FW_POOL_WINDOW(1, maximum, start, scale)
}

FW_INLINE void fw_pool_run(int maximum, const fw_pool *s, const float *x, float *y, int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows;
    for (int64_t i = rows * tid / threads; i < rows * (tid + 1) / threads; i++) {
        const int image = (int)(i / s->rows), r = (int)(i % s->rows);
        const int top = r * s->stride_rows - s->pad_top;
        const fw_taps ty = fw_taps_inside(top, s->dilation_rows, s->tap_rows, s->in_rows);
        const fw_taps dy = fw_taps_inside(top, s->dilation_rows, s->tap_rows, s->divisor_rows);
        for (int c = 0; c < s->columns; c++) {
            const int left = c * s->stride_columns - s->pad_left;
            const fw_taps tx = fw_taps_inside(left, s->dilation_columns, s->tap_columns, s->in_columns);
            const fw_taps dx = fw_taps_inside(left, s->dilation_columns, s->tap_columns, s->divisor_columns);
            const int count = s->include_pad ? dy.end * dx.end : (ty.end - ty.first) * (tx.end - tx.first);
            const int some = ty.end > ty.first && tx.end > tx.first;
            const ptrdiff_t at = some ? (top + ty.first * s->dilation_rows) * s->x_row +
                                            (left + tx.first * s->dilation_columns) * s->x_column
                                      : 0;
            float *to = y + image * s->y_image + r * s->y_row + c * s->y_column;
            fw_pool_window(maximum, x + image * s->x_image + at, to, s->vectors, ty.end - ty.first,
                           tx.end - tx.first, s->dilation_rows * s->x_row,
                           s->dilation_columns * s->x_column, maximum || count == 0 ? 1.0f : 1.0f / (float)count);
        }
    }
}

FW_NOINLINE void fw_max_pool(const fw_pool *s, const float *x, float *y, int tid, int threads) {
    fw_pool_run(1, s, x, y, tid, threads);
}
FW_NOINLINE void fw_average_pool(const fw_pool *s, const float *x, float *y, int tid, int threads) {
    fw_pool_run(0, s, x, y, tid, threads);
}

/* B vectors over the whole map. A mean adds the rows' sums, so its error does not grow with the whole map. */
#define FW_GLOBAL_POOL(B)                                                                                              \
    {                                                                                                                  \
        vf all[B];                                                                                                     \
        FW_UNROLL for (int b = 0; b < (B); b++) all[b] = vf_set(maximum ? -FLT_MAX : 0.0f);                            \
        for (int r = 0; r < s->in_rows; r++) {                                                                         \
            const float *from = x + image * s->x_image + r * s->x_row + c * VL;                                        \
            vf acc[B];                                                                                                 \
            FW_UNROLL for (int b = 0; b < (B); b++) acc[b] = vf_load(from + b * VL);                                   \
            for (int k = 1; k < s->in_columns; k++) {                                                                  \
                from += s->x_column;                                                                                   \
                FW_UNROLL for (int b = 0; b < (B); b++)                                                                \
                    acc[b] = FW_POOL_JOIN(maximum, acc[b], vf_load(from + b * VL));                                    \
            }                                                                                                          \
            FW_UNROLL for (int b = 0; b < (B); b++) all[b] = FW_POOL_JOIN(maximum, all[b], acc[b]);                    \
        }                                                                                                              \
        FW_UNROLL for (int b = 0; b < (B); b++)                                                                        \
            vf_store(y + image * s->y_image + (c + b) * VL, all[b] * vf_set(maximum ? 1.0f : 1.0f / (float)area));     \
    }

FW_NOINLINE void fw_global_pool(const fw_pool *s, int maximum, const float *x, float *y, int tid, int threads) {
    const int area = s->in_rows * s->in_columns;
    const int first = (int)((int64_t)s->vectors * tid / threads);
    const int end = (int)((int64_t)s->vectors * (tid + 1) / threads);
    for (int image = 0; image < s->images; image++) {
        int c = first;
        for (; c + 4 <= end; c += 4) FW_GLOBAL_POOL(4)
        for (; c < end; c++) FW_GLOBAL_POOL(1)
    }
}

#endif
