/* 8-bit convolution on the matrix unit of x86 (AMX): 16 pixels x 16 outputs x 64 channels an instruction.
 *
 * FW_DEFINE_INT8_PRODUCT(name, MR, NR, NT, OUT) defines the function of FW_DEFINE_INT8_CONV(name, MR, NR, NT, OUT), same
 * arguments and same bits. Where the program was compiled for AMX, the system lends it and the shape suits, it runs
 * there, elsewhere on the tiles of int8.h. A shape suits if
 *   shape->columns >= 16 and depth4 is a multiple of 16: pack_int8.conv_weights(..., depth=64) pads with zeros;
 *   up to 63 bytes behind the last channel of a pixel are read (times zero weights).
 * Linux lends the tile registers to a process on request (arch_prctl); the kernel asks at every call, which costs as much
 * as a system call, because a program of ours has no state to remember the answer in. It loads its tile shapes and
 * gives the registers back at the end. */
#ifndef FW_INT8_AMX_H
#define FW_INT8_AMX_H

#include "int8.h"

#if defined(FW_INT8_512) && defined(__AMX_INT8__) && defined(__linux__)
#define FW_INT8_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may use the tile registers. */
FW_INT8_FUNCTION int fw_amx_allow(void)
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} fw_amx_config;

FW_INT8_INLINE void fw_amx_begin(void)
{
    fw_amx_config config;
    int i;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (i = 0; i < 8; ++i) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

/* Sums of 2 x 16 pixels (from x0 and x1) and `blocks` (1, 2) blocks of outputs: sums[half][block][pixel][output]. */
FW_INT8_INLINE void fw_amx_sums(const fw_int8_conv *s, const uint8_t *x0, const uint8_t *x1, const int8_t *w,
                                const int32_t *bias, const int blocks, int32_t *sums)
{
    const ptrdiff_t column = s->x_column;
    const int8_t *w1 = w + (ptrdiff_t)s->tap_rows * s->tap_columns * s->depth4 * 64;
    int ty, tx, k;
    _tile_loadd(0, bias, 0);
    _tile_loadd(2, bias, 0);
    if (blocks == 2) {
        _tile_loadd(1, bias + 16, 0);
        _tile_loadd(3, bias + 16, 0);
    }
    for (ty = 0; ty < s->tap_rows; ++ty) {
        for (tx = 0; tx < s->tap_columns; ++tx) {
            const ptrdiff_t tap = ty * s->x_tap_row + tx * s->x_tap_column;
            for (k = 0; k < s->depth4; k += 16, w += 1024, w1 += 1024) {
                _tile_loadd(6, w, 64);
                _tile_loadd(4, x0 + tap + 4 * k, column);
                _tile_dpbusd(0, 4, 6);
                _tile_loadd(5, x1 + tap + 4 * k, column);
                _tile_dpbusd(2, 5, 6);
                if (blocks == 2) {
                    _tile_loadd(7, w1, 64);
                    _tile_dpbusd(1, 4, 7);
                    _tile_dpbusd(3, 5, 7);
                }
            }
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (blocks == 2) {
        _tile_stored(1, sums + 256, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

typedef struct { /* where one pair of pixel tiles goes */
    const float *scale;
    const uint8_t *r;
    uint8_t *y;
    int column, second, skip, skip_second, lanes, blocks; /* first columns of both halves, columns done before */
} fw_amx_target;

#define FW_INT8_MATRIX(NAME, OUT)                                                                                      \
    FW_INT8_INLINE void NAME##_half(const fw_int8_out *s, const int32_t *sums, const int blocks,                       \
                                    const fw_amx_target *t, int column, int skip)                                      \
    {                                                                                                                  \
        int m, i;                                                                                                      \
        for (m = skip & ~3; m < 16; m += 4) {                                                                          \
            fw_i32 acc[8];                                                                                             \
            const int left = skip > m ? skip - m : 0;                                                                  \
            FW_INT8_UNROLL                                                                                             \
            for (i = 0; i < 4 * blocks; ++i)                                                                           \
                acc[i] = fw_i32_load(sums + 256 * (i % blocks) + 16 * (m + i / blocks));                               \
            fw_int8_out_##OUT(s, acc, 4, blocks, t->scale, t->r ? t->r + (column + m) * s->r_column : t->r,            \
                              t->y + (column + m) * s->y_column * FW_INT8_SIZE_##OUT, left, t->lanes);                 \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INT8_INLINE void NAME##_store(const fw_int8_out *s, const int32_t *sums, const fw_amx_target *t)                \
    {                                                                                                                  \
        if (t->blocks == 2) {                                                                                          \
            NAME##_half(s, sums, 2, t, t->column, t->skip);                                                            \
            if (t->skip_second < 16)                                                                                   \
                NAME##_half(s, sums + 512, 2, t, t->second, t->skip_second);                                           \
        } else if (t->blocks == 1) {                                                                                   \
            NAME##_half(s, sums, 1, t, t->column, t->skip);                                                            \
            if (t->skip_second < 16)                                                                                   \
                NAME##_half(s, sums + 512, 1, t, t->second, t->skip_second);                                           \
        }                                                                                                              \
    }                                                                                                                  \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,     \
                               const float *scale, const uint8_t *r, void *y, int tid, int threads)                   \
    {                                                                                                                  \
        const fw_int8_conv *s = shape;                                                                                 \
        const int strips = (s->columns + 31) / 32, groups = (s->blocks + 1) / 2, tiles = s->images * s->rows * strips; \
        const int inner = s->columns_first ? groups : tiles;                                                           \
        const int begin = fw_int8_begin(tiles * groups, tid, threads);                                                 \
        const int end = fw_int8_begin(tiles * groups, tid + 1, threads);                                               \
        const ptrdiff_t panel = (ptrdiff_t)s->tap_rows * s->tap_columns * s->depth4 * 64;                              \
        int32_t sums[2][1024] __attribute__((aligned(64)));                                                            \
        fw_amx_target before = {NULL, NULL, NULL, 0, 0, 0, 0, 0, 0};                                                   \
        int outer = begin / inner, in = begin % inner, item, turn = 0;                                                 \
        if (begin < end)                                                                                               \
            fw_amx_begin();                                                                                            \
        for (item = begin; item < end; ++item, turn ^= 1) {                                                            \
            const int tile = s->columns_first ? outer : in, block = (s->columns_first ? in : outer) * 2;               \
            const int line = tile / strips, start = (tile - line * strips) * 32, last = s->columns - 16;               \
            const int image = line / s->rows, row = line - image * s->rows, done = block + 2 >= s->blocks;             \
            const int one = start < last ? start : last, two = start + 16 < last ? start + 16 : last;                  \
            const uint8_t *from = x + image * s->x_image + row * s->x_row + (s->first ? s->first[block] : 0);              \
            const fw_amx_target now = {                                                                                \
                scale + 16 * block,                                                                                    \
                r ? r + image * s->out.r_image + row * s->out.r_row + 16 * block : r,                                  \
                (uint8_t *)y + (image * s->out.y_image + row * s->out.y_row + 16 * block) * FW_INT8_SIZE_##OUT,        \
                one, two, start - one, start + 16 - two < 16 ? start + 16 - two : 16, done ? s->out.lanes : 16,        \
                block + 1 < s->blocks ? 2 : 1};                                                                        \
            if (now.blocks == 2)                                                                                       \
                fw_amx_sums(s, from + one * s->x_column, from + two * s->x_column, w + block * panel,                  \
                            bias + 16 * block, 2, sums[turn]);                                                         \
            else                                                                                                       \
                fw_amx_sums(s, from + one * s->x_column, from + two * s->x_column, w + block * panel,                  \
                            bias + 16 * block, 1, sums[turn]);                                                         \
            NAME##_store(&s->out, sums[turn ^ 1], &before);                                                            \
            before = now;                                                                                              \
            if (++in == inner) {                                                                                       \
                in = 0;                                                                                                \
                ++outer;                                                                                               \
            }                                                                                                          \
        }                                                                                                              \
        if (begin < end) {                                                                                             \
            NAME##_store(&s->out, sums[turn ^ 1], &before);                                                            \
            _tile_release();                                                                                           \
        }                                                                                                              \
    }

#define FW_DEFINE_INT8_PRODUCT(NAME, MR, NR, NT, OUT)                                                                  \
    FW_DEFINE_INT8_CONV(NAME##_tiles, MR, NR, NT, OUT)                                                                 \
    FW_INT8_MATRIX(NAME##_matrix, OUT)                                                                                 \
    FW_INT8_FUNCTION void NAME(const fw_int8_conv *shape, const uint8_t *x, const int8_t *w, const int32_t *bias,     \
                               const float *scale, const uint8_t *r, void *y, int tid, int threads)                   \
    {                                                                                                                  \
        if (shape->columns >= 16 && shape->depth4 % 16 == 0 && fw_amx_allow())                                         \
            NAME##_matrix(shape, x, w, bias, scale, r, y, tid, threads);                                               \
        else                                                                                                           \
            NAME##_tiles(shape, x, w, bias, scale, r, y, tid, threads);                                                \
    }

#else
#define FW_DEFINE_INT8_PRODUCT FW_DEFINE_INT8_CONV
#endif
#endif
