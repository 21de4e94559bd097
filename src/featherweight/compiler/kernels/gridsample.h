/* GridSample: from a position on one axis to the input elements around it and their weights.
 *
 * p[k] is -1 where the element lies outside and counts as zero. padding: 0 zeros, 1 border, 2 reflection.
 * corners: whether the ends of the axis are the centres of the outer elements. */
#ifndef FW_GRIDSAMPLE_H
#define FW_GRIDSAMPLE_H

static inline double fw_grid_reflect(double x, double low, double high) {
    double range = high - low, past;
    if (range <= 0) return 0;
    past = fmod(fabs(x - low), 2 * range);
    return low + (past <= range ? past : 2 * range - past);
}

/* One element's index after padding, or -1. */
static inline long fw_grid_index(double x, long size, int padding, int corners) {
    if (x != x) x = 0;
    if (padding == 2) x = corners ? fw_grid_reflect(x, 0, size - 1.0) : fw_grid_reflect(x, -0.5, size - 0.5);
    if (padding != 0) return x < 0 ? 0 : x > size - 1 ? size - 1 : (long)x;
    return x < 0 || x > size - 1 ? -1 : (long)x;
}

/* The position itself moves into the image before its neighbours are looked up. */
static inline double fw_grid_inside(double x, long size, int padding, int corners) {
    double past = size + 4.0;
    if (x != x) x = 0;
    if (padding == 2) x = corners ? fw_grid_reflect(x, 0, size - 1.0) : fw_grid_reflect(x, -0.5, size - 0.5);
    if (padding != 0) return x < 0 ? 0 : x > size - 1 ? size - 1.0 : x;
    return x < -4 ? -4 : x > past ? past : x;
}

static inline void fw_grid_nearest(double x, long size, int padding, int corners, long *p, double *w) {
    p[0] = fw_grid_index(rint(fw_grid_inside(x, size, padding, corners)), size, padding, corners);
    w[0] = 1;
}

static inline void fw_grid_linear(double x, long size, int padding, int corners, long *p, double *w) {
    double at = fw_grid_inside(x, size, padding, corners), base = floor(at);
    int k;
    for (k = 0; k < 2; k++) p[k] = fw_grid_index(base + k, size, padding, corners);
    w[1] = at - base, w[0] = 1 - w[1];
}

static inline void fw_grid_cubic(double x, long size, int padding, int corners, long *p, double *w) {
    const double a = -0.75;
    double base, t;
    int k;
    if (x != x) x = 0;
    x = x < -1e9 ? -1e9 : x > 1e9 ? 1e9 : x;
    base = floor(x), t = x - base;
    for (k = 0; k < 4; k++) p[k] = fw_grid_index(base + k - 1, size, padding, corners);
    w[0] = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a;
    w[1] = ((a + 2) * t - (a + 3)) * t * t + 1;
    w[2] = ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1;
    w[3] = ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a;
}
#endif
