/* Helpers of the plain loops: integer arithmetic without traps, saturation, ranges of convolution taps. */
#ifndef FW_BASE_H
#define FW_BASE_H

#ifndef NAN
#define NAN (0.0f / 0.0f)
#endif

/* Division and remainder that never trap: by zero gives zero, the smallest integer by -1 wraps. */
static inline int64_t fw_div(int64_t a, int64_t b) {
    if (b == 0) return 0;
    if (b == -1) return (int64_t)(0 - (uint64_t)a);
    return a / b;
}
static inline uint64_t fw_udiv(uint64_t a, uint64_t b) { return b == 0 ? 0 : a / b; }
static inline int64_t fw_fmod(int64_t a, int64_t b) { return b == 0 || b == -1 ? 0 : a % b; }
/* Remainder with the sign of the divisor. */
static inline int64_t fw_mod(int64_t a, int64_t b) {
    int64_t r = fw_fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
static inline uint64_t fw_umod(uint64_t a, uint64_t b) { return b == 0 ? 0 : a % b; }
static inline double fw_fmodd(double a, double b) {
    double r = fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

static inline long fw_min(long a, long b) { return a < b ? a : b; }
static inline long fw_max(long a, long b) { return a > b ? a : b; }

/* First and last + 1 output position whose input o * stride + shift lies in 0 .. size - 1. */
static inline long fw_first(long shift, long stride) { return shift >= 0 ? 0 : (-shift + stride - 1) / stride; }
static inline long fw_last(long shift, long stride, long size, long outputs) {
    long reach = size - 1 - shift;
    return reach < 0 ? 0 : fw_min(outputs, reach / stride + 1);
}

/* Round half to even and saturate. */
static inline double fw_saturate(double value, double low, double high) {
    double rounded = rint(value);
    return rounded < low ? low : rounded > high ? high : rounded == rounded ? rounded : 0.0;
}
static inline float fw_saturatef(float value, float low, float high) {
    float rounded = rintf(value);
    return rounded < low ? low : rounded > high ? high : rounded == rounded ? rounded : 0.0f;
}
#endif
