/* 8-bit convolution: 1x1, dense k x k (any stride and dilation), grouped, fully connected. Names and strides are those
 * of conv.h; the conventions of 8-bit tensors stand in int8_vector.h.
 *
 *   y[i][r][c][o] = OUT(bias[o] + sum over ty, tx, k of x[i, r, c, ty, tx][k] * weight[o][ty][tx][k])
 *
 * with u8 x, s8 weights and exact int32 sums. There are no borders here: where the convolution pads, x is a copy with
 * the input's zero point around it (fw_u8_pad in int8_elementwise.h). -zero_x * sum(weights) is part of the bias.
 *
 * FW_DEFINE_INT8_CONV(name, MR, NR, NT, OUT) defines
 *   static void name(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,
 *                    const float *scale, const uint8_t *r, void *y, int tid, int threads);
 *   MR    output columns of a register tile, 1..15, at most shape->columns
 *   NR    blocks of 16 outputs of a tile; MR * NR + NR + 1 <= 32 on AVX-512 (best 14x2, 9x3, 7x4, 6x4; 1 column: 1x8),
 *         2 * MR * NR <= 12 with AVX2 (6x1, 3x2)
 *   NT    blocks of the last tile: shape->blocks % NR, or NR where that is 0 (then write it like NR)
 *   OUT   what becomes of the int32 sum s, with m = scale[o]:
 *     quantise  u8 clamp(rint(s * m) + zero, lo, hi);   m = scale_x * scale_w[o] / scale_y
 *     shift     the same with lo = 0, hi = 255, a little faster;  relu  the same with zero = 0 too, faster again
 *     table     u8 table[that]: any function of the quantised value, its own quantisation included
 *     add       u8 clamp(rint(q * ratio + (r - r_zero) * r_ratio) + zero, lo, hi) with q = clamp(rint(s * m) + q_zero, 0,
 *               255) - q_zero; ratio = scale_q / scale_y, r_ratio = scale_r / scale_y; m = scale_x * scale_w[o] / scale_q
 *     real      float32 clamp(s * m, real_lo, real_hi);  m = scale_x * scale_w[o]
 *
 * Packed weights (pack_int8.conv_weights): [block of 16 outputs][tap row][tap column][k4][16 outputs][4 channels] s8,
 *   zero for channels and outputs that do not exist; bias int32 and scale float32 [16 * blocks], zero there.
 * Up to 3 bytes behind the last channel of a pixel are read (times a zero weight).
 * Grouped: first[b] is the first input channel of block b; with NR > 1 the blocks of a tile share it.
 * 1x1 with stride 1: images = rows = 1, columns = N * H * W. Input columns right behind each other (x_tap_column ==
 * channels, a multiple of 4): tap_columns = 1 and depth4 = kernel width * channels / 4.
 * Concatenation: y = first byte of the part, out.y_column = channels of the whole, out.lanes keeps the last block off what
 * follows. y may be r (in place); it must not overlap x. The same rounding on every target: same bits. */
#ifndef FW_INT8_H
#define FW_INT8_H

#include "int8_vector.h"

typedef struct fw_int8_out {
    int lanes;                                         /* 1..16: outputs of the last block that are stored */
    ptrdiff_t y_image, y_row, y_column;                /* elements from an output to the next */
    ptrdiff_t r_image, r_row, r_column;                /* the same for the residual */
    int zero, lo, hi;                                  /* quantise, table: before the table; add: of y */
    int q_zero, r_zero;                                /* add */
    float ratio, r_ratio;                              /* add */
    float real_lo, real_hi;                            /* real */
    const uint8_t *table;                              /* table: 256 entries */
} fw_int8_out;

