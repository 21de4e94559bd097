/* Convolution of channels-last float32, dense or grouped: a GEMM whose rows are output columns. 1x1, k x k, strided,
 * dilated and fully connected layers all run through it.
 *
 *   y[i][r][c][o] = EPILOGUE(bias[o] + sum over ty, tx, k of x[i, r, c, ty, tx][k] * weight[o][ty][tx][k], residual)
 *
 * FW_DEFINE_CONV(name, MR, NR, NT, EPILOGUE, RESIDUAL) defines
 *   static void name(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,
 *                    const float *r, float *y, int tid, int threads);
 *   MR        output columns of a register tile, 1..15, at most shape->columns. MR * NR accumulators + NR + 1 must fit
 *             the registers: 32 on AVX-512 and NEON, 16 on AVX2, SSE2 and WASM. Good: 14x2, 8x3, 6x4, 7x2, 14x1, 1x8;
 *             MR * NR >= 8, or the latency of the multiply-add shows.
 *   NR        output vectors of a register tile
 *   NT        vectors of the last tile: shape->vectors % NR, or NR where that is 0 (then write it like NR)
 *   EPILOGUE  function-like macro (v, r, aux) -> vf: v sum with bias, r the residual (zero without one), aux pointer to
 *             this vector's first entry of the per-channel array `aux` (e.g. slopes; `aux` may be NULL if not used)
 *   RESIDUAL  1: r is read, 0: it may be NULL
 *   bias      vectors * VL floats (zeros where there is none)
 *
 * x points at the input of the first tap of output (0, 0): there are no borders here. A padded convolution reads an
 * input with a border of zeros: layout.h makes one, or the producer writes into the middle of one (y_row, y_image).
 * 1x1 with stride 1 and no gaps between rows: write images = rows = 1 and columns = N * H * W.
 * Fully connected: columns = batch (MR = 1 for one image), depth = features, block_groups = 1.
 * Input columns right behind each other (x_tap_column == depth, as in a 3-channel stem stored without padding lanes):
 * write tap_columns = 1 and depth = kernel width * channels; the packed weights are the same.
 * A concatenation costs nothing: y = first channel of the part, y_column = channels of the whole; `lanes` keeps the
 * last vector off what follows it.
 * y may be r (in place); it must not overlap x.
 *
 * Packed weights (pack.conv_weights): groups of NR output vectors (the last: NT), each
 *   [tap row][tap column][k][vector of the group][VL], lanes behind the last output channel zero.
 * Grouped convolutions: first[g] is the first input channel of group g of NR vectors; every group reads `depth`
 * channels from there (weights of channels that do not belong are zero); pack.conv_groups finds depth and first. A
 * dense layer has first = NULL.
 *
 * Work: units of (image, block_rows rows, block_columns columns, block_groups groups of vectors), the groups innermost,
 * are split over the threads. In a unit the weights of a group stay in the cache while all its columns pass, and those
 * of the next are fetched meanwhile; behind the last group that is whatever follows in memory, so the weights of a
 * network should lie in the order of its layers. */
#ifndef FW_CONV_H
#define FW_CONV_H

#include "vector.h"

typedef struct fw_conv {
    int images, rows, columns;                         /* of the output */
    int tap_rows, tap_columns, depth;                  /* kernel height, width, input channels of a tap */
    int vectors;                                       /* output channels / VL, rounded up */
    int lanes;                                         /* 1..VL: lanes of the last vector that are stored */
    int block_rows, block_columns, block_groups;       /* a unit of work; at least 1 each */
    ptrdiff_t x_image, x_row, x_column;                /* floats from the window of an output to that of the next */
    ptrdiff_t x_tap_row, x_tap_column;                 /* floats from a tap to the next */
    ptrdiff_t y_image, y_row, y_column;                /* floats from an output to the next */
    ptrdiff_t r_image, r_row, r_column;                /* the same for the residual; 0 repeats it */
    const int *first;                                  /* NULL, or first input channel of each group of NR vectors */
} fw_conv;

