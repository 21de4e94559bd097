/* Dense 3x3 convolution of stride 1, channels-last float32, by Winograd's F(4x4, 3x3): 36 products of matrices for 16
 * outputs that share an input window of 6x6, where the direct form has 144 (Lavin and Gray, "Fast Algorithms for
 * Convolutional Neural Networks", 2015, section 4.1).
 *
 *   y[i][r][c][o] = EPILOGUE(bias[o] + sum over ty, tx, k of x[i][r + ty][c + tx][k] * weight[o][ty][tx][k], residual)
 *
 * FW_DEFINE_WINOGRAD(name, PRODUCT, EPILOGUE, RESIDUAL) defines
 *   static void name(const fw_winograd *shape, const fw_conv *product, const float *x, const float *w,
 *                    const float *zeros, const float *bias, const float *aux, const float *r, float *y, float *scratch,
 *                    int tid, int threads);
 *   PRODUCT   a function of FW_DEFINE_CONV without epilogue and residual; `product` describes a 1x1 layer of
 *             shape->tiles columns: x_column = depth, y_column = out_vectors * VL
 *   x         at the window of output (0, 0); windows reach up to 4 * ceil(rows / 4) + 2 rows and as many columns, which
 *             must exist, zero where they lie outside the image
 *   w         the 36 transformed matrices (pack.winograd_weights), `panel` floats each, packed as conv.h wants them
 *   zeros     out_vectors * VL of them: the products have no bias
 *   scratch   36 * tiles * (depth + out_vectors * VL) floats a thread
 * Work: runs of `tiles` windows of 4x4 outputs are split over the threads. y may be r; it must not overlap x. */
#ifndef FW_WINOGRAD_H
#define FW_WINOGRAD_H

#include "conv.h"

typedef struct fw_winograd {
    int images, rows, columns;          /* of the output */
    int tiles;                          /* windows of a run */
    int depth, out_vectors, lanes;      /* input channels, a multiple of VL; lanes: of the last output vector */
    ptrdiff_t panel;
    ptrdiff_t x_image, x_row, x_column, y_image, y_row, y_column, r_image, r_row, r_column;
} fw_winograd;

/* to[i] = sum over j of B[j][i] * from[j], six values `step` vectors apart. */
FW_INLINE void fw_winograd_in(const vf *from, const int step, vf *to, const int to_step) {
    const vf four = vf_set(4.0f), five = vf_set(5.0f), two = vf_set(2.0f);
    const vf a = from[0], b = from[step], c = from[2 * step], d = from[3 * step], e = from[4 * step],
             f = from[5 * step];
    const vf even = e - four * c, odd = d - four * b, near = e - c, far = two * (d - b);
    to[0] = four * a + (e - five * c);
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = near + far;
    to[4 * to_step] = near - far;
    to[5 * to_step] = four * b + (f - five * d);
}

/* The four outputs of six products. */
FW_INLINE void fw_winograd_out(const vf *from, const int step, vf *to, const int to_step) {
    const vf a = from[0], b = from[step], c = from[2 * step], d = from[3 * step], e = from[4 * step],
             f = from[5 * step];
    const vf sum = b + c, gap = b - c, wide = d + e, apart = d - e;
    to[0] = a + sum + wide;
    to[to_step] = gap + vf_set(2.0f) * apart;
    to[2 * to_step] = sum + vf_set(4.0f) * wide;
    to[3 * to_step] = gap + vf_set(8.0f) * apart + f;
}

/* One window of VL channels to its 36 places, `place` floats apart. */
FW_INLINE void fw_winograd_gather(const fw_winograd *s, const float *x, float *to, ptrdiff_t place) {
    vf window[36], middle[36];
    FW_UNROLL for (int j = 0; j < 6; j++) {
        FW_UNROLL for (int i = 0; i < 6; i++) window[6 * j + i] = vf_load(x + j * s->x_row + i * s->x_column);
        fw_winograd_in(window + 6 * j, 1, middle + 6 * j, 1);
    }
    FW_UNROLL for (int i = 0; i < 6; i++) fw_winograd_in(middle + i, 6, window + i, 6);
    FW_UNROLL for (int p = 0; p < 36; p++) vf_store(to + p * place, window[p]);
}

