/* Depthwise convolution of planar float32, for regions of a network that sparse.h keeps planar. The vectors run over
 * the pixels of a row.
 *
 *   y[i][c][r][o] = EPILOGUE(bias[c] + sum over ty, tx of
 *                            x[i][c][r * S - pad_top + ty][o * S - pad_left + tx] * weight[c][ty][tx])
 * with zero outside the image.
 *
 * FW_DEFINE_PLANAR_DEPTHWISE(name, KH, KW, S, R, EPILOGUE) defines
 *   static void name(const fw_planar *shape, const float *x, const float *w, const float *bias, const float *aux,
 *                    float *y, int tid, int threads);
 *   static inline void name##_rows(const fw_planar *shape, const float *x, const float *w, float bias,
 *                                  const float *aux, float *y, int row, int end);   rows of one channel of one image
 *   KH, KW, S  kernel and stride (1 or 2) of both axes, literals
 *   R          output rows made together, which share the loads of their input rows: R + KH * KW + 2 registers, 7 or 14
 *              for 3x3 (a divisor of the rows is best)
 *   EPILOGUE   macro (v, r, aux) -> vf as in conv.h, r being zero and aux pointing at this channel's entry
 * Rows lie right behind each other, planes x_plane and y_plane floats apart. Weights as in the graph, [c][KH][KW]; bias
 * float32 [c]. Nothing is read outside a plane. Planes are split over the threads. */
#ifndef FW_PLANAR_H
#define FW_PLANAR_H

#include "conv.h"

typedef struct fw_planar {
    int images, channels, rows, columns;        /* of the output */
    int in_rows, in_columns, pad_top, pad_left, taps; /* taps: of the kernel */
    ptrdiff_t x_plane, y_plane;                 /* floats; an image is `channels` planes */
} fw_planar;

/* Which of the 2 * VL columns from some column on lie inside the image. */
#if defined(FW_AVX512)
typedef struct { __mmask16 near, far; } fw_planar_span;
#else
typedef struct { int low, high; } fw_planar_span;
#endif
FW_INLINE fw_planar_span fw_planar_inside(int first, int columns) {
    const int low = first < 0 ? fw_smaller(-first, 2 * VL) : 0;
    const int high = columns < first ? 0 : fw_smaller(columns - first, 2 * VL);
#if defined(FW_AVX512)
    const uint64_t bits = (((uint64_t)1 << high) - 1) & ~(((uint64_t)1 << low) - 1);
    const fw_planar_span span = {(__mmask16)bits, (__mmask16)(bits >> 16)};
#else
    const fw_planar_span span = {low, high};
#endif
    return span;
}

/* taps[t] = from[t + stride * lane] for every lane, 0 outside the image: one input row as kw taps see it. */
FW_INLINE void fw_planar_taps(const float *from, const fw_planar_span *spans, const int kw, const int stride, vf *taps) {
#if defined(FW_AVX512)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    FW_UNROLL for (int t = 0; t < kw; t += stride) {
        const __m512 a = _mm512_maskz_loadu_ps(spans[t].near, from + t);
        if (stride == 1) {
            taps[t] = (vf)a;
        } else {
            const __m512 b = _mm512_maskz_loadu_ps(spans[t].far, from + t + VL);
            taps[t] = (vf)_mm512_permutex2var_ps(a, even, b);
            if (t + 1 < kw) taps[t + 1] = (vf)_mm512_permutex2var_ps(a, odd, b);
        }
    }
#else
    FW_UNROLL for (int t = 0; t < kw; t++) {
        float lanes[VL] = {0};
        for (int i = 0; i < VL; i++) {
            if (i * stride >= spans[t].low && i * stride < spans[t].high) lanes[i] = from[t + (ptrdiff_t)i * stride];
        }
        taps[t] = stride == 1 && spans[t].low == 0 && spans[t].high >= VL ? vf_load(from + t) : vf_load(lanes);
    }
#endif
}

