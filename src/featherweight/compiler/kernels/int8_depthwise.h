/* 8-bit depthwise convolution, channels last; conventions in int8_vector.h, OUT as in int8.h.
 *
 *   y[i][r][c][o] = OUT(bias[o] + sum over ty, tx of
 *                       x[i][r * stride_rows - pad_top + ty * dilation_rows][c * SX - pad_left + tx][o] * weight[o][ty][tx])
 * where x is its zero point outside the image: borders are handled here, no padded copy is needed. -zero_x * sum(weights)
 * is part of the bias.
 *
 * Each row of x is turned once into `quads`, four neighbouring columns side by side for every channel, as the dot
 * product of four bytes wants them; a ring of the rows that one output row needs stays in the cache. A step makes 4
 * outputs of 16 channels; an output that starts at the column 4q + s reads the quads q .. q + (s + KW - 1) / 4 with
 * weights shifted by s.
 *
 * FW_DEFINE_INT8_DEPTHWISE(name, KH, KW, SX, OUT) defines
 *   static void name(const fw_int8_depthwise *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,
 *                    const float *scale, const uint8_t *r, void *y, uint8_t *scratch, int tid, int threads);
 *   KH, KW   kernel; SX  stride of the columns (1, 2, 4), literals
 *   scratch  of this thread: pack_int8.depthwise_scratch(...) bytes
 * Packed weights (pack_int8.depthwise_weights): [block of 16 channels][tap row][slot][16 channels][4 columns] s8; slots
 *   are (s, part) for every used shift s = SX * 0..3 modulo 4, ascending, part = 0 .. (s + KW - 1) / 4: the weight of
 *   column i of the part is weight[o][ty][4 * part + i - s], or 0.
 * Reads whole blocks of 16 channels: up to 15 bytes behind the last pixel. Rows of all images are split over threads. */
#ifndef FW_INT8_DEPTHWISE_H
#define FW_INT8_DEPTHWISE_H

#include "int8.h"

typedef struct fw_int8_depthwise {
    int images, rows, columns;                         /* of the output */
    int in_rows, in_columns;
    int stride_rows, dilation_rows, pad_top, pad_left;
    int blocks;                                        /* channels / 16, rounded up */
    int x_zero;                                        /* zero point of x, 0..255 */
    ptrdiff_t x_image, x_row, x_column;                /* bytes from an input image, row, column to the next */
    fw_int8_out out;
} fw_int8_depthwise;

/* 64 bytes to[channel][column] of 16 channels at four columns. */
FW_INT8_INLINE void fw_int8_quad(uint8_t *to, const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d)
{
#if defined(FW_INT8_512) && defined(__AVX512VBMI__)
    const __m512i order = _mm512_set_epi32(
        0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808,
        0x37271707, 0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
    const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                               _mm_loadu_si128((const __m128i *)b), 1);
    const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)c)),
                                               _mm_loadu_si128((const __m128i *)d), 1);
    const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order, all));
#elif defined(FW_INT8_512) || defined(FW_INT8_256)
    const __m128i va = _mm_loadu_si128((const __m128i *)a), vb = _mm_loadu_si128((const __m128i *)b);
    const __m128i vc = _mm_loadu_si128((const __m128i *)c), vd = _mm_loadu_si128((const __m128i *)d);
    const __m128i ab = _mm_unpacklo_epi8(va, vb), cd = _mm_unpacklo_epi8(vc, vd);
    const __m128i ef = _mm_unpackhi_epi8(va, vb), gh = _mm_unpackhi_epi8(vc, vd);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(ab, cd));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi16(ab, cd));
    _mm_storeu_si128((__m128i *)to + 2, _mm_unpacklo_epi16(ef, gh));
    _mm_storeu_si128((__m128i *)to + 3, _mm_unpackhi_epi16(ef, gh));
#else
    int i;
    for (i = 0; i < 16; ++i) {
        to[4 * i] = a[i];
        to[4 * i + 1] = b[i];
        to[4 * i + 2] = c[i];
        to[4 * i + 3] = d[i];
    }