#define FW_DEFINE_WINOGRAD(name, PRODUCT, EPILOGUE, RESIDUAL)                                                          \
    FW_INLINE void name##_scatter(const fw_winograd *s, const float *from, ptrdiff_t place, const float *bias,         \
                                  const float *aux, const float *r, float *y, int rows, int columns, int lanes) {      \
        vf window[24], out[16];                                                                                        \
        (void)aux, (void)r;                                                                                            \
        FW_UNROLL for (int i = 0; i < 6; i++) {                                                                        \
            vf column[6];                                                                                              \
            FW_UNROLL for (int j = 0; j < 6; j++) column[j] = vf_load(from + (6 * j + i) * place);                     \
            fw_winograd_out(column, 1, window + i, 6);                                                                 \
        }                                                                                                              \
        FW_UNROLL for (int j = 0; j < 4; j++) fw_winograd_out(window + 6 * j, 1, out + 4 * j, 1);                      \
        FW_UNROLL for (int j = 0; j < 4; j++) {                                                                        \
            FW_UNROLL for (int i = 0; i < 4; i++) {                                                                    \
                if (j < rows && i < columns) {                                                                         \
                    const float *add = (RESIDUAL) ? r + j * s->r_row + i * s->r_column : bias;                         \
                    const vf rv = (RESIDUAL) ? fw_load_part(add, lanes) : vf_zero();                                   \
                    const vf v = EPILOGUE(out[4 * j + i] + vf_load(bias), rv, aux);                                    \
                    (void)rv;                                                                                          \
                    fw_store_part(y + j * s->y_row + i * s->y_column, v, lanes);                                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_winograd *s, const fw_conv *product, const float *x, const float *w,                \
                          const float *zeros, const float *bias, const float *aux, const float *r, float *y,           \
                          float *scratch, int tid, int threads) {                                                      \
        const int across = fw_ceil_div(s->columns, 4), down = fw_ceil_div(s->rows, 4), vectors = s->out_vectors;       \
        const int64_t windows = (int64_t)s->images * down * across, runs = (windows + s->tiles - 1) / s->tiles;        \
        const ptrdiff_t in = (ptrdiff_t)s->tiles * s->depth, out = (ptrdiff_t)s->tiles * vectors * VL;                 \
        float *from = scratch + tid * 36 * (in + out), *sums = from + 36 * in;                                         \
        for (int64_t run = runs * tid / threads; run < runs * (tid + 1) / threads; run++) {                            \
            const int64_t first = run * s->tiles;                                                                      \
            const int count = windows - first < s->tiles ? (int)(windows - first) : s->tiles;                          \
            for (int t = 0; t < count; t++) {                                                                          \
                const int64_t window = first + t, image = window / across / down;                                      \
                const int row = (int)(window / across % down) * 4, column = (int)(window % across) * 4;                \
                const float *at = x + image * s->x_image + row * s->x_row + column * s->x_column;                      \
                for (int c = 0; c < s->depth; c += VL) fw_winograd_gather(s, at + c, from + t * s->depth + c, in);     \
            }                                                                                                          \
            for (int p = 0; p < 36; p++) {                                                                             \
                PRODUCT(product, from + p * in, w + p * s->panel, zeros, NULL, NULL, sums + p * out, 0, 1);            \
            }                                                                                                          \
            for (int t = 0; t < count; t++) {                                                                          \
                const int64_t window = first + t, image = window / across / down;                                      \
                const int row = (int)(window / across % down) * 4, column = (int)(window % across) * 4;                \
                float *to = y + image * s->y_image + row * s->y_row + column * s->y_column;                            \
                const float *add = r ? r + image * s->r_image + row * s->r_row + column * s->r_column : r;             \
                for (int v = 0; v < vectors; v++) {                                                                    \
                    name##_scatter(s, sums + ((ptrdiff_t)t * vectors + v) * VL, out, bias + v * VL,                    \
                                   aux ? aux + v * VL : aux, add ? add + v * VL : add, to + v * VL, s->rows - row,     \
                                   s->columns - column, v + 1 < vectors ? VL : s->lanes);                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
