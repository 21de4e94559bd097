/* Channels-last float32 with every channel written `times` times side by side, for a depthwise convolution with several
 * filters a channel.
 *
 *   y[i][r][c][k] = x[i][r][c][k / times]
 *
 *   fw_repeat(shape, x, y, tid, threads)
 * Whole vectors are read and written: up to a vector behind the last pixel of x.
 * Work: rows of all images are split over the threads. */
#ifndef FW_REPEAT_H
#define FW_REPEAT_H

#include "vector.h"

typedef struct fw_repeated {
    int images, rows, columns, times;
    int vectors;                                       /* of an output pixel */
    ptrdiff_t x_image, x_row, x_column;                /* floats */
    ptrdiff_t y_image, y_row, y_column;
} fw_repeated;

/* Lane i of the result: from[place[i]]. */
FW_INLINE vf fw_spread(const float *from, const int32_t *place) {
#if defined(FW_AVX512)
    return (vf)_mm512_permutexvar_ps(_mm512_loadu_si512(place), (__m512)vf_load(from));
#elif defined(FW_AVX2)
    return (vf)_mm256_permutevar8x32_ps((__m256)vf_load(from), _mm256_loadu_si256((const __m256i *)(const void *)place));
#else
    float lanes[VL];
    for (int i = 0; i < VL; i++) lanes[i] = from[place[i]];
    return vf_load(lanes);
#endif
}

FW_NOINLINE void fw_repeat(const fw_repeated *s, const float *x, float *y, int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows;
    for (int v = 0; v < s->vectors; v++) {
        const int first = v * VL / s->times;
        int32_t place[VL];
        for (int i = 0; i < VL; i++) place[i] = (v * VL + i) / s->times - first;
        for (int64_t i = rows * tid / threads; i < rows * (tid + 1) / threads; i++) {
            const float *from = x + i / s->rows * s->x_image + i % s->rows * s->x_row + first;
            float *to = y + i / s->rows * s->y_image + i % s->rows * s->y_row + v * VL;
            for (int c = 0; c < s->columns; c++)
                vf_store(to + c * s->y_column, fw_spread(from + c * s->x_column, place));
        }
    }
}

#endif
