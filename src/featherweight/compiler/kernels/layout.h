/* Moves between `plain` (row-major) and `pixel` (channels last) float32, and borders of zeros.
 *
 *   fw_to_pixel(shape, x, y, tid, threads)    plain [image][channel][row][column] -> pixel; its planes may lie apart
 *   fw_from_pixel(shape, x, y, tid, threads)  pixel -> plain
 *   fw_pad(shape, x, y, tid, threads)         pixel -> pixel with a border of zeros, for conv.h
 *
 * The pixel side has strides: pixel_image, pixel_row, pixel_column floats. Inside a pixel `channels` are moved and, up
 * to `stored` >= channels, zeros are written (stored = channels = pixel_column packs 3 channels tightly for a stem).
 * top, left, bottom, right: pixels of zeros that fw_to_pixel and fw_pad write around; y is the corner of the border,
 * pixel_row and pixel_image cover it. fw_pad reads x with x_image, x_row and pixel_column, and moves `stored` floats.
 * Work: rows of all images are split over the threads. */
#ifndef FW_LAYOUT_H
#define FW_LAYOUT_H

#include "vector.h"

typedef struct fw_layout {
    int images, channels, rows, columns, stored;
    int top, left, bottom, right;
    ptrdiff_t pixel_image, pixel_row, pixel_column;
    ptrdiff_t x_image, x_row; /* fw_pad only */
    ptrdiff_t plane;          /* of the plain side: floats from a plane to the next, 0: rows * columns */
} fw_layout;

/* A square of VL x VL floats, transposed: from[i][j] -> to[j][i]. Only `height` rows and `width` columns of `from`
 * exist; missing rows are zeros. `stored` floats of each row of `to` are written. */
FW_INLINE void fw_transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row, int height, int width,
                            int stored) {
#if defined(FW_WASM)
    /* In registers: Clang 14 loses lanes of the loops below. */
    v128_t v[4];
    FW_UNROLL for (int i = 0; i < 4; i++)
        v[i] = (v128_t)(i < height ? vf_load_n(from + i * from_row, width) : vf_zero());
    const v128_t a = wasm_i32x4_shuffle(v[0], v[1], 0, 4, 1, 5), b = wasm_i32x4_shuffle(v[0], v[1], 2, 6, 3, 7);
    const v128_t c = wasm_i32x4_shuffle(v[2], v[3], 0, 4, 1, 5), d = wasm_i32x4_shuffle(v[2], v[3], 2, 6, 3, 7);
    v[0] = wasm_i64x2_shuffle(a, c, 0, 2), v[1] = wasm_i64x2_shuffle(a, c, 1, 3);
    v[2] = wasm_i64x2_shuffle(b, d, 0, 2), v[3] = wasm_i64x2_shuffle(b, d, 1, 3);
    FW_UNROLL for (int j = 0; j < 4; j++)
        if (j < width) vf_store_n(to + j * to_row, (vf)v[j], stored);
#else
    float square[VL][VL];
    for (int i = 0; i < VL; i++)
        vf_store(square[i], i < height ? vf_load_n(from + i * from_row, width) : vf_zero());
    for (int j = 0; j < width; j++) {
        float lanes[VL];
        for (int i = 0; i < VL; i++) lanes[i] = square[i][j];
        vf_store_n(to + j * to_row, vf_load(lanes), stored);
    }
#endif
}

FW_INLINE int fw_at_most(int a, int b) { return a < b ? a : b; }

FW_INLINE void fw_zeros(float *p, ptrdiff_t count) { memset(p, 0, (size_t)count * sizeof(float)); }

/* Zeros left and right of a row, and whole rows above and below when it is the first or the last. `y` is the row's
 * first pixel inside the border. */
