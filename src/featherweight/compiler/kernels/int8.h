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
 * Where the program is compiled for the matrix unit of x86 (AMX), the system lends it and the shape suits, the product runs
 * there: 16 pixels x 16 outputs x 64 channels an instruction, same bits. Linux lends its registers to a process on request;
 * the kernel asks at every call, because a program of ours has no state to remember the answer in.
 *
 * Packed weights (pack_int8.conv_weights): [block of 16 outputs][tap row][tap column][k4][16 outputs][4 channels] s8,
 *   zero for channels and outputs that do not exist; bias int32 and scale float32 [16 * blocks], zero there.
 * Up to 3 bytes behind the last channel of a pixel are read (times zero weights), in k x k layers up to 63.
 * Grouped: first[b] is the first input channel of block b; with NR > 1 the blocks of a tile share it.
 * 1x1 with stride 1: images = rows = 1, columns = N * H * W. Input columns right behind each other (x_tap_column ==
 * channels, a multiple of 4): tap_columns = 1 and depth4 = kernel width * channels / 4.
 * Concatenation: y = first byte of the part, out.y_column = channels of the whole, out.lanes keeps the last block off what
 * follows. y may be r (in place); it must not overlap x. The same rounding on every target: same bits. */
#ifndef FW_INT8_H
#define FW_INT8_H

#include "int8_vector.h"

#if defined(FW_INT8_512) && defined(__AMX_INT8__) && defined(__linux__)
#define FW_INT8_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
    const int by = row % 8 == 0 ? 8 : row % 4 == 0 ? 4 : row % 2 == 0 ? 2 : 1;
    return row == 0 ? p : p + odd[row / by / 2] * by;
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

/* Bytes of an element of y. */
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

#if defined(FW_INT8_AMX)
enum { FW_AMX_TAPS = 9 };

/* Whether the matrix unit can and should run a shape; with fewer products an output the tiles are as fast. */
FW_INT8_FUNCTION int fw_amx_suits(const fw_int8_conv *s)
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    const int taps = s->tap_rows * s->tap_columns;
    return s->columns >= 16 && !s->first && taps * s->depth4 >= 12 && (taps <= FW_AMX_TAPS || s->depth4 % 16 == 0) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