#endif
}

/* One row of x as [block][quads][16 channels][4 columns], the first column being -pad_left. x NULL: a row of zeros. */
FW_INT8_FUNCTION void fw_int8_quads(const fw_int8_depthwise *s, const uint8_t *x, uint8_t *to, int quads)
{
    uint8_t zero[16];
    int block, q, i;
    memset(zero, s->x_zero, 16);
    if (!x) {
        memset(to, s->x_zero, (size_t)s->blocks * (size_t)quads * 64);
        return;
    }
    for (q = 0; q < quads; ++q) {
        const int first = 4 * q - s->pad_left, inside = first >= 0 && first + 4 <= s->in_columns;
        const uint8_t *at = inside ? x + first * s->x_column : x;
        uint8_t *out = to + 64 * q;
        for (block = 0; block < s->blocks; ++block, at += 16, out += (ptrdiff_t)quads * 64) {
            if (inside) {
                fw_int8_quad(out, at, at + s->x_column, at + 2 * s->x_column, at + 3 * s->x_column);
            } else {
                const uint8_t *column[4];
                for (i = 0; i < 4; ++i)
                    column[i] = first + i >= 0 && first + i < s->in_columns ? at + (first + i) * s->x_column : zero;
                fw_int8_quad(out, column[0], column[1], column[2], column[3]);
            }
        }
    }
}

/* Slots of the shifts below `shift`. */
FW_INT8_INLINE int fw_int8_slot(const int shift, const int kw, const int sx)
{
    int s, count = 0;
    FW_INT8_UNROLL
    for (s = 0; s < 4; ++s)
        if (s < shift && (sx % 2 || (sx % 4 == 2 && s % 2 == 0) || s == 0))
            count += (s + kw - 1) / 4 + 1;
    return count;
}

/* So many vectors of weights stay in registers while a row passes. */
#if defined(FW_INT8_512)
#define FW_INT8_HELD 18
#else
#define FW_INT8_HELD 1
#endif

#define FW_INT8_QUADS(COLUMNS, KW, SX) (((COLUMNS) - 1) / 4 * (SX) + (3 * (SX) + (KW) - 1) / 4 + 1)

