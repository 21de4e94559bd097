/* Mathematics and activations on vectors of float32. Errors are the greatest seen against float64, in units in the last
 * place (ulp) of the result for normal results, or absolute.
 *
 *   vf_exp 2 ulp, vf_expm1 4 ulp, vf_log 2 ulp, vf_tanh 3 ulp, vf_erf 3 ulp,
 *   vf_sigmoid 4 ulp for x > -87 (smaller x: the value at -87)
 *   vf_silu, vf_gelu (with erf), vf_gelu_tanh, vf_softplus, vf_mish, vf_elu, vf_hard_sigmoid, vf_hard_swish, vf_relu,
 *   vf_relu6, vf_clip, vf_leaky_relu, vf_softsign: from these, within 1e-6 * max(1, |x|).
 * All keep NaN. The polynomials are our own least-maximum fits. */
#ifndef FW_VMATH_H
#define FW_VMATH_H

#include "vector.h"

/* Horner's rule, the highest coefficient first. */
FW_INLINE vf fw_horner(vf x, const float *c, int count) {
    vf sum = vf_set(c[0]);
    FW_UNROLL for (int i = 1; i < count; i++) sum = vf_fma(sum, x, vf_set(c[i]));
    return sum;
}

/* p * 2^n for whole n in -150..128: in two steps, since neither 2^128 nor 2^-150 is a normal number. */
FW_INLINE vf fw_scale(vf p, vf n) {
#if defined(FW_AVX512)
    return _mm512_scalef_ps(p, n);
#else
    const vi whole = vf_to_vi(n), half = whole >> 1;
    return p * vi_float_bits((half + 127) << 23) * vi_float_bits((whole - half + 127) << 23);
#endif
}

/* exp(x) = (1 + result) * 2^n, for x cut to the range where exp is neither 0 nor infinite. */
FW_INLINE vf fw_exp_parts(vf x, vf *n) {
    static const float c[] = {0.00138145965f, 0.00836871751f, 0.041668389f, 0.166665211f, 0.49999994f};
    const vf inside = vf_min(vf_max(x, vf_set(-104.0f)), vf_set(89.0f));
    /* The limits come first: a NaN must not reach the integers. */
    *n = vf_max(vf_set(-150.0f), vf_min(vf_set(128.0f), vf_round(inside * vf_set(1.44269504f))));
    const vf r = vf_fma(*n, vf_set(2.12194440e-4f), vf_fma(*n, vf_set(-0.693359375f), inside));
    return vf_fma(r * r, fw_horner(r, c, 5), r);
}
FW_INLINE vf vf_exp(vf x) {
    vf n;
    const vf part = fw_exp_parts(x, &n);
    return fw_scale(part + vf_set(1.0f), n);
}
FW_INLINE vf vf_expm1(vf x) {
    vf n;
    const vf part = fw_exp_parts(x, &n);
    return vf_select(vf_eq(n, vf_zero()), part, fw_scale(part + vf_set(1.0f), n) - vf_set(1.0f));
}

FW_INLINE vf vf_log(vf x) {
    static const float c[] = {0.0691516548f, -0.117897049f, 0.118730128f, -0.123843685f, 0.142186552f, -0.166692495f,
        0.200022265f, -0.249999866f, 0.333333105f};
    const vi tiny = vf_gt(vf_set(1.17549435e-38f), x), inside = vf_gt(x, vf_zero()) & vf_gt(vf_set(INFINITY), x);
    const vf normal = vf_select(inside, vf_select(tiny, x * vf_set(8388608.0f), x), vf_set(1.0f));
    const vi bits = vf_bits(normal) - 0x3f3504f3; /* relative to sqrt(1/2): the mantissa's range is around 1 */
    const vf n = vi_to_vf(bits >> 23) - vf_select(tiny, vf_set(23.0f), vf_zero());
    const vf f = vi_float_bits((bits & 0x007fffff) + 0x3f3504f3) - vf_set(1.0f), square = f * f;
    const vf tail = vf_fma(square * f, fw_horner(f, c, 9), vf_fma(n, vf_set(-2.12194440e-4f), square * vf_set(-0.5f)));
    const vf value = vf_fma(n, vf_set(0.693359375f), tail + f);
    const vf edge = vf_select(vf_eq(x, vf_zero()), vf_set(-INFINITY), vf_select(vf_gt(x, vf_zero()), x, vf_set(NAN)));
    return vf_select(inside, value, edge);
}

