/* fw_peak_run(rounds): rounds * FW_PEAK_CHAINS * VL multiply-adds that depend on nothing but themselves; the sum is returned
 * so that none can be left out. What a machine does here is its peak. */
#ifndef FW_PEAK_H
#define FW_PEAK_H

#include "vector.h"

#define FW_PEAK_CHAINS 12

FW_NOINLINE float fw_peak_chains(long rounds, float start) {
    vf acc[FW_PEAK_CHAINS];
    const vf a = vf_set(start), b = vf_set(1.0f - start);
    vf sum = vf_zero();
    FW_UNROLL for (int i = 0; i < FW_PEAK_CHAINS; i++) acc[i] = vf_set((float)i);
    for (long r = 0; r < rounds; r++) {
        FW_UNROLL for (int i = 0; i < FW_PEAK_CHAINS; i++) acc[i] = vf_fma(acc[i], b, a);
    }
    FW_UNROLL for (int i = 0; i < FW_PEAK_CHAINS; i++) sum += acc[i];
    return vf_sum(sum);
}

float fw_peak_run(long rounds);
float fw_peak_run(long rounds) { return fw_peak_chains(rounds, 0.125f); }
#endif
