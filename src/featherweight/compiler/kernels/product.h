/* fw_pack_columns: a matrix of `depth` x `columns` floats, any strides, in the order in which conv.h reads weights.
 *
 * Groups of `nr` vectors of columns (the last has what is left), each [k][vector of the group][VL]; columns that do not
 * exist are zeros. `to` holds depth * vectors * VL floats. Packs the groups first <= g < end. */
#ifndef FW_PRODUCT_H
#define FW_PRODUCT_H

#include "vector.h"

FW_NOINLINE void fw_pack_columns(const float *b, ptrdiff_t row, ptrdiff_t column, int depth, int columns, int nr,
                                 float *to, int first, int end) {
    const int vectors = (columns + VL - 1) / VL;
    for (int g = first; g < end; g++) {
        const int wide = vectors - g * nr < nr ? vectors - g * nr : nr;
        float *out = to + (ptrdiff_t)g * nr * VL * depth;
        for (int k = 0; k < depth; k++) {
            for (int v = 0; v < wide; v++, out += VL) {
                const int start = (g * nr + v) * VL, some = columns - start < VL ? columns - start : VL;
                const float *from = b + k * row + start * column;
                if (column == 1 && some == VL) {
                    vf_store(out, vf_load(from));
                    continue;
                }
                for (int i = 0; i < VL; i++) out[i] = i < some ? from[i * column] : 0.0f;
            }
        }
    }
}
#endif