FW_INT8_INLINE void fw_amx_begin(void)
{
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
    int i;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (i = 0; i < 8; ++i)
        config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* rest[block][tap]: the channels of each tap behind its whole steps of 64, padded with zeros to one. */
FW_INT8_INLINE void fw_amx_rest(const fw_int8_conv *s, const int8_t *w, int blocks, int8_t (*rest)[FW_AMX_TAPS][1024])
{
    const int taps = s->tap_rows * s->tap_columns, left = s->depth4 % 16;
    int t, b;
    for (b = 0; left && b < blocks; ++b) {
        for (t = 0; t < taps; ++t) {
            memcpy(rest[b][t], w + (((ptrdiff_t)b * taps + t + 1) * s->depth4 - left) * 64, (size_t)left * 64);
            memset(rest[b][t] + left * 64, 0, (size_t)(16 - left) * 64);
        }
    }
}

/* sums[block][16 pixels][16 outputs] of up to 4 blocks. A tile of pixels is slow to load, as its rows straddle cache lines:
 * so it meets as many blocks as there are registers for sums. */
FW_INT8_INLINE void fw_amx_sums(const fw_int8_conv *s, const uint8_t *x, const int8_t *w, const int32_t *bias, int blocks,
                                const int8_t (*rest)[FW_AMX_TAPS][1024], int end, int32_t *sums)
{
    uint8_t copy[16][64] = {{0}};
    const ptrdiff_t panel = (ptrdiff_t)s->tap_rows * s->tap_columns * s->depth4 * 64;
    int ty, tx, k, i, t = 0;
    _tile_loadd(0, bias, 0);
    if (blocks > 1) _tile_loadd(1, bias + 16, 0);
    if (blocks > 2) _tile_loadd(2, bias + 32, 0);
    if (blocks > 3) _tile_loadd(3, bias + 48, 0);
    for (ty = 0; ty < s->tap_rows; ++ty) {
        for (tx = 0; tx < s->tap_columns; ++tx, ++t) {
            const uint8_t *xt = x + ty * s->x_tap_row + tx * s->x_tap_column;
            for (k = 0; k < s->depth4; k += 16) {
                const int whole = k + 16 <= s->depth4;
                const int8_t *from = whole ? w + ((ptrdiff_t)t * s->depth4 + k) * 64 : rest[0][t];
                const ptrdiff_t next = whole ? panel : FW_AMX_TAPS * 1024;
                for (i = 0; !whole && end && i < 16; ++i) /* nothing behind the last pixel of all may be read */
                    memcpy(copy[i], xt + 4 * k + i * s->x_column, (size_t)(s->depth4 - k) * 4);
                if (whole || !end) _tile_loadd(4, xt + 4 * k, s->x_column);
                else _tile_loadd(4, copy, 64);
                _tile_loadd(5, from, 64);
                _tile_dpbusd(0, 4, 5);
                if (blocks > 1) { _tile_loadd(6, from + next, 64); _tile_dpbusd(1, 4, 6); }
                if (blocks > 2) { _tile_loadd(7, from + 2 * next, 64); _tile_dpbusd(2, 4, 7); }
                if (blocks > 3) { _tile_loadd(5, from + 3 * next, 64); _tile_dpbusd(3, 4, 5); }
            }
        }
    }
    _tile_stored(0, sums, 64);
    if (blocks > 1) _tile_stored(1, sums + 256, 64);
    if (blocks > 2) _tile_stored(2, sums + 512, 64);
    if (blocks > 3) _tile_stored(3, sums + 768, 64);
}

/* NAME_out stores 16 columns x nb blocks of sums. */
#define FW_INT8_MATRIX(NAME, OUT)                                                                                      \
    FW_INT8_INLINE void NAME##_out(const fw_int8_out *s, const int32_t *sums, const int nb, const float *scale,       \
                                   const uint8_t *r, uint8_t *y, int skip, int lanes)                                 \
    {                                                                                                                  \
        int m, i;                                                                                                      \
        for (m = skip & ~3; m < 16; m += 4) {                                                                          \
            fw_i32 acc[16];                                                                                            \
            FW_INT8_UNROLL                                                                                             \
            for (i = 0; i < 4 * nb; ++i)                                                                               \
                acc[i] = fw_i32_load(sums + 256 * (i % nb) + 16 * (m + i / nb));                                       \
            fw_int8_out_##OUT(s, acc, 4, nb, scale, r ? r + m * s->r_column : r,                                       \
                              y + m * s->y_column * FW_INT8_SIZE_##OUT, skip > m ? skip - m : 0, lanes);               \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *s, const uint8_t *x, const int8_t *w, const int32_t *bias,         \
                               const float *scale, const uint8_t *r, void *y, int tid, int threads)                   \
    {                                                                                                                  \
        const int strips = (s->columns + 15) / 16, tiles = s->images * s->rows * strips;                               \
        const int items = tiles * ((s->blocks + 3) / 4), end = fw_int8_begin(items, tid + 1, threads);                 \
        const ptrdiff_t panel = (ptrdiff_t)s->tap_rows * s->tap_columns * s->depth4 * 64;                              \
        int32_t sums[1024] __attribute__((aligned(64)));                                                               \
        int8_t rest[4][FW_AMX_TAPS][1024] __attribute__((aligned(64)));                                                \
        int item, b, ready = -1;                                                                                       \
        fw_amx_begin();                                                                                                \
        for (item = fw_int8_begin(items, tid, threads); item < end; ++item) {                                          \
            const int block = item / tiles * 4, tile = item % tiles, line = tile / strips, start = tile % strips * 16; \
            const int column = start <= s->columns - 16 ? start : s->columns - 16;                                     \
            const int image = line / s->rows, row = line % s->rows, left = s->blocks - block;                          \
            const ptrdiff_t to = image * s->out.y_image + row * s->out.y_row + column * s->out.y_column + 16 * block;  \
            const ptrdiff_t at = image * s->out.r_image + row * s->out.r_row + column * s->out.r_column + 16 * block;  \
            uint8_t *yi = (uint8_t *)y + to * FW_INT8_SIZE_##OUT;                                                      \
            if (block != ready)                                                                                        \
                fw_amx_rest(s, w + block * panel, left < 4 ? left : 4, rest);                                          \
            ready = block;                                                                                             \
            fw_amx_sums(s, x + image * s->x_image + row * s->x_row + column * s->x_column, w + block * panel,          \
                        bias + 16 * block, left < 4 ? left : 4, (const int8_t (*)[FW_AMX_TAPS][1024])rest,             \
                        tile + 1 == tiles, sums);                                                                      \
            if (left >= 4)                                                                                             \
                NAME##_out(&s->out, sums, 4, scale + 16 * block, r ? r + at : r, yi, start - column,                   \
                           left == 4 ? s->out.lanes : 16);                                                             \
            for (b = 0; left < 4 && b < left; ++b)                                                                     \
                NAME##_out(&s->out, sums + 256 * b, 1, scale + 16 * (block + b), r ? r + at + 16 * b : r,              \
                           yi + 16 * b * FW_INT8_SIZE_##OUT, start - column, b + 1 < left ? 16 : s->out.lanes);        \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }
#define FW_INT8_TRY_MATRIX(NAME)                                                                                       \
    if (fw_amx_suits(shape)) { NAME(shape, x, w, bias, scale, r, y, tid, threads); return; }
#else
#define FW_INT8_MATRIX(NAME, OUT)
#define FW_INT8_TRY_MATRIX(NAME)
#endif

#define FW_DEFINE_INT8_CONV(NAME, MR, NR, NT, OUT)                                                                     \
    FW_INT8_TILE(NAME##_full, MR, NR, OUT)                                                                             \
    FW_INT8_TILE(NAME##_last, MR, NT, OUT)                                                                             \
    FW_INT8_MATRIX(NAME##_matrix, OUT)                                                                                 \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,     \
                               const float *scale, const uint8_t *r, void *y, int tid, int threads)                   \
    {                                                                                                                  \
        FW_INT8_TRY_MATRIX(NAME##_matrix)                                                                              \
        fw_int8_run(shape, (MR), (NR), FW_INT8_SIZE_##OUT, NAME##_full, (NT) == (NR) ? NAME##_full : NAME##_last, x,  \
                    w, bias, scale, r, y, tid, threads);                                                               \
    }

#endif