typedef struct fw_int8_conv {
    int images, rows, columns;                         /* of the output */
    int tap_rows, tap_columns, depth4;                 /* kernel height, width, groups of 4 input channels of a tap */
    int blocks;                                        /* output channels / 16, rounded up */
    int columns_first;                                 /* 1: a tile of columns meets all outputs, then the next tile
                                                          (small weights); 0: a tile of outputs meets all columns */
    ptrdiff_t x_image, x_row, x_column;                /* bytes from the window of an output to that of the next */
    ptrdiff_t x_tap_row, x_tap_column;                 /* bytes from a tap to the next */
    const int *first;                                  /* NULL, or first input channel of each block */
    fw_int8_out out;
} fw_int8_conv;

/* Multiples of the stride from which fw_int8_row builds any of 15 rows in one x86 addressing mode. */
FW_INT8_INLINE void fw_int8_odd(ptrdiff_t odd[8], ptrdiff_t stride)
{
    int i;
    for (i = 0; i < 8; ++i)
        odd[i] = (2 * i + 1) * stride;
}
FW_INT8_INLINE const uint8_t *fw_int8_row(const uint8_t *p, const ptrdiff_t odd[8], const int row)
{
    if (row == 0)
        return p;
    return row % 8 == 0   ? p + odd[row / 16] * 8
           : row % 4 == 0 ? p + odd[row / 8] * 4
           : row % 2 == 0 ? p + odd[row / 4] * 2
                          : p + odd[row / 2];
}

FW_INT8_INLINE fw_i32 fw_int8_scaled(fw_i32 sum, const float *scale)
{
    return fw_i32_rint(fw_f32_mul(fw_f32_i32(sum), fw_f32_load(scale)));
}

/* The fw_int8_out_* store the tile acc[column * nr + block]; columns below `skip` were stored by the tile before. */
/* Every index into acc must be a constant once loops are unrolled, or the compiler keeps the sums in memory. */
FW_INT8_INLINE void fw_int8_steps(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr, const float *scale,
                                  void *y, int lanes, int zero, int lo, int hi)
{
    const ptrdiff_t column = s->y_column;
    int v, i;
    if (lanes == 16) {
        FW_INT8_UNROLL
        for (v = 0; v < mr * nr / 4 * 4; v += 4) {
            uint8_t *to[4];
            fw_i32 q[4];
            FW_INT8_UNROLL
            for (i = 0; i < 4; ++i) {
                to[i] = (uint8_t *)y + (v + i) / nr * column + 16 * ((v + i) % nr);
                q[i] = fw_int8_scaled(acc[v + i], scale + 16 * ((v + i) % nr));
            }
            fw_u8_store4(to, nr % 4 == 0 ? 4 : nr == 2 ? 2 : 1, q, zero, lo, hi);
        }
        FW_INT8_UNROLL
        for (v = mr * nr / 4 * 4; v < mr * nr; ++v)
            fw_u8_store((uint8_t *)y + v / nr * column + 16 * (v % nr), fw_int8_scaled(acc[v], scale + 16 * (v % nr)),
                        zero, lo, hi, 16);
    } else {
        FW_INT8_UNROLL
        for (v = 0; v < mr * nr; ++v)
            fw_u8_store((uint8_t *)y + v / nr * column + 16 * (v % nr), fw_int8_scaled(acc[v], scale + 16 * (v % nr)),
                        zero, lo, hi, v % nr + 1 < nr ? 16 : lanes);
    }
}

FW_INT8_INLINE void fw_int8_out_quantise(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                         const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    (void)r, (void)skip;
    fw_int8_steps(s, acc, mr, nr, scale, y, lanes, s->zero, s->lo, s->hi);
}

FW_INT8_INLINE void fw_int8_out_shift(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                      const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    (void)r, (void)skip;
    fw_int8_steps(s, acc, mr, nr, scale, y, lanes, s->zero, 0, 255);
}

FW_INT8_INLINE void fw_int8_out_relu(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                     const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    (void)r, (void)skip;
    fw_int8_steps(s, acc, mr, nr, scale, y, lanes, 0, 0, 255);
}

