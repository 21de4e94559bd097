/* Blocks run strip by strip, so that what lies between their convolutions stays in the cache ("block fusion").
 *
 * Inverted residual, 1x1 -> depthwise -> 1x1:
 *   static void fw_inverted(const fw_block *block, const fw_block_data *data, float *scratch, int tid, int threads);
 * For each strip of `strip_rows` output rows the expanding 1x1 writes the input rows that are new to a band, the
 * depthwise reads the band and writes its strip, the projecting 1x1 reads that and writes y. The rows that two strips
 * share move from the band's end to its start, so nothing is computed twice (but where two threads meet).
 *   expand == NULL: the depthwise reads x itself (separable convolution: depthwise -> 1x1).
 *   expand may be any other convolution with MR <= columns, a stem say: then x, x_row and the taps mean what they do in
 *   conv.h, the border of zeros included.
 *   project == NULL: the depthwise writes y itself (a squeeze-excite follows, which needs the whole map).
 * The layers are described as they would be alone (conv.h, depthwise.h), with tiles and epilogues of their own. Of the
 * 1x1 layers only columns (of one row), depth, vectors, lanes, block_groups, x_column, y_column, r_column and the image
 * strides count; the rows of their tensors must lie behind each other without gaps. x_row, y_row of the depthwise are
 * those of the band and of the strip (columns * x_column, columns * y_column), unless it reads x or writes y itself.
 *   scratch = threads * fw_block_floats(block) floats; a thread's part should stay below half of its L2 cache.
 *
 * Chain of two 1x1 (the MLP of a ConvNeXt block):
 *   static void fw_chain(const fw_block *block, const fw_block_data *data, float *scratch, int tid, int threads);
 * Here `strip_rows` counts pixels, and `columns` of both layers all pixels of all images.
 *   scratch = threads * strip_rows * expand->y_column floats.
 *
 * Every run of pixels, the last one too, must hold at least MR of both 1x1 tiles. Threads take contiguous ranges of
 * output rows or strips. y may be the residual; it must not overlap x (in fw_chain it may be x). */
#ifndef FW_FUSED_H
#define FW_FUSED_H

#include "depthwise.h"

typedef void fw_conv_function(const fw_conv *shape, const float *x, const float *w, const float *bias, const float *aux,
                              const float *r, float *y, int tid, int threads);

typedef struct fw_block {
    const fw_conv *expand, *project;
    fw_conv_function *run_expand, *run_project;
    const fw_depthwise *depthwise;
    const fw_depthwise_span *spans;
    int span_count, strip_rows, block_columns; /* block_columns: of the 1x1, see conv.h */
} fw_block;

/* Weights, biases and per-channel arrays of the three layers; r is the residual of the last one. */
typedef struct fw_block_data {
    const float *x, *r;
    float *y;
    const float *expand_w, *expand_bias, *expand_aux;
    const float *depthwise_w, *depthwise_bias, *depthwise_aux;
    const float *project_w, *project_bias, *project_aux;
} fw_block_data;

FW_INLINE int fw_band_rows(const fw_block *b) {
    const fw_depthwise *d = b->depthwise;
    return (b->strip_rows - 1) * d->stride_rows + (d->tap_rows - 1) * d->dilation_rows + 1;
}
FW_INLINE ptrdiff_t fw_block_floats(const fw_block *b) {
    return (b->expand ? fw_band_rows(b) * b->depthwise->x_row : 0) +
           (b->project ? b->strip_rows * b->depthwise->y_row : 0);
}

/* `pixels` consecutive pixels through a 1x1 layer. */
FW_INLINE void fw_pixels(const fw_conv *layer, fw_conv_function *run, int block_columns, const float *x, const float *w,
                         const float *bias, const float *aux, const float *r, float *y, int pixels) {
    fw_conv part = *layer;
    part.images = part.rows = part.block_rows = 1;
    part.columns = pixels;
    part.block_columns = block_columns;
    run(&part, x, w, bias, aux, r, y, 0, 1);
}

/* Rows start <= row < start + rows of the expanded tensor of one image, into the band. */
static inline void fw_expand_rows(const fw_block *b, const fw_block_data *p, const float *x, float *band, int start,
                                  int rows) {
    const fw_conv *e = b->expand;
    const ptrdiff_t tight = e->columns * e->x_column;
    if (e->tap_rows * e->tap_columns == 1 && (e->x_row == 0 || e->x_row == tight)) {
        fw_pixels(e, b->run_expand, b->block_columns, x + start * tight, p->expand_w, p->expand_bias, p->expand_aux,
                  NULL, band, rows * e->columns);
    } else {
        fw_conv part = *e;
        part.images = part.block_rows = 1;
        part.rows = rows;
        part.block_columns = e->columns;
        part.y_row = b->depthwise->x_row;
        b->run_expand(&part, x + start * e->x_row, p->expand_w, p->expand_bias, p->expand_aux, NULL, band, 0, 1);
    }
}