#define FW_DEFINE_INT8_DEPTHWISE(NAME, KH, KW, SX, OUT)                                                                \
    /* One row of outputs from the rows `line` of quads. */                                                            \
    FW_INT8_FUNCTION void NAME##_row(const fw_int8_depthwise *shape, const uint8_t *const *line, const int8_t *w,     \
                                     const int32_t *bias, const float *scale, const uint8_t *r, uint8_t *y)           \
    {                                                                                                                  \
        const int slots = fw_int8_slot(4, (KW), (SX)), quads = FW_INT8_QUADS(shape->columns, KW, SX);                  \
        const ptrdiff_t step = 4 * shape->out.y_column * FW_INT8_SIZE_##OUT;                                           \
        int block, column, ty, o, part, i;                                                                             \
        for (block = 0; block < shape->blocks; ++block) {                                                              \
            const int lanes = block + 1 < shape->blocks ? 16 : shape->out.lanes;                                       \
            const ptrdiff_t start = (ptrdiff_t)block * quads * 64;                                                     \
            const int8_t *wb = w + (ptrdiff_t)block * (KH) * slots * 64;                                               \
            uint8_t *yb = y + block * 16 * FW_INT8_SIZE_##OUT;                                                         \
            const uint8_t *rb = r ? r + block * 16 : r, *at[KH];                                                       \
            fw_w4 held[FW_INT8_HELD];                                                                                  \
            if ((KH) * slots <= FW_INT8_HELD) {                                                                        \
                FW_INT8_UNROLL                                                                                         \
                for (i = 0; i < FW_INT8_HELD; ++i)                                                                     \
                    held[i] = fw_w4_load(wb + 64 * (i < (KH) * slots ? i : 0));                                        \
            }                                                                                                          \
            FW_INT8_UNROLL                                                                                             \
            for (ty = 0; ty < (KH); ++ty)                                                                              \
                at[ty] = line[ty] + start;                                                                             \
            for (column = 0; column < shape->columns; column += 4, yb += step) {                                       \
                fw_i32 acc[4];                                                                                         \
                const int count = shape->columns - column;                                                             \
                FW_INT8_UNROLL                                                                                         \
                for (o = 0; o < 4; ++o)                                                                                \
                    acc[o] = fw_i32_load(bias + block * 16);                                                           \
                FW_INT8_UNROLL                                                                                         \
                for (ty = 0; ty < (KH); ++ty) {                                                                        \
                    FW_INT8_UNROLL                                                                                     \
                    for (o = 0; o < 4; ++o) {                                                                          \
                        const int shift = o * (SX) % 4, slot = fw_int8_slot(shift, (KW), (SX));                        \
                        FW_INT8_UNROLL                                                                                 \
                        for (part = 0; part <= (shift + (KW) - 1) / 4; ++part)                                         \
                            acc[o] = fw_dp(acc[o], fw_x4_load(at[ty] + 64 * (o * (SX) / 4 + part)),                    \
                                           (KH) * slots <= FW_INT8_HELD                                                \
                                               ? held[(ty * slots + slot + part) % FW_INT8_HELD]                       \
                                               : fw_w4_load(wb + 64 * (ty * slots + slot + part)));                    \
                    }                                                                                                  \
                    at[ty] += 64 * (SX);                                                                               \
                }                                                                                                      \
                if (count >= 4)                                                                                        \
                    fw_int8_out_##OUT(&shape->out, acc, 4, 1, scale + block * 16, rb, yb, 0, lanes);                   \
                else                                                                                                   \
                    for (i = 0; i < count; ++i)                                                                        \
                        fw_int8_out_##OUT(&shape->out, acc + i, 1, 1, scale + block * 16,                              \
                                          rb ? rb + i * shape->out.r_column : rb,                                      \
                                          yb + i * shape->out.y_column * FW_INT8_SIZE_##OUT, 0, lanes);                \
                if (rb)                                                                                                \
                    rb += 4 * shape->out.r_column;                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INT8_FUNCTION void NAME(const fw_int8_depthwise *shape, const uint8_t *x, const int8_t *w, const int32_t *bias, \
                               const float *scale, const uint8_t *r, void *y, uint8_t *scratch, int tid, int threads) \
    {                                                                                                                  \
        const int lines = shape->images * shape->rows, span = ((KH) - 1) * shape->dilation_rows + 1;                   \
        const int quads = FW_INT8_QUADS(shape->columns, KW, SX);                                                       \
        const ptrdiff_t size = (ptrdiff_t)shape->blocks * quads * 64;                                                  \
        int item, ready = 0, of = -1, ty;                                                                              \
        for (item = fw_int8_begin(lines, tid, threads); item < fw_int8_begin(lines, tid + 1, threads); ++item) {       \
            const int image = item / shape->rows, row = item - image * shape->rows, first = row * shape->stride_rows;  \
            const uint8_t *line[KH], *xi = x + image * shape->x_image;                                                 \
            const ptrdiff_t to = image * shape->out.y_image + row * shape->out.y_row;                                  \
            if (image != of || ready < first)                                                                          \
                ready = first;                                                                                         \
            of = image;                                                                                                \
            for (; ready < first + span; ++ready) {                                                                    \
                const int in = ready - shape->pad_top, inside = in >= 0 && in < shape->in_rows;                        \
                fw_int8_quads(shape, inside ? xi + in * shape->x_row : NULL, scratch + ready % span * size, quads);    \
            }                                                                                                          \
            for (ty = 0; ty < (KH); ++ty)                                                                              \
                line[ty] = scratch + (first + ty * shape->dilation_rows) % span * size;                                \
            NAME##_row(shape, line, w, bias, scale,                                                                    \
                       r ? r + image * shape->out.r_image + row * shape->out.r_row : r,                                \
                       (uint8_t *)y + to * FW_INT8_SIZE_##OUT);                                                        \
        }                                                                                                              \
    }

#endif
