/* Depthwise convolution of channels-last float32: kernel width and column stride are known at compile time.
 *
 *   y[i][r][c][o] = EPILOGUE(bias[o] + sum over ty, tx of
 *                            x[i][r * stride_rows - pad_top + ty * dilation_rows][c * SX - pad_left + tx * DX][o]
 *                            * weight[o][ty][tx], residual)
 * with zero outside the input: borders are handled here, above and below by the range of ty, left and right by tiles
 * compiled for them. No padded copy is needed.
 *
 * FW_DEFINE_DEPTHWISE_TILE(name, KW, SX, DX, R, LO, HI, EPILOGUE, RESIDUAL) defines a tile function for R neighbouring
 * output columns. Their windows span the input columns j = 0 .. (R - 1) * SX + (KW - 1) * DX; only LO <= j < HI exist.
 *   R <= 8 with HI - LO <= 16; R + KW + 1 vectors must fit the registers. R * KH * KW is best above 24.
 *   EPILOGUE, RESIDUAL as in conv.h.
 * pack.depthwise_spans(columns, in_columns, KW, SX, DX, pad_left) cuts a row of outputs into runs of equal tiles:
 * each (R, LO, HI) is one tile function and each run one fw_depthwise_span.
 *
 *   static const fw_depthwise_span spans[] = {{tile_left, 1, 0, 0, 0, 0}, {tile_middle, 6, ...}, ...};
 *   fw_depthwise_run(&shape, spans, count, x, w, bias, aux, r, y, tid, threads);
 * splits the rows of all images over the threads.
 *
 * Packed weights (pack.depthwise_weights): [vector of channels][tap row][tap column][VL]; bias: vectors * VL floats.
 * x and r are read in whole vectors, the last one too. y may be r; it must not overlap x. */
#ifndef FW_DEPTHWISE_H
#define FW_DEPTHWISE_H

#include "conv.h"

typedef struct fw_depthwise {
    int images, rows;                                  /* of the output; its columns are the spans' */
    int in_rows;
    int tap_rows, tap_columns;                         /* kernel height and width */
    int stride_rows, dilation_rows, pad_top;
    int vectors;                                       /* channels / VL, rounded up */
    int lanes;                                         /* 1..VL: lanes of the last vector that are stored */
    ptrdiff_t x_image, x_row, x_column;                /* floats from an input image, row, column to the next */
    ptrdiff_t y_image, y_row, y_column;                /* the same for the output */
    ptrdiff_t r_image, r_row, r_column;                /* the same for the residual */
} fw_depthwise;

/* One tile over `vectors` vectors of channels, `last` lanes of the last one stored: x at the first valid tap row and
 * input column LO, w at that tap row, `taps` rows. */
typedef void fw_depthwise_tile(const fw_depthwise *shape, const float *x, const float *w, const float *bias,
                               const float *aux, const float *r, float *y, int taps, int vectors, int last);

/* The part of a first-level cache that the windows of one tile may fill; wider ones run in parts of the channels. */
#define FW_DEPTHWISE_BYTES 20480

typedef struct fw_depthwise_span {
    fw_depthwise_tile *tile;
    int count;                 /* tiles side by side */
    int column, columns;       /* first output column, and from a tile to the next */
    int in_column, in_columns; /* the first tile's first existing input column, and from a tile to the next */
} fw_depthwise_span;