FW_INT8_INLINE void fw_int8_out_table(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                      const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    uint8_t row[15 * 16 * 8];
    fw_int8_out local = *s;
    int m, n;
    local.y_column = 16 * nr;
    fw_int8_out_quantise(&local, acc, mr, nr, scale, r, row, skip, 16);
    for (m = 0; m < mr; ++m)
        for (n = 0; n < 16 * nr - 16 + lanes; ++n)
            ((uint8_t *)y)[m * s->y_column + n] = s->table[row[m * 16 * nr + n]];
}

FW_INT8_INLINE void fw_int8_out_add(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                    const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    const fw_f32 ratio = fw_f32_set(s->ratio), r_ratio = fw_f32_set(s->r_ratio);
    const fw_i32 r_zero = fw_i32_set(s->r_zero), low = fw_i32_set(-s->q_zero), high = fw_i32_set(255 - s->q_zero);
    int v;
    FW_INT8_UNROLL
    for (v = 0; v < mr * nr; ++v) {
        if (v / nr >= skip) {
            const fw_i32 q = fw_i32_min(fw_i32_max(fw_int8_scaled(acc[v], scale + 16 * (v % nr)), low), high);
            const fw_i32 rv = fw_i32_sub(fw_i32_u8(r + v / nr * s->r_column + 16 * (v % nr)), r_zero);
            const fw_f32 sum = fw_f32_add(fw_f32_mul(fw_f32_i32(q), ratio), fw_f32_mul(fw_f32_i32(rv), r_ratio));
            fw_u8_store((uint8_t *)y + v / nr * s->y_column + 16 * (v % nr), fw_i32_rint(sum), s->zero, s->lo, s->hi,
                        v % nr + 1 < nr ? 16 : lanes);
        }
    }
}

FW_INT8_INLINE void fw_int8_out_real(const fw_int8_out *s, const fw_i32 *acc, const int mr, const int nr,
                                     const float *scale, const uint8_t *r, void *y, int skip, int lanes)
{
    int v;
    (void)r, (void)skip;
    FW_INT8_UNROLL
    for (v = 0; v < mr * nr; ++v) {
        const fw_f32 t = fw_f32_mul(fw_f32_i32(acc[v]), fw_f32_load(scale + 16 * (v % nr)));
        fw_f32_store((float *)y + v / nr * s->y_column + 16 * (v % nr), fw_f32_clamp(t, s->real_lo, s->real_hi),
                     v % nr + 1 < nr ? 16 : lanes);
    }
}

#define FW_INT8_SIZE_quantise 1
#define FW_INT8_SIZE_shift 1
#define FW_INT8_SIZE_relu 1
#define FW_INT8_SIZE_table 1
#define FW_INT8_SIZE_add 1
#define FW_INT8_SIZE_real 4

/* One tile: MR windows from x, NR blocks of weights from w; y, r: first output column. */
typedef void fw_int8_tile(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,
                          const float *scale, const uint8_t *r, void *y, int skip, int lanes);

