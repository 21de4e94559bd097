/* fw_clear_border(shape, y): zeros into the border that `shape` (layout.h) describes around every image; y is the
 * corner of the first one. */
#ifndef FW_BORDER_H
#define FW_BORDER_H

#include "layout.h"

FW_NOINLINE void fw_clear_border(const fw_layout *s, float *y) {
    for (int image = 0; image < s->images; image++)
        for (int row = 0; row < s->rows; row++)
            fw_border(s, row, y + image * s->pixel_image + (row + s->top) * s->pixel_row + s->left * s->pixel_column);
}
#endif