#define FW_DEFINE_PLANAR_DEPTHWISE(name, KH, KW, S, R, EPILOGUE)                                                       \
    /* `rows` output rows of VL columns; edge: some of their input rows lie outside. */                                \
    FW_INLINE void name##_tile(const fw_planar *s, const float *x, const vf *wv, float bias, const float *aux,        \
                               float *y, int row, int column, const int rows, const int edge) {                       \
        const int left = column * (S) - s->pad_left, top = row * (S) - s->pad_top;                                     \
        const int in_rows = s->in_rows, in_columns = s->in_columns, columns = s->columns;                              \
        const float *from = x + (ptrdiff_t)top * in_columns + left;                                                    \
        fw_planar_span spans[KW];                                                                                      \
        vf acc[R];                                                                                                     \
        (void)aux, (void)in_rows;                                                                                      \
        FW_UNROLL for (int t = 0; t < (KW); t++) spans[t] = fw_planar_inside(left + t, in_columns);                    \
        FW_UNROLL for (int r = 0; r < rows; r++) acc[r] = vf_set(bias);                                                \
        FW_UNROLL for (int j = 0; j < (rows - 1) * (S) + (KH); j++, from += in_columns) {                              \
            if (!edge || (top + j >= 0 && top + j < in_rows)) {                                                        \
                vf taps[KW];                                                                                           \
                fw_planar_taps(from, spans, (KW), (S), taps);                                                          \
                FW_UNROLL for (int t = 0; t < (KW); t++) {                                                             \
                    FW_UNROLL for (int r = 0; r < rows; r++) {                                                         \
                        const int ty = j - r * (S);                                                                    \
                        if (ty >= 0 && ty < (KH)) acc[r] = vf_fma(taps[t], wv[ty * (KW) + t], acc[r]);                 \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        FW_UNROLL for (int r = 0; r < rows; r++) {                                                                     \
            const vf zero = vf_zero(), out = EPILOGUE(acc[r], zero, aux);                                              \
            (void)zero;                                                                                                \
            fw_store_part(y + (ptrdiff_t)(row + r) * columns + column, out, fw_smaller(VL, columns - column));         \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INLINE void name##_rows(const fw_planar *s, const float *x, const float *w, float bias, const float *aux,       \
                               float *y, int row, int end) {                                                           \
        const int room = s->in_rows + s->pad_top - ((R) - 1) * (S) - (KH), columns = s->columns;                       \
        vf wv[(KH) * (KW)];                                                                                            \
        FW_UNROLL for (int i = 0; i < (KH) * (KW); i++) wv[i] = vf_set(w[i]);                                          \
        for (; row + (R) <= end; row += (R)) {                                                                         \
            const int edge = row * (S) < s->pad_top || row * (S) > room;                                               \
            for (int column = 0; column < columns; column += VL) {                                                     \
                if (edge) name##_tile(s, x, wv, bias, aux, y, row, column, (R), 1);                                    \
                else name##_tile(s, x, wv, bias, aux, y, row, column, (R), 0);                                         \
            }                                                                                                          \
        }                                                                                                              \
        for (; row < end; row++) {                                                                                     \
            for (int column = 0; column < columns; column += VL)                                                       \
                name##_tile(s, x, wv, bias, aux, y, row, column, 1, 1);                                                \
        }                                                                                                              \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_planar *shape, const float *x, const float *w, const float *bias,                  \
                          const float *aux, float *y, int tid, int threads) {                                         \
        const int64_t planes = (int64_t)shape->images * shape->channels;                                               \
        for (int64_t plane = planes * tid / threads; plane < planes * (tid + 1) / threads; plane++) {                  \
            const int c = (int)(plane % shape->channels);                                                              \
            name##_rows(shape, x + plane * shape->x_plane, w + c * (KH) * (KW), bias[c], aux ? aux + c : aux,          \
                        y + plane * shape->y_plane, 0, shape->rows);                                                   \
        }                                                                                                              \
    }

#endif