/* Output rows first <= row < end of one image. */
static inline void fw_inverted_rows(const fw_block *b, const fw_block_data *p, const float *x, const float *r, float *y,
                                    float *scratch, int first, int end) {
    const fw_depthwise *d = b->depthwise;
    const int reach = (d->tap_rows - 1) * d->dilation_rows + 1;
    float *strip = b->expand ? scratch + fw_band_rows(b) * d->x_row : scratch;
    int low = 0, high = 0; /* the band holds input rows low <= i < high */
    for (int row = first; row < end; row += b->strip_rows) {
        const int stop = fw_smaller(row + b->strip_rows, end);
        const int top = row * d->stride_rows - d->pad_top;
        const int need = top > 0 ? fw_smaller(top, d->in_rows) : 0;
        const int last = fw_smaller((stop - 1) * d->stride_rows - d->pad_top + reach, d->in_rows);
        const float *from = x;
        if (b->expand && last > need) {
            const int kept = high > need ? high - need : 0, start = need + kept;
            if (kept) memmove(scratch, scratch + (need - low) * d->x_row, (size_t)(kept * d->x_row) * sizeof(float));
            if (last > start) fw_expand_rows(b, p, x, scratch + kept * d->x_row, start, last - start);
            low = need;
            high = last;
        }
        if (b->expand) from = scratch;
        fw_depthwise_rows(d, b->spans, b->span_count, from, b->expand ? low : 0, p->depthwise_w, p->depthwise_bias,
                          p->depthwise_aux, b->project ? NULL : r, b->project ? strip : y, b->project ? row : 0, row,
                          stop);
        if (b->project) {
            const ptrdiff_t done = (ptrdiff_t)row * b->project->columns;
            fw_pixels(b->project, b->run_project, b->block_columns, strip, p->project_w, p->project_bias,
                      p->project_aux, r ? r + done * b->project->r_column : r, y + done * b->project->y_column,
                      (stop - row) * b->project->columns);
        }
    }
}

FW_NOINLINE void fw_inverted(const fw_block *b, const fw_block_data *p, float *scratch, int tid, int threads) {
    const fw_depthwise *d = b->depthwise;
    const int64_t rows = (int64_t)d->images * d->rows, end = rows * (tid + 1) / threads;
    const ptrdiff_t x_image = b->expand ? b->expand->x_image : d->x_image;
    const ptrdiff_t y_image = b->project ? b->project->y_image : d->y_image;
    const ptrdiff_t r_image = b->project ? b->project->r_image : d->r_image;
    for (int64_t i = rows * tid / threads; i < end;) {
        const int image = (int)(i / d->rows), row = (int)(i % d->rows);
        const int stop = end - i < d->rows - row ? row + (int)(end - i) : d->rows;
        fw_inverted_rows(b, p, p->x + image * x_image, p->r ? p->r + image * r_image : p->r, p->y + image * y_image,
                         scratch + tid * fw_block_floats(b), row, stop);
        i += stop - row;
    }
}

FW_NOINLINE void fw_chain(const fw_block *b, const fw_block_data *p, float *scratch, int tid, int threads) {
    const fw_conv *e = b->expand, *o = b->project;
    const int strips = fw_ceil_div(o->columns, b->strip_rows);
    float *hidden = scratch + (ptrdiff_t)tid * b->strip_rows * e->y_column;
    for (int64_t i = (int64_t)strips * tid / threads; i < (int64_t)strips * (tid + 1) / threads; i++) {
        const ptrdiff_t pixel = (ptrdiff_t)i * b->strip_rows;
        const int pixels = fw_smaller(b->strip_rows, o->columns - (int)pixel);
        fw_pixels(e, b->run_expand, b->block_columns, p->x + pixel * e->x_column, p->expand_w, p->expand_bias,
                  p->expand_aux, NULL, hidden, pixels);
        fw_pixels(o, b->run_project, b->block_columns, hidden, p->project_w, p->project_bias, p->project_aux,
                  p->r ? p->r + pixel * o->r_column : p->r, p->y + pixel * o->y_column, pixels);
    }
}

#endif
