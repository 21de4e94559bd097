/* Depthwise convolution of planar float32 (the ONNX order), for regions of a network that sparse.h keeps planar. The vectors
 * run over the pixels of a row.
 *
 *   y[i][c][r][o] = EPILOGUE(bias[c] + sum over ty, tx of
 *                            x[i][c][r * S - pad_top + ty][o * S - pad_left + tx] * weight[c][ty][tx])
 * with zero outside the image.
 *
 * FW_DEFINE_PLANAR_DEPTHWISE(name, KH, KW, S, R, EPILOGUE) defines
 *   static void name(const fw_planar *shape, const float *x, const float *w, const float *bias, const float *aux,
 *                    float *y, int tid, int threads);
 *   KH, KW, S  kernel and stride (1 or 2) of both axes, literals
 *   R          output rows made together, which share the loads of their input rows: R + KH * KW + 2 registers, 4 for 3x3
 *   EPILOGUE   macro (v, r, aux) -> vf as in conv.h, r being zero and aux pointing at this channel's entry
 * Weights as in the graph, [c][KH][KW]; bias float32 [c]. Nothing is read outside x. Planes are split over the threads. */
#ifndef FW_PLANAR_H
#define FW_PLANAR_H

#include "conv.h"

typedef struct fw_planar {
    int images, channels, rows, columns;        /* of the output */
    int in_rows, in_columns, pad_top, pad_left;
} fw_planar;

/* Lanes low <= lane < high of p[lane * stride]; the others are 0 and not read. stride 1 or 2. */
FW_INLINE vf fw_planar_load(const float *p, int low, int high, const int stride) {
#if defined(FW_AVX512)
    if (stride == 1) {
        const __mmask16 mask = (__mmask16)(((1u << high) - 1u) & ~((1u << low) - 1u));
        return (vf)_mm512_maskz_loadu_ps(mask, p);
    } else {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const uint32_t mask = (uint32_t)(((1ull << (2 * high)) - 1ull) & ~((1ull << (2 * low)) - 1ull)) & 0x55555555u;
        const __m512 a = _mm512_maskz_loadu_ps((__mmask16)mask, p);
        const __m512 b = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), p + 16);
        return (vf)_mm512_permutex2var_ps(a, even, b);
    }
#else
    float lanes[VL] = {0};
    if (stride == 1 && low == 0 && high == VL) return vf_load(p);
    for (int i = low; i < high; i++) lanes[i] = p[(ptrdiff_t)i * stride];
    return vf_load(lanes);
#endif
}

#define FW_DEFINE_PLANAR_DEPTHWISE(name, KH, KW, S, R, EPILOGUE)                                                       \
    FW_INLINE void name##_tile(const fw_planar *s, const float *x, const vf *wv, float bias, const float *aux,        \
                               float *y, int row, int column, const int rows) {                                       \
        const int lanes = fw_smaller(VL, s->columns - column), left = column * (S) - s->pad_left;                      \
        int low[KW], high[KW];                                                                                         \
        vf acc[R];                                                                                                     \
        (void)aux;                                                                                                     \
        FW_UNROLL for (int r = 0; r < rows; r++) acc[r] = vf_set(bias);                                                \
        FW_UNROLL for (int tx = 0; tx < (KW); tx++) {                                                                  \
            const int first = left + tx, reach = s->in_columns - first;                                                \
            low[tx] = first < 0 ? fw_smaller(fw_ceil_div(-first, S), VL) : 0;                                          \
            high[tx] = reach < 1 ? 0 : fw_smaller(fw_ceil_div(reach, S), VL);                                          \
        }                                                                                                              \
        FW_UNROLL for (int j = 0; j < (rows - 1) * (S) + (KH); j++) {                                                  \
            const int in = row * (S) - s->pad_top + j;                                                                 \
            if (in >= 0 && in < s->in_rows) {                                                                          \
                const float *from = x + (ptrdiff_t)in * s->in_columns + left;                                          \
                FW_UNROLL for (int tx = 0; tx < (KW); tx++) {                                                          \
                    const vf xv = fw_planar_load(from + tx, low[tx], high[tx], (S));                                   \
                    FW_UNROLL for (int r = 0; r < rows; r++) {                                                         \
                        const int ty = j - r * (S);                                                                    \
                        if (ty >= 0 && ty < (KH)) acc[r] = vf_fma(xv, wv[ty * (KW) + tx], acc[r]);                     \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        FW_UNROLL for (int r = 0; r < rows; r++) {                                                                     \
            const vf zero = vf_zero(), out = EPILOGUE(acc[r], zero, aux);                                              \
            (void)zero;                                                                                                \
            fw_store_part(y + (ptrdiff_t)(row + r) * s->columns + column, out, lanes);                                 \
        }                                                                                                              \
    }                                                                                                                  \
    FW_NOINLINE void name(const fw_planar *shape, const float *x, const float *w, const float *bias,                  \
                          const float *aux, float *y, int tid, int threads) {                                         \
        const int planes = shape->images * shape->channels;                                                            \
        for (int plane = (int)((int64_t)planes * tid / threads); plane < (int)((int64_t)planes * (tid + 1) / threads); \
             plane++) {                                                                                                \
            const int c = plane % shape->channels;                                                                     \
            const float *from = x + (ptrdiff_t)plane * shape->in_rows * shape->in_columns;                             \
            const float *add = aux ? aux + c : aux;                                                                    \
            float *to = y + (ptrdiff_t)plane * shape->rows * shape->columns;                                           \
            vf wv[(KH) * (KW)];                                                                                        \
            FW_UNROLL for (int i = 0; i < (KH) * (KW); i++) wv[i] = vf_set(w[c * (KH) * (KW) + i]);                    \
            int row = 0;                                                                                               \
            for (; row + (R) <= shape->rows; row += (R)) {                                                             \
                for (int column = 0; column < shape->columns; column += VL)                                            \
                    name##_tile(shape, from, wv, bias[c], add, to, row, column, (R));                                  \
            }                                                                                                          \
            for (; row < shape->rows; row++) {                                                                         \
                for (int column = 0; column < shape->columns; column += VL)                                            \
                    name##_tile(shape, from, wv, bias[c], add, to, row, column, 1);                                    \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
