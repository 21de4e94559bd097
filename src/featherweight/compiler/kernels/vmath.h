/* Mathematics and activations on vectors of float32. Errors are the greatest seen against float64, in units in the last
 * place (ulp) of the result for normal results, or absolute.
 *
 *   vf_exp 2 ulp, vf_expm1 4 ulp, vf_log 2 ulp, vf_tanh 3 ulp, vf_erf 5 ulp,
 *   vf_sigmoid 4 + |x| ulp for x > -87 (smaller x: below 1.2e-38)
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

/* 1 / (1 + 2^-t) with t = x log2 e: the rounding of t costs |x| ulp where the result is small, and spares a third of
 * the work; this is the inner loop of networks with SiLU. */
FW_INLINE vf vf_sigmoid(vf x) {
    static const float c[] = {0.00187757623f, 0.00898934156f, 0.0558263175f, 0.240153611f, 0.693153083f, 0.99999994f};
#if defined(FW_AVX512)
    const vf t = _mm512_min_ps(_mm512_set1_ps(126.0f), x * _mm512_set1_ps(-1.44269504f));
    const vf rest = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const vf power = _mm512_scalef_ps(fw_horner(rest, c, 6), t);
#else
    const vf t = vf_min(vf_max(x * vf_set(-1.44269504f), vf_set(-126.0f)), vf_set(126.0f)), whole = vf_floor(t);
    const vf known = vf_max(vf_set(-126.0f), whole); /* no NaN may reach the integers */
    const vf power = fw_horner(t - whole, c, 6) * vi_float_bits((vf_to_vi(known) + 127) << 23);
#endif
    return vf_reciprocal(power + vf_set(1.0f));
}

FW_INLINE vf vf_tanh(vf x) {
    static const float c[] = {-0.00571703678f, 0.0206505787f, -0.0537434965f, 0.133314908f, -0.333332837f};
    const vf size = vf_min(vf_abs(x), vf_set(10.0f)), square = x * x;
    const vf large = vf_set(1.0f) - vf_set(2.0f) * vf_reciprocal(vf_exp(size + size) + vf_set(1.0f));
    const vf small = vf_fma(x * square, fw_horner(square, c, 5), x);
    return vf_select(vf_gt(vf_set(0.625f), size), small, vf_copysign(large, x));
}

/* x p(x^2) up to 3.92, where erf is 1 - 3e-8; p in powers of 2 (x / 3.92)^2 - 1, which keeps its terms small. */
FW_INLINE vf vf_erf(vf x) {
    static const float c[] = {-0.00084562652f, 0.00210000621f, -0.0013889136f, 0.00191601273f, -0.00766787445f,
        0.0142148407f, -0.0199902263f, 0.0296946056f, -0.0434385054f, 0.0583969057f, -0.0740195364f, 0.0905968398f,
        -0.109179243f, 0.134084567f, -0.180108622f, 0.360736817f};
    const vf inside = vf_min(vf_max(x, vf_set(-3.92f)), vf_set(3.92f));
    return inside * fw_horner(vf_fma(inside * inside, vf_set(0.130154103f), vf_set(-1.0f)), c, 16);
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