FW_INLINE vf vf_sigmoid(vf x) { return vf_reciprocal(vf_exp(vf_min(-x, vf_set(87.0f))) + vf_set(1.0f)); }

FW_INLINE vf vf_tanh(vf x) {
    static const float c[] = {-0.00571703678f, 0.0206505787f, -0.0537434965f, 0.133314908f, -0.333332837f};
    const vf size = vf_min(vf_abs(x), vf_set(10.0f)), square = x * x;
    const vf large = vf_set(1.0f) - vf_set(2.0f) * vf_reciprocal(vf_exp(size + size) + vf_set(1.0f));
    const vf small = vf_fma(x * square, fw_horner(square, c, 5), x);
    return vf_select(vf_gt(vf_set(0.625f), size), small, vf_copysign(large, x));
}

FW_INLINE vf vf_erf(vf x) {
    static const float near[] = {7.8891193e-05f, -0.000802084105f, 0.00518953521f, -0.0268544443f, 0.112836003f,
        -0.37612626f, 1.12837911f};
    static const float far[] = {-2.16868502e-05f, 0.000441336364f, -0.00420456193f, 0.0252082571f, -0.108418576f,
        -0.633219898f, -1.12957847f, 0.000188040227f};
    const vf size = vf_min(vf_abs(x), vf_set(4.0f));
    const vf small = x * fw_horner(x * x, near, 7);
    const vf large = vf_set(1.0f) - vf_exp(fw_horner(size, far, 8));
    return vf_select(vf_gt(vf_set(1.0f), size), small, vf_copysign(large, x));
}

FW_INLINE vf vf_clip(vf x, float low, float high) { return vf_min(vf_max(x, vf_set(low)), vf_set(high)); }
FW_INLINE vf vf_relu(vf x) { return vf_max(x, vf_zero()); }
FW_INLINE vf vf_relu6(vf x) { return vf_clip(x, 0.0f, 6.0f); }
FW_INLINE vf vf_leaky_relu(vf x, float slope) {
    return vf_select(vf_gt(vf_zero(), x), x * vf_set(slope), x);
}
FW_INLINE vf vf_hard_sigmoid(vf x, float slope, float shift) {
    return vf_clip(vf_fma(x, vf_set(slope), vf_set(shift)), 0.0f, 1.0f);
}
FW_INLINE vf vf_hard_swish(vf x) { return x * vf_hard_sigmoid(x, 1.0f / 6.0f, 0.5f); }
FW_INLINE vf vf_silu(vf x) { return x * vf_sigmoid(x); }
FW_INLINE vf vf_gelu(vf x) {
    const vf half = x * vf_set(0.5f);
    return vf_fma(half, vf_erf(x * vf_set(0.70710678f)), half);
}
FW_INLINE vf vf_gelu_tanh(vf x) {
    const vf cubic = vf_fma(x * x * x, vf_set(0.044715f), x), half = x * vf_set(0.5f);
    return vf_fma(half, vf_tanh(cubic * vf_set(0.79788456f)), half);
}
FW_INLINE vf vf_softplus(vf x) {
    return vf_max(x, vf_zero()) + vf_log(vf_exp(-vf_abs(x)) + vf_set(1.0f));
}
/* x tanh(log(1 + e^x)) = x (e^2x + 2 e^x) / (e^2x + 2 e^x + 2) */
FW_INLINE vf vf_mish(vf x) {
    const vf e = vf_exp(vf_min(x, vf_set(20.0f))), n = vf_fma(e, e, e + e);
    return x * n * vf_reciprocal(n + vf_set(2.0f));
}
FW_INLINE vf vf_elu(vf x, float alpha) {
    return vf_select(vf_gt(vf_zero(), x), vf_set(alpha) * vf_expm1(x), x);
}
FW_INLINE vf vf_softsign(vf x) { return x * vf_reciprocal(vf_abs(x) + vf_set(1.0f)); }

#endif
