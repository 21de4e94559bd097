/* What stands between 8-bit convolutions: tables, sums, products, pools, copies, borders and the ways in and out.
 * Conventions in int8_vector.h. `n` bytes (or floats) are split over the threads in runs of 64; pixels in whole pixels.
 * Nothing is read or written outside the n elements or the channels named. y may be x (or a, b) unless said otherwise.
 *
 *   fw_u8_flip        y = x ^ 128: signed to unsigned and back
 *   fw_u8_table       y = table[x]: every function of one 8-bit tensor, and every change of scale
 *   fw_u8_quantise    y = clamp(rint(x / scale) + zero, 0, 255) of float32; NaN gives 0 (before zero: the lowest)
 *   fw_u8_dequantise  y = (x - zero) * scale
 *   fw_u8_add         y = clamp(rint((a - a_zero) * a_ratio + (b - b_zero) * b_ratio) + zero, lo, hi); ratio = scale / y's
 *   fw_u8_multiply    y = clamp(rint((a - a_zero) * (b - b_zero) * ratio) + zero, lo, hi); ratio = scale_a * scale_b / y's
 *   fw_u8_gate        the same with b[channel] for every pixel of an image (squeeze-excite)
 *   fw_u8_global_pool y[channel] = clamp(rint((sum over pixels of x - pixels * zero_x) * ratio) + zero, 0, 255);
 *                     ratio = scale_x / (pixels * scale_y)
 *   fw_u8_pool        windows: greatest value, or average over the window's columns inside the image (or all its taps)
 *   fw_u8_pad         a copy with a border of the zero point
 *   fw_u8_copy        channels of each pixel to another place, by way of a table or as they are (concat, split, slice)
 *   fw_u8_gather      y[pixel][c] = x[pixel][index[c]] (channel shuffle, Gather); y is not x
 *   fw_u8_image       planar float32 [planes][rows][columns] to u8 pixels inside a border, quantised
 *   fw_u8_planar      u8 pixels to planar u8 (leaving the network, or before Flatten) */
#ifndef FW_INT8_ELEMENTWISE_H
#define FW_INT8_ELEMENTWISE_H

#include "int8_vector.h"

typedef struct fw_u8_binary {
    int a_zero, b_zero, zero, lo, hi;
    float a_ratio, b_ratio; /* multiply and gate: a_ratio alone */
} fw_u8_binary;

typedef struct fw_u8_window {
    int images, rows, columns, in_rows, in_columns, blocks; /* output; input; channels / 16, rounded up */
    int tap_rows, tap_columns, stride_rows, stride_columns, pad_top, pad_left;
    int average;   /* 0: maximum; 1: average of the taps inside the image; 2: of all taps, outside ones being zero */
    int x_zero, zero;
    float ratio;   /* average: scale_x / scale_y */
    ptrdiff_t x_image, x_row, x_column, y_image, y_row, y_column;
} fw_u8_window;