#define FW_INT8_TILE(NAME, MR, NR, OUT)                                                                                \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,     \
                               const float *scale, const uint8_t *r, void *y, int skip, int lanes)                    \
    {                                                                                                                  \
        fw_i32 acc[(MR) * (NR)];                                                                                       \
        const int depth4 = shape->depth4;                                                                              \
        const ptrdiff_t block = (ptrdiff_t)shape->tap_rows * shape->tap_columns * depth4 * 64;                         \
        ptrdiff_t odd[8];                                                                                              \
        int i, j, k, ty, tx;                                                                                           \
        fw_int8_odd(odd, shape->x_column);                                                                             \
        FW_INT8_UNROLL                                                                                                 \
        for (i = 0; i < (MR) * (NR); ++i)                                                                              \
            acc[i] = fw_i32_load(bias + i % (NR) * 16);                                                                \
        for (ty = 0; ty < shape->tap_rows; ++ty) {                                                                     \
            for (tx = 0; tx < shape->tap_columns; ++tx) {                                                              \
                const uint8_t *xk = x + ty * shape->x_tap_row + tx * shape->x_tap_column;                              \
                for (k = 0; k < depth4; ++k, xk += 4, w += 64) {                                                       \
                    fw_w4 wk[NR];                                                                                      \
                    FW_INT8_UNROLL                                                                                     \
                    for (j = 0; j < ((MR) + 1) / 2; ++j)                                                               \
                        FW_INT8_OPAQUE(odd[j]);                                                                        \
                    FW_INT8_UNROLL                                                                                     \
                    for (j = 0; j < (NR); ++j)                                                                         \
                        wk[j] = fw_w4_load(w + j * block);                                                             \
                    FW_INT8_UNROLL                                                                                     \
                    for (i = 0; i < (MR); ++i) {                                                                       \
                        const fw_x4 four = fw_x4_set(fw_int8_row(xk, odd, i));                                         \
                        FW_INT8_UNROLL                                                                                 \
                        for (j = 0; j < (NR); ++j)                                                                     \
                            acc[i * (NR) + j] = fw_dp(acc[i * (NR) + j], four, wk[j]);                                 \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        fw_int8_out_##OUT(&shape->out, acc, (MR), (NR), scale, r, y, skip, lanes);                                     \
    }

FW_INT8_FUNCTION void fw_int8_run(const fw_int8_conv *s, int mr, int nr, int size, fw_int8_tile *full,
                                  fw_int8_tile *last, const uint8_t *x, const int8_t *w, const int32_t *bias,
                                  const float *scale, const uint8_t *r, void *y, int tid, int threads)
{
    const int strips = (s->columns + mr - 1) / mr, groups = (s->blocks + nr - 1) / nr;
    const int tiles = s->images * s->rows * strips, inner = s->columns_first ? groups : tiles;
    const int begin = fw_int8_begin(tiles * groups, tid, threads), end = fw_int8_begin(tiles * groups, tid + 1, threads);
    const ptrdiff_t panel = (ptrdiff_t)s->tap_rows * s->tap_columns * s->depth4 * 64;
    int outer = begin / inner, in = begin % inner, item;
    for (item = begin; item < end; ++item) {
        const int tile = s->columns_first ? outer : in, block = (s->columns_first ? in : outer) * nr;
        const int line = tile / strips, start = (tile - line * strips) * mr;
        const int column = start <= s->columns - mr ? start : s->columns - mr;
        const int image = line / s->rows, row = line - image * s->rows, done = block + nr >= s->blocks;
        const ptrdiff_t to = image * s->out.y_image + row * s->out.y_row + column * s->out.y_column + 16 * block;
        const ptrdiff_t from = image * s->out.r_image + row * s->out.r_row + column * s->out.r_column + 16 * block;
        (done ? last : full)(s, x + image * s->x_image + row * s->x_row + column * s->x_column +
                                    (s->first ? s->first[block] : 0),
                             w + block * panel, bias + 16 * block, scale + 16 * block, r ? r + from : r,
                             (uint8_t *)y + to * size, start - column, done ? s->out.lanes : 16);
        if (++in == inner) {
            in = 0;
            ++outer;
        }
    }
}

#define FW_DEFINE_INT8_CONV(NAME, MR, NR, NT, OUT)                                                                     \
    FW_INT8_TILE(NAME##_full, MR, NR, OUT)                                                                             \
    FW_INT8_TILE(NAME##_last, MR, NT, OUT)                                                                             \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,     \
                               const float *scale, const uint8_t *r, void *y, int tid, int threads)                   \
    {                                                                                                                  \
        fw_int8_run(shape, (MR), (NR), FW_INT8_SIZE_##OUT, NAME##_full, (NT) == (NR) ? NAME##_full : NAME##_last, x,  \
                    w, bias, scale, r, y, tid, threads);                                                               \
    }

#endif