/* `columns` outputs of one row for one group of vectors; `lanes` as above. Where MR does not divide `columns`, the last
 * tile moves back over columns already done and does not store those. Each step of k prefetches the line at `ahead`,
 * which moves on by `pace` bytes: so the weights of the next group come nearer while this group is in use. */
typedef void fw_conv_tile(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,
                          const float *r, float *y, int columns, int lanes, const char *ahead, ptrdiff_t pace);

#define FW_CONV_TILE(name, MR, NR, EPILOGUE, RESIDUAL)                                                                 \
    FW_NOINLINE void name(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,   \
                          const float *r, float *y, int columns, int lanes, const char *ahead, ptrdiff_t pace) {       \
        const int tap_rows = shape->tap_rows, tap_columns = shape->tap_columns, depth = shape->depth;                  \
        (void)aux, (void)r;                                                                                            \
        for (int done = 0; done < columns;) {                                                                          \
            const int start = done < columns - (MR) ? done : columns - (MR), skip = done - start;                      \
            const float *window = x + start * shape->x_column, *wk = w;                                                \
            float *out = y + start * shape->y_column;                                                                  \
            vf acc[MR][NR];                                                                                            \
            FW_UNROLL for (int n = 0; n < (NR); n++) {                                                                 \
                FW_UNROLL for (int m = 0; m < (MR); m++) acc[m][n] = vf_load(bias + n * VL);                           \
            }                                                                                                          \
            for (int ty = 0; ty < tap_rows; ty++) {                                                                    \
                for (int tx = 0; tx < tap_columns; tx++) {                                                             \
                    const char *xk = (const char *)(window + ty * shape->x_tap_row + tx * shape->x_tap_column);        \
                    FW_STRIDES(shape->x_column);                                                                       \
                    for (int k = 0; k < depth; k++, xk += sizeof(float), wk += (NR) * VL, ahead += pace) {             \
                        vf wv[NR];                                                                                     \
                        if ((MR) >= 4) FW_PREFETCH(ahead);                                                             \
                        FW_HIDE_STRIDES;                                                                               \
                        FW_UNROLL for (int n = 0; n < (NR); n++) wv[n] = vf_load(wk + n * VL);                         \
                        FW_UNROLL for (int m = 0; m < (MR); m++) {                                                     \
                            const vf xv = vf_set(*FW_ROW(xk, m));                                                      \
                            FW_UNROLL for (int n = 0; n < (NR); n++) acc[m][n] = vf_fma(xv, wv[n], acc[m][n]);         \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            FW_UNROLL for (int m = 0; m < (MR); m++) {                                                                 \
                if (m >= skip) {                                                                                       \
                    FW_UNROLL for (int n = 0; n < (NR); n++) {                                                         \
                        float *to = out + m * shape->y_column + n * VL;                                                \
                        const int part = n + 1 < (NR) ? VL : lanes;                                                    \
                        const float *from = (RESIDUAL) ? r + (start + m) * shape->r_column + n * VL : bias;            \
                        const vf rv = (RESIDUAL) ? fw_load_part(from, part) : vf_zero();                               \
                        const vf v = EPILOGUE(acc[m][n], rv, aux + n * VL);                                            \
                        (void)rv;                                                                                      \
                        fw_store_part(to, v, part);                                                                    \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            done = start + (MR);                                                                                       \
        }                                                                                                              \
    }

FW_INLINE vf fw_load_part(const float *p, int lanes) { return lanes == VL ? vf_load(p) : vf_load_n(p, lanes); }
FW_INLINE void fw_store_part(float *p, vf v, int lanes) {
    if (lanes == VL) vf_store(p, v);
    else vf_store_n(p, v, lanes);
}

FW_INLINE int fw_ceil_div(int a, int b) { return (a + b - 1) / b; }
FW_INLINE int fw_smaller(int a, int b) { return a < b ? a : b; }

static inline void fw_conv_run(const fw_conv *s, int mr, int nr, fw_conv_tile *full, fw_conv_tile *last,
                               const float *x, const float *w, const float *bias, const float *aux, const float *r,
                               float *y, int tid, int threads) {
    const int groups = fw_ceil_div(s->vectors, nr), group_units = fw_ceil_div(groups, s->block_groups);
    const int column_units = fw_ceil_div(s->columns, s->block_columns), row_units = fw_ceil_div(s->rows, s->block_rows);
    const int64_t units = (int64_t)s->images * row_units * column_units * group_units;
    const ptrdiff_t panel = (ptrdiff_t)nr * VL * s->tap_rows * s->tap_columns * s->depth;
    for (int64_t unit = units * tid / threads; unit < units * (tid + 1) / threads; unit++) {
        const int g0 = (int)(unit % group_units) * s->block_groups;
        const int c0 = (int)(unit / group_units % column_units) * s->block_columns;
        const int r0 = (int)(unit / group_units / column_units % row_units) * s->block_rows;
        const int image = (int)(unit / group_units / column_units / row_units);
        const int g1 = fw_smaller(g0 + s->block_groups, groups), r1 = fw_smaller(r0 + s->block_rows, s->rows);
        const int columns = fw_smaller(s->block_columns, s->columns - c0), tiles = fw_ceil_div(columns, mr);
        /* Bytes of the next group to fetch with each step of k, and in a row: all of them once in r1 - r0 rows. */
        const ptrdiff_t pace = fw_ceil_div(nr * VL * (int)sizeof(float), tiles * (r1 - r0));
        const ptrdiff_t share = pace * tiles * s->tap_rows * s->tap_columns * s->depth;
        for (int g = g0; g < g1; g++) {
            const ptrdiff_t channel = (ptrdiff_t)g * nr * VL;
            const float *from = x + image * s->x_image + c0 * s->x_column + (s->first ? s->first[g] : 0);
            const float *add = r ? r + image * s->r_image + c0 * s->r_column + channel : r;
            float *to = y + image * s->y_image + c0 * s->y_column + channel;
            const char *next = (const char *)(w + (g + 1) * panel);
            fw_conv_tile *tile = g + 1 < groups || s->vectors % nr == 0 ? full : last;
            for (int row = r0; row < r1; row++)
                tile(s, from + row * s->x_row, w + g * panel, bias + channel, aux ? aux + channel : aux,
                     add ? add + row * s->r_row : add, to + row * s->y_row, columns, g + 1 < groups ? VL : s->lanes,
                     next + (row - r0) * share, pace);
        }
    }
}

#define FW_DEFINE_CONV(name, MR, NR, NT, EPILOGUE, RESIDUAL)                                                           \
    FW_CONV_TILE(name##_full, MR, NR, EPILOGUE, RESIDUAL)                                                              \
    FW_CONV_TILE(name##_last, MR, NT, EPILOGUE, RESIDUAL)                                                              \
    FW_NOINLINE void name(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,   \
                          const float *r, float *y, int tid, int threads) {                                            \
        fw_conv_run(shape, MR, NR, name##_full, name##_last, x, w, bias, aux, r, y, tid, threads);                     \
    }

/* The same where NR divides the vectors: one tile function, half the code. */
#define FW_DEFINE_EVEN_CONV(name, MR, NR, EPILOGUE, RESIDUAL)                                                          \
    FW_CONV_TILE(name##_full, MR, NR, EPILOGUE, RESIDUAL)                                                              \
    FW_NOINLINE void name(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,   \
                          const float *r, float *y, int tid, int threads) {                                            \
        fw_conv_run(shape, MR, NR, name##_full, name##_full, x, w, bias, aux, r, y, tid, threads);                     \
    }

/* Epilogues that need no argument of their own. */
#define FW_EPILOGUE_NONE(v, r, aux) (v)
#define FW_EPILOGUE_RELU(v, r, aux) vf_max(v, vf_zero())
#define FW_EPILOGUE_ADD(v, r, aux) ((v) + (r))
#define FW_EPILOGUE_ADD_RELU(v, r, aux) vf_max((v) + (r), vf_zero())

#endif