/* Runs the statements with i, the first of up to 16 elements, and lanes, their count, for this thread's part of n. */
#define FW_U8_LOOP(n, ...)                                                                                             \
    {                                                                                                                  \
        const ptrdiff_t runs = ((n) + 63) / 64, stop = runs * (tid + 1) / threads * 64, last = stop < (n) ? stop : (n); \
        ptrdiff_t i;                                                                                                   \
        for (i = runs * tid / threads * 64; i + 16 <= last; i += 16) {                                                 \
            const int lanes = 16;                                                                                      \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
        if (i < last) {                                                                                                \
            const int lanes = (int)(last - i);                                                                         \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    }

FW_INT8_INLINE fw_i32 fw_u8_load(const uint8_t *p, int lanes)
{
    uint8_t part[16] = {0};
    if (lanes == 16)
        return fw_i32_u8(p);
    memcpy(part, p, (size_t)lanes);
    return fw_i32_u8(part);
}

FW_INT8_FUNCTION void fw_u8_flip(const uint8_t *x, uint8_t *y, ptrdiff_t n, int tid, int threads)
{
    ptrdiff_t i;
    for (i = n * tid / threads; i < n * (tid + 1) / threads; ++i)
        y[i] = x[i] ^ 128;
}

#if defined(FW_INT8_512)
FW_INT8_INLINE __mmask64 fw_u8_first(ptrdiff_t n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}
#endif

/* A short memmove. */
FW_INT8_INLINE void fw_u8_move(uint8_t *y, const uint8_t *x, ptrdiff_t n)
{
#if defined(FW_INT8_512)
    for (; n > 0; n -= 64, x += 64, y += 64)
        _mm512_mask_storeu_epi8(y, fw_u8_first(n), _mm512_maskz_loadu_epi8(fw_u8_first(n), x));
#else
    memmove(y, x, (size_t)n);
#endif
}

FW_INT8_FUNCTION void fw_u8_table(const uint8_t *x, uint8_t *y, ptrdiff_t n, const uint8_t *table, int tid, int threads)
{
    const ptrdiff_t last = n * (tid + 1) / threads;
    ptrdiff_t i = n * tid / threads;
#if defined(FW_INT8_512) && defined(__AVX512VBMI__)
    const fw_u8_lookup all = fw_u8_lookup_load(table);
    for (; i < last; i += 64) {
        const __mmask64 part = fw_u8_first(last - i);
        _mm512_mask_storeu_epi8(y + i, part, fw_u8_lookup_of(&all, _mm512_maskz_loadu_epi8(part, x + i)));
    }
#else
    for (; i < last; ++i)
        y[i] = table[x[i]];
#endif
}

/* rint(x / scale) within -256..256. AVX-512 multiplies by 1 / scale and divides only where that is too near a half to tell. */
FW_INT8_INLINE fw_i32 fw_u8_divide(fw_f32 x, float scale)
{
#if defined(FW_INT8_512)
    const __m512 t = fw_f32_clamp(_mm512_mul_ps(x, _mm512_set1_ps(1.0f / scale)), -256.0f, 256.0f);
    const __m512 off = _mm512_abs_ps(_mm512_sub_ps(t, _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT)));
    if (!_mm512_cmp_ps_mask(off, _mm512_set1_ps(0.499f), _CMP_GT_OQ) && scale > 1e-30f && scale < 1e30f)
        return fw_i32_rint(t);
#endif
    return fw_i32_rint(fw_f32_clamp(fw_f32_div(x, fw_f32_set(scale)), -256.0f, 256.0f));
}

FW_INT8_FUNCTION void fw_u8_quantise(const float *x, uint8_t *y, ptrdiff_t n, float scale, int zero, int tid, int threads)
{
    FW_U8_LOOP(n, {
        float part[16] = {0};
        const float *from = x + i;
        if (lanes < 16) {
            memcpy(part, from, (size_t)lanes * sizeof(float));
            from = part;
        }
        fw_u8_store(y + i, fw_u8_divide(fw_f32_load(from), scale), zero, 0, 255, lanes);
    })
}

FW_INT8_FUNCTION void fw_u8_dequantise(const uint8_t *x, float *y, ptrdiff_t n, float scale, int zero, int tid,
                                       int threads)
{
    const fw_f32 by = fw_f32_set(scale);
    const fw_i32 less = fw_i32_set(zero);
    FW_U8_LOOP(n, {
        fw_f32_store(y + i, fw_f32_mul(fw_f32_i32(fw_i32_sub(fw_u8_load(x + i, lanes), less)), by), lanes);
    })
}

FW_INT8_FUNCTION void fw_u8_add(const fw_u8_binary *s, const uint8_t *a, const uint8_t *b, uint8_t *y, ptrdiff_t n, int tid,
                                int threads)
{
    const fw_f32 ra = fw_f32_set(s->a_ratio), rb = fw_f32_set(s->b_ratio);
    const fw_i32 za = fw_i32_set(s->a_zero), zb = fw_i32_set(s->b_zero);
    FW_U8_LOOP(n, {
        const fw_f32 va = fw_f32_mul(fw_f32_i32(fw_i32_sub(fw_u8_load(a + i, lanes), za)), ra);
        const fw_f32 vb = fw_f32_mul(fw_f32_i32(fw_i32_sub(fw_u8_load(b + i, lanes), zb)), rb);
        fw_u8_store(y + i, fw_i32_rint(fw_f32_add(va, vb)), s->zero, s->lo, s->hi, lanes);
    })
}

FW_INT8_INLINE void fw_u8_product(const fw_u8_binary *s, const uint8_t *a, const uint8_t *b, uint8_t *y, int lanes)
{
    const fw_i32 va = fw_i32_sub(fw_u8_load(a, lanes), fw_i32_set(s->a_zero));
    const fw_i32 vb = fw_i32_sub(fw_u8_load(b, lanes), fw_i32_set(s->b_zero));
    const fw_f32 t = fw_f32_mul(fw_f32_i32(fw_i32_mul(va, vb)), fw_f32_set(s->a_ratio));
    fw_u8_store(y, fw_i32_rint(t), s->zero, s->lo, s->hi, lanes);
}

FW_INT8_FUNCTION void fw_u8_multiply(const fw_u8_binary *s, const uint8_t *a, const uint8_t *b, uint8_t *y, ptrdiff_t n,
                                     int tid, int threads)
{
    FW_U8_LOOP(n, fw_u8_product(s, a + i, b + i, y + i, lanes);)
}

/* pixels of one image, `column` bytes each; the gate b has as many bytes. */
FW_INT8_FUNCTION void fw_u8_gate(const fw_u8_binary *s, const uint8_t *a, const uint8_t *b, uint8_t *y, int pixels,
                                 int column, int tid, int threads)
{
    int p, c;
    for (p = fw_int8_begin(pixels, tid, threads); p < fw_int8_begin(pixels, tid + 1, threads); ++p)
        for (c = 0; c < column; c += 16)
            fw_u8_product(s, a + (ptrdiff_t)p * column + c, b + c, y + (ptrdiff_t)p * column + c,
                          column - c < 16 ? column - c : 16);
}

/* One image: blocks of 16 channels are split over the threads; at most 2^23 pixels. */
FW_INT8_FUNCTION void fw_u8_global_pool(const uint8_t *x, uint8_t *y, int pixels, ptrdiff_t x_column, int blocks, int x_zero,
                                        float ratio, int zero, int tid, int threads)
{
    int block, p;
    for (block = fw_int8_begin(blocks, tid, threads); block < fw_int8_begin(blocks, tid + 1, threads); ++block) {
        fw_i32 sum = fw_i32_set(-pixels * x_zero);
        for (p = 0; p < pixels; ++p)
            sum = fw_i32_add(sum, fw_i32_u8(x + p * x_column + 16 * block));
        fw_u8_store(y + 16 * block, fw_i32_rint(fw_f32_mul(fw_f32_i32(sum), fw_f32_set(ratio))), zero, 0, 255, 16);
    }
}

FW_INT8_FUNCTION void fw_u8_pool(const fw_u8_window *s, const uint8_t *x, uint8_t *y, int tid, int threads)
{
    const int lines = s->images * s->rows;
    int item, column, block, ty, tx;
    for (item = fw_int8_begin(lines, tid, threads); item < fw_int8_begin(lines, tid + 1, threads); ++item) {
        const int image = item / s->rows, row = item % s->rows, top = row * s->stride_rows - s->pad_top;
        const int y0 = top < 0 ? 0 : top, y1 = top + s->tap_rows < s->in_rows ? top + s->tap_rows : s->in_rows;
        for (column = 0; column < s->columns; ++column) {
            const int left = column * s->stride_columns - s->pad_left, x0 = left < 0 ? 0 : left;
            const int x1 = left + s->tap_columns < s->in_columns ? left + s->tap_columns : s->in_columns;
            const int inside = (y1 - y0) * (x1 - x0), taps = s->average == 2 ? s->tap_rows * s->tap_columns : inside;
            uint8_t *to = y + image * s->y_image + row * s->y_row + column * s->y_column;
            for (block = 0; block < s->blocks; ++block) {
                const uint8_t *from = x + image * s->x_image + 16 * block;
                fw_i32 all = fw_i32_set(s->average ? -inside * s->x_zero : 0);
                for (ty = y0; ty < y1; ++ty)
                    for (tx = x0; tx < x1; ++tx) {
                        const fw_i32 v = fw_i32_u8(from + ty * s->x_row + tx * s->x_column);
                        all = s->average ? fw_i32_add(all, v) : fw_i32_max(all, v);
                    }
                if (s->average)
                    all = fw_i32_rint(fw_f32_mul(fw_f32_i32(all), fw_f32_set(s->ratio / (float)(taps ? taps : 1))));
                fw_u8_store(to + 16 * block, all, s->average ? s->zero : 0, 0, 255, 16);
            }
        }
    }
}

/* rows x columns pixels of `pixel` bytes into the middle of a border of `value`; y: (rows + top + bottom) x (columns + left +
 * right) dense pixels, one image. */
FW_INT8_FUNCTION void fw_u8_pad(const uint8_t *x, uint8_t *y, int rows, int columns, int pixel, int top, int left, int bottom,
                                int right, int value, int tid, int threads)
{
    const int wide = columns + left + right, tall = rows + top + bottom;
    int row;
    for (row = fw_int8_begin(tall, tid, threads); row < fw_int8_begin(tall, tid + 1, threads); ++row) {
        uint8_t *to = y + (ptrdiff_t)row * wide * pixel;
        if (row < top || row >= top + rows) {
            memset(to, value, (size_t)wide * (size_t)pixel);
        } else {
            memset(to, value, (size_t)left * (size_t)pixel);
            memcpy(to + (ptrdiff_t)left * pixel, x + (ptrdiff_t)(row - top) * columns * pixel,
                   (size_t)columns * (size_t)pixel);
            memset(to + (ptrdiff_t)(left + columns) * pixel, value, (size_t)right * (size_t)pixel);
        }
    }
}

FW_INT8_FUNCTION void fw_u8_copy(const uint8_t *x, ptrdiff_t x_column, uint8_t *y, ptrdiff_t y_column, int pixels,
                                 int channels, const uint8_t *table, int tid, int threads)
{
    int p;
    for (p = fw_int8_begin(pixels, tid, threads); p < fw_int8_begin(pixels, tid + 1, threads); ++p) {
        if (table)
            fw_u8_table(x + p * x_column, y + p * y_column, channels, table, 0, 1);
        else
            fw_u8_move(y + p * y_column, x + p * x_column, channels);
    }
}

FW_INT8_FUNCTION void fw_u8_gather(const uint8_t *x, ptrdiff_t x_column, uint8_t *y, ptrdiff_t y_column, int pixels,
                                   int channels, const int16_t *index, int tid, int threads)
{
    const int begin = fw_int8_begin(pixels, tid, threads), end = fw_int8_begin(pixels, tid + 1, threads);
    int p, c, reach = 0;
    for (c = 0; c < channels; ++c)
        reach = index[c] < reach ? reach : index[c] + 1;
#if defined(FW_INT8_512) && defined(__AVX512VBMI__)
    if (reach <= 128) {
        for (c = 0; c < channels; c += 64) {
            const __mmask64 part = fw_u8_first(channels - c);
            uint8_t low[64] = {0};
            __m512i order;
            for (p = 0; p < 64 && c + p < channels; ++p)
                low[p] = (uint8_t)index[c + p];
            order = _mm512_loadu_si512(low);
            for (p = begin; p < end; ++p) {
                const uint8_t *from = x + p * x_column;
                const __m512i a = _mm512_maskz_loadu_epi8(fw_u8_first(reach), from);
                const __m512i b = reach > 64 ? _mm512_maskz_loadu_epi8(fw_u8_first(reach - 64), from + 64) : a;
                _mm512_mask_storeu_epi8(y + p * y_column + c, part, _mm512_permutex2var_epi8(a, order, b));
            }
        }
        return;
    }
#endif
    for (p = begin; p < end; ++p)
        for (c = 0; c < channels; ++c)
            y[p * y_column + c] = x[p * x_column + index[c]];
}

/* One image. y: pixels of `pixel` bytes (planes rounded up to 4 or more), the zero point in the border and the lanes left
 * over. */
FW_INT8_FUNCTION void fw_u8_image(const float *x, uint8_t *y, int planes, int rows, int columns, int pixel, int top, int left,
                                  int bottom, int right, float scale, int zero, int tid, int threads)
{
    const int wide = columns + left + right, tall = rows + top + bottom;
    int row, plane, column, lane;
    for (row = fw_int8_begin(tall, tid, threads); row < fw_int8_begin(tall, tid + 1, threads); ++row) {
        uint8_t *to = y + (ptrdiff_t)row * wide * pixel, q[16];
        memset(to, zero, (size_t)wide * (size_t)pixel);
        if (row < top || row >= top + rows)
            continue;
        column = 0;
#if defined(FW_INT8_512) || defined(FW_INT8_256)
        if (pixel == 4) { /* the bytes of a pixel are the digits of an int32 */
            const fw_i32 base = fw_i32_set(256);
            for (; column + 16 <= columns; column += 16) {
                fw_i32 all = fw_i32_set(0);
                for (plane = 3; plane >= 0; --plane) {
                    const float *from = x + ((ptrdiff_t)plane * rows + row - top) * columns + column;
                    fw_i32 v = fw_i32_set(zero);
                    if (plane < planes)
                        v = fw_i32_add(v, fw_u8_divide(fw_f32_load(from), scale));
                    v = fw_i32_min(fw_i32_max(v, fw_i32_set(0)), fw_i32_set(255));
                    all = fw_i32_add(fw_i32_mul(all, base), v);
                }
                fw_i32_store((int32_t *)(void *)(to + (left + column) * 4), all);
            }
        }
#endif
        for (plane = 0; plane < planes; ++plane) {
            const float *from = x + ((ptrdiff_t)plane * rows + row - top) * columns;
            int start = column;
            for (; start < columns; start += 16) {
                const int lanes = columns - start < 16 ? columns - start : 16;
                fw_u8_quantise(from + start, q, lanes, scale, zero, 0, 1);
                for (lane = 0; lane < lanes; ++lane)
                    to[(ptrdiff_t)(left + start + lane) * pixel + plane] = q[lane];
            }
        }
    }
}

FW_INT8_FUNCTION void fw_u8_planar(const uint8_t *x, ptrdiff_t x_column, uint8_t *y, int pixels, int channels, int tid,
                                   int threads)
{
    int p, c;
    for (p = fw_int8_begin(pixels, tid, threads); p < fw_int8_begin(pixels, tid + 1, threads); ++p)
        for (c = 0; c < channels; ++c)
            y[(ptrdiff_t)c * pixels + p] = x[p * x_column + c];
}

#endif
