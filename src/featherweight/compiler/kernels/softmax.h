/* Softmax and normalisation of rows of float32 that lie contiguously: channels of a pixel, or the last axis.
 *
 *   fw_softmax(shape, x, y, tid, threads)      y = exp(x - max) / sum
 *   fw_log_softmax(shape, x, y, tid, threads)  y = x - max - log(sum)
 *   fw_layer_norm(shape, x, gamma, beta, epsilon, y, tid, threads)
 *       y = (x - mean) / sqrt(variance + epsilon) * gamma + beta, two passes; gamma, beta of whole vectors
 *   fw_group_norm(shape, groups, x, gamma, beta, epsilon, work, y, tid, threads)
 *       Each image is `rows_of_image` consecutive rows; its channels fall into `groups` equal groups (one a channel:
 *       instance normalisation), each normalised over rows and channels. work: 2 * vectors * VL floats per thread.
 *       Images are split over the threads; the other functions split rows.
 *
 * A row has `channels` values. Whole = 1: rows are padded to whole vectors, the padding is written too (0 in a softmax,
 * beta in a norm: pad it with zeros). Whole = 0: only the values are read and written. y may be x. */
#ifndef FW_SOFTMAX_H
#define FW_SOFTMAX_H

#include "vmath.h"

typedef struct fw_rows {
    int64_t rows;
    int channels, whole;
    ptrdiff_t x_row, y_row; /* floats from a row to the next */
    int64_t rows_of_image;  /* group norm only */
} fw_rows;

FW_INLINE int fw_part(const fw_rows *s, int at) { return s->channels - at < VL ? s->channels - at : VL; }
FW_INLINE void fw_put(const fw_rows *s, float *p, vf v, int n) {
    if (n == VL || s->whole) vf_store(p, v);
    else vf_store_n(p, v, n);
}

FW_INLINE void fw_softmax_rows(const fw_rows *s, int logarithm, const float *x, float *y, int tid, int threads) {
    for (int64_t i = s->rows * tid / threads; i < s->rows * (tid + 1) / threads; i++) {
        const float *from = x + i * s->x_row;
        float *to = y + i * s->y_row;
        vf peak = vf_set(-INFINITY), sum = vf_zero();
        for (int k = 0; k < s->channels; k += VL) peak = vf_max(peak, vf_load_fill(from + k, fw_part(s, k), -INFINITY));
        peak = vf_set(vf_peak(peak));
        for (int k = 0; k < s->channels; k += VL) {
            const int n = fw_part(s, k);
            const vf e = vf_exp(vf_load_fill(from + k, n, -INFINITY) - peak);
            sum += e;
            if (!logarithm) fw_put(s, to + k, e, n);
        }
        const float total = vf_sum(sum);
        const vf scale = vf_set(1.0f / total), shift = peak + vf_set(logf(total));
        for (int k = 0; k < s->channels; k += VL) {
            const int n = fw_part(s, k);
            if (logarithm) fw_put(s, to + k, vf_load_n(from + k, n) - shift, n);
            else fw_put(s, to + k, vf_load_n(to + k, n) * scale, n);
        }
    }
}
FW_NOINLINE void fw_softmax(const fw_rows *s, const float *x, float *y, int tid, int threads) {
    fw_softmax_rows(s, 0, x, y, tid, threads);
}
FW_NOINLINE void fw_log_softmax(const fw_rows *s, const float *x, float *y, int tid, int threads) {
    fw_softmax_rows(s, 1, x, y, tid, threads);
}

FW_NOINLINE void fw_layer_norm(const fw_rows *s, const float *x, const float *gamma, const float *beta, float epsilon,
                               float *y, int tid, int threads) {
    for (int64_t i = s->rows * tid / threads; i < s->rows * (tid + 1) / threads; i++) {
        const float *from = x + i * s->x_row;
        float *to = y + i * s->y_row;
        vf sum = vf_zero(), squares = vf_zero();
        for (int k = 0; k < s->channels; k += VL) sum += vf_load_n(from + k, fw_part(s, k));
        const float mean = vf_sum(sum) / (float)s->channels;
        for (int k = 0; k < s->channels; k += VL) {
            const vf d = vf_load_fill(from + k, fw_part(s, k), mean) - vf_set(mean);
            squares = vf_fma(d, d, squares);
        }
        const vf scale = vf_set(1.0f / sqrtf(vf_sum(squares) / (float)s->channels + epsilon)), middle = vf_set(mean);
        for (int k = 0; k < s->channels; k += VL) {
            const int n = fw_part(s, k);
            const vf v = (vf_load_n(from + k, n) - middle) * scale;
            fw_put(s, to + k, vf_fma(v, vf_load(gamma + k), vf_load(beta + k)), n);
        }
    }
}

/* Sums over the rows of an image, per channel, of x (power 1) or (x - mean)^2 (power 2), in runs of 64 rows. */
FW_INLINE void fw_row_sums(const fw_rows *s, const float *x, const float *mean, float *sums) {
    for (int k = 0; k < s->channels; k += VL) {
        const int n = fw_part(s, k);
        const vf middle = mean ? vf_load(mean + k) : vf_zero();
        vf all = vf_zero();
        for (int64_t i = 0; i < s->rows_of_image;) {
            const int64_t end = i + 64 < s->rows_of_image ? i + 64 : s->rows_of_image;
            vf part = vf_zero();
            for (; i < end; i++) {
                const vf v = vf_load_n(x + i * s->x_row + k, n) - middle;
                part += mean ? v * v : v;
            }
            all += part;
        }
        vf_store(sums + k, all);
    }
}

/* Replaces per-channel sums by their mean over each group. */
FW_INLINE void fw_group_means(const fw_rows *s, int groups, float *sums) {
    const int size = s->channels / groups;
    for (int g = 0; g < groups; g++) {
        double total = 0;
        for (int k = 0; k < size; k++) total += sums[g * size + k];
        total /= (double)size * (double)s->rows_of_image;
        for (int k = 0; k < size; k++) sums[g * size + k] = (float)total;
    }
}

FW_NOINLINE void fw_group_norm(const fw_rows *s, int groups, const float *x, const float *gamma, const float *beta,
                               float epsilon, float *work, float *y, int tid, int threads) {
    const int floats = (s->channels + VL - 1) / VL * VL;
    const int64_t images = s->rows / s->rows_of_image;
    float *scale = work + (ptrdiff_t)tid * 2 * floats, *mean = scale + floats;
    for (int64_t image = images * tid / threads; image < images * (tid + 1) / threads; image++) {
        const float *from = x + image * s->rows_of_image * s->x_row;
        float *to = y + image * s->rows_of_image * s->y_row;
        fw_row_sums(s, from, NULL, mean);
        fw_group_means(s, groups, mean);
        fw_row_sums(s, from, mean, scale);
        fw_group_means(s, groups, scale);
        for (int k = 0; k < s->channels; k++) scale[k] = gamma[k] / sqrtf(scale[k] + epsilon);
        for (int64_t i = 0; i < s->rows_of_image; i++) {
            for (int k = 0; k < s->channels; k += VL) {
                const int n = fw_part(s, k);
                const vf v = vf_load_n(from + i * s->x_row + k, n) - vf_load(mean + k);
                fw_put(s, to + i * s->y_row + k, vf_fma(v, vf_load(scale + k), vf_load(beta + k)), n);
            }
        }
    }
}

#endif