#define FW_DEFINE_DEPTHWISE_TILE(name, KW, SX, DX, R, LO, HI, EPILOGUE, RESIDUAL)                                      \
    FW_NOINLINE void name(const fw_depthwise *shape, const float *x, const float *w, const float *bias,                \
                          const float *aux, const float *r, float *y, int taps, int vectors, int last) {               \
        const ptrdiff_t row = shape->dilation_rows * shape->x_row * (ptrdiff_t)sizeof(float);                          \
        const ptrdiff_t panel = (ptrdiff_t)shape->tap_rows * (KW) * VL;                                                \
        (void)aux, (void)r;                                                                                            \
        for (int c = 0; c < vectors; c++, x += VL, w += panel) {                                                       \
            const int lanes = c + 1 < vectors ? VL : last;                                                             \
            const float *wk = w;                                                                                       \
            const char *xk = (const char *)x;                                                                          \
            vf acc[R];                                                                                                 \
            FW_UNROLL for (int m = 0; m < (R); m++) acc[m] = vf_load(bias + c * VL);                                   \
            for (int ty = 0; ty < taps; ty++, xk += row, wk += (KW) * VL) {                                            \
                vf wv[KW];                                                                                             \
                FW_STRIDES(shape->x_column);                                                                           \
                FW_HIDE_STRIDES;                                                                                       \
                FW_UNROLL for (int tx = 0; tx < (KW); tx++) wv[tx] = vf_load(wk + tx * VL);                            \
                FW_UNROLL for (int j = (LO); j < (HI); j++) {                                                          \
                    const vf xv = vf_load(FW_ROW(xk, j - (LO)));                                                       \
                    FW_UNROLL for (int tx = 0; tx < (KW); tx++) {                                                      \
                        const int m = (j - tx * (DX)) / (SX);                                                          \
                        if (m * (SX) == j - tx * (DX) && m >= 0 && m < (R)) acc[m] = vf_fma(xv, wv[tx], acc[m]);       \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            FW_UNROLL for (int m = 0; m < (R); m++) {                                                                  \
                const float *from = (RESIDUAL) ? r + m * shape->r_column + c * VL : bias;                              \
                const vf rv = (RESIDUAL) ? vf_load(from) : vf_zero();                                                  \
                const vf v = EPILOGUE(acc[m], rv, aux + c * VL);                                                       \
                (void)rv;                                                                                              \
                fw_store_part(y + m * shape->y_column + c * VL, v, lanes);                                             \
            }                                                                                                          \
        }                                                                                                              \
    }

/* One tile position down the output rows first <= row < end: each input row is fetched once and stays in the
 * first-level cache for the rows below. */
FW_INLINE void fw_depthwise_column(const fw_depthwise *s, fw_depthwise_tile *tile, const float *x, int x_first,
                                   const float *w, const float *bias, const float *aux, const float *r, float *y,
                                   int y_first, int first, int end, int vectors, int lanes) {
    const int step = s->dilation_rows;
    for (int row = first; row < end; row++) {
        const int top = row * s->stride_rows - s->pad_top;
        const int from = top < 0 ? fw_smaller(fw_ceil_div(-top, step), s->tap_rows) : 0;
        const int to = top < s->in_rows ? fw_smaller(s->tap_rows, fw_ceil_div(s->in_rows - top, step)) : 0;
        const int taps = to > from ? to - from : 0;
        tile(s, x + (taps ? top + from * step - x_first : 0) * s->x_row, w + (ptrdiff_t)from * s->tap_columns * VL,
             bias, aux, r ? r + row * s->r_row : r, y + (row - y_first) * s->y_row, taps, vectors, lanes);
    }
}

/* Output rows first <= row < end of one image. x stands at input row x_first, r at output row 0, y at row y_first. */
FW_NOINLINE void fw_depthwise_rows(const fw_depthwise *s, const fw_depthwise_span *spans, int count, const float *x,
                                   int x_first, const float *w, const float *bias, const float *aux, const float *r,
                                   float *y, int y_first, int first, int end) {
    const ptrdiff_t panel = (ptrdiff_t)s->tap_rows * s->tap_columns * VL;
    for (int n = 0; n < count; n++) {
        const fw_depthwise_span *span = spans + n;
        const int window = s->tap_rows * (span->in_columns + s->tap_columns) * VL * (int)sizeof(float);
        const int parts = fw_ceil_div(s->vectors * window, FW_DEPTHWISE_BYTES);
        const int some = fw_ceil_div(s->vectors, fw_smaller(parts, s->vectors));
        for (int c = 0; c < s->vectors; c += some) {
            const int vectors = fw_smaller(some, s->vectors - c), lanes = c + vectors < s->vectors ? VL : s->lanes;
            for (int t = 0; t < span->count; t++) {
                const ptrdiff_t column = span->column + t * span->columns;
                const ptrdiff_t in_column = span->in_column + t * span->in_columns;
                fw_depthwise_column(s, span->tile, x + in_column * s->x_column + c * VL, x_first, w + c * panel,
                                    bias + c * VL, aux ? aux + c * VL : aux,
                                    r ? r + column * s->r_column + c * VL : r, y + column * s->y_column + c * VL,
                                    y_first, first, end, vectors, lanes);
            }
        }
    }
}

FW_NOINLINE void fw_depthwise_run(const fw_depthwise *s, const fw_depthwise_span *spans, int count, const float *x,
                                  const float *w, const float *bias, const float *aux, const float *r, float *y,
                                  int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows, end = rows * (tid + 1) / threads;
    for (int64_t i = rows * tid / threads; i < end;) {
        const int image = (int)(i / s->rows), row = (int)(i % s->rows);
        const int stop = end - i < s->rows - row ? row + (int)(end - i) : s->rows;
        fw_depthwise_rows(s, spans, count, x + image * s->x_image, 0, w, bias, aux, r ? r + image * s->r_image : r,
                          y + image * s->y_image, 0, row, stop);
        i += stop - row;
    }
}

#endif