FW_INLINE void fw_border(const fw_layout *s, int row, float *y) {
    const ptrdiff_t width = (s->left + s->columns + s->right) * s->pixel_column;
    float *start = y - s->left * s->pixel_column;
    fw_zeros(start, s->left * s->pixel_column);
    fw_zeros(y + s->columns * s->pixel_column, s->right * s->pixel_column);
    if (row == 0)
        for (int r = 1; r <= s->top; r++) fw_zeros(start - r * s->pixel_row, width);
    if (row == s->rows - 1)
        for (int r = 1; r <= s->bottom; r++) fw_zeros(start + r * s->pixel_row, width);
}

/* The common image: three planes to three floats a pixel, in a form that compilers turn into vectors. */
static inline void fw_interleave3(const float *restrict a, const float *restrict b, const float *restrict c,
                                  float *restrict to, int count) {
    for (int i = 0; i < count; i++) {
        to[3 * i] = a[i];
        to[3 * i + 1] = b[i];
        to[3 * i + 2] = c[i];
    }
}

FW_NOINLINE void fw_to_pixel(const fw_layout *s, const float *x, float *y, int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows;
    const ptrdiff_t plane = s->plane ? s->plane : (ptrdiff_t)s->rows * s->columns;
    for (int64_t i = rows * tid / threads; i < rows * (tid + 1) / threads; i++) {
        const int image = (int)(i / s->rows), row = (int)(i % s->rows);
        const float *from = x + image * s->channels * plane + (ptrdiff_t)row * s->columns;
        float *to = y + image * s->pixel_image + (row + s->top) * s->pixel_row + s->left * s->pixel_column;
        fw_border(s, row, to);
        if (s->channels == 3 && s->stored == 3 && s->pixel_column == 3) {
            fw_interleave3(from, from + plane, from + 2 * plane, to, s->columns);
            continue;
        }
        if (s->stored <= 4) {
            for (int c = 0; c < s->columns; c++)
                for (int k = 0; k < s->stored; k++)
                    to[c * s->pixel_column + k] = k < s->channels ? from[k * plane + c] : 0.0f;
            continue;
        }
        for (int k = 0; k < s->stored; k += VL)
            for (int c = 0; c < s->columns; c += VL)
                fw_transpose(from + k * plane + c, plane, to + c * s->pixel_column + k, s->pixel_column,
                             s->channels - k, fw_at_most(VL, s->columns - c), fw_at_most(VL, s->stored - k));
    }
}

FW_NOINLINE void fw_from_pixel(const fw_layout *s, const float *x, float *y, int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows;
    const ptrdiff_t plane = s->plane ? s->plane : (ptrdiff_t)s->rows * s->columns;
    for (int64_t i = rows * tid / threads; i < rows * (tid + 1) / threads; i++) {
        const int image = (int)(i / s->rows), row = (int)(i % s->rows);
        const float *from = x + image * s->pixel_image + row * s->pixel_row;
        float *to = y + image * s->channels * plane + (ptrdiff_t)row * s->columns;
        for (int k = 0; k < s->channels; k += VL)
            for (int c = 0; c < s->columns; c += VL)
                fw_transpose(from + c * s->pixel_column + k, s->pixel_column, to + k * plane + c, plane,
                             s->columns - c, fw_at_most(VL, s->channels - k), fw_at_most(VL, s->columns - c));
    }
}

FW_NOINLINE void fw_pad(const fw_layout *s, const float *x, float *y, int tid, int threads) {
    const int64_t rows = (int64_t)s->images * s->rows;
    for (int64_t i = rows * tid / threads; i < rows * (tid + 1) / threads; i++) {
        const int image = (int)(i / s->rows), row = (int)(i % s->rows);
        const float *from = x + image * s->x_image + row * s->x_row;
        float *to = y + image * s->pixel_image + (row + s->top) * s->pixel_row + s->left * s->pixel_column;
        fw_border(s, row, to);
        memcpy(to, from, ((size_t)(s->columns - 1) * (size_t)s->pixel_column + (size_t)s->stored) * sizeof(float));
    }
}

#endif
