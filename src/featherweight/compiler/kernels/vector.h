/* Vectors of float32: the only vocabulary that the other kernels speak.
 *
 * VL         lanes of a vector: 16 (AVX-512), 8 (AVX2), 4 (NEON, WASM, SSE2), 1 (portable C99).
 *            FW_VL, where defined, chooses it: packed weights and code must agree. FW_GENERIC means 1.
 * vf, vi     VL float32, VL int32. + - * / work on vf; + - & | ^ on vi, for vectors and for plain scalars.
 *            A mask is a vi with -1 (true) or 0 in each lane.
 * Memory is addressed by float or int32 pointers of their natural alignment only.
 * NaN: every function that takes one value gives NaN for NaN; vf_max and vf_min keep a NaN of their FIRST operand
 *            and drop one of their second, so that vf_max(x, zero) is a ReLU that does not hide a NaN.
 *
 * No state, no allocation. Functions beyond these are in vmath.h. */
#ifndef FW_VECTOR_H
#define FW_VECTOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef FW_VL
#if defined(FW_GENERIC) || !defined(__GNUC__)
#define FW_VL 1
#elif defined(__AVX512F__)
#define FW_VL 16
#elif defined(__AVX2__)
#define FW_VL 8
#else
#define FW_VL 4
#endif
#endif
#define VL FW_VL

/* Which intrinsics replace the plain form below; at most one of them is defined. */
#if VL == 16 && defined(__AVX512F__) && defined(__AVX512DQ__)
#define FW_AVX512
#elif VL == 8 && defined(__AVX2__)
#define FW_AVX2
#elif VL == 4 && defined(__SSE2__)
#define FW_SSE2
#elif VL == 4 && defined(__ARM_NEON) && defined(__aarch64__)
#define FW_NEON
#elif VL == 4 && defined(__wasm_simd128__)
#define FW_WASM
#endif
#if defined(FW_AVX512) || defined(FW_AVX2) || defined(FW_SSE2)
#include <immintrin.h>
#elif defined(FW_NEON)
#include <arm_neon.h>
#elif defined(FW_WASM)
#include <wasm_simd128.h>
#endif

#if VL == 1
typedef float vf;
typedef int32_t vi;
#else
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
#endif

#ifdef __GNUC__
#define FW_INLINE static inline __attribute__((always_inline))
#define FW_NOINLINE static __attribute__((noinline, unused))
#else
#define FW_INLINE static inline
#define FW_NOINLINE static
#endif
#define FW_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FW_UNROLL FW_PRAGMA(clang loop unroll(full))
#elif defined(__GNUC__)
#define FW_UNROLL FW_PRAGMA(GCC unroll 64)
#else
#define FW_UNROLL
#endif

/* Makes the compiler forget what it knows of a variable. Inside a loop it keeps sums of a pointer and strides where
 * x86 adds them for nothing, in the addressing mode, instead of in more registers than there are. */
#if defined(__GNUC__) && defined(__x86_64__)
#define FW_OPAQUE(variable) __asm__("" : "+r"(variable))
#else
#define FW_OPAQUE(variable) ((void)0)
#endif

/* Asks for a line of memory to come to the second-level cache; any address may be given. */
#ifdef __GNUC__
#define FW_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define FW_PREFETCH(p) ((void)(p))
#endif

FW_INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
FW_INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
FW_INLINE vi vi_load(const int32_t *p) { vi v; memcpy(&v, p, sizeof v); return v; }
FW_INLINE void vi_store(int32_t *p, vi v) { memcpy(p, &v, sizeof v); }

FW_INLINE vf vf_set(float s) {
#if VL == 1
    return s;
#elif defined(FW_AVX512)
    return _mm512_set1_ps(s);
#else
    return s - (vf){0};
#endif
}
FW_INLINE vi vi_set(int32_t s) {
#if VL == 1
    return s;
#else
    return s - (vi){0};
#endif
}
FW_INLINE vf vf_zero(void) { return vf_set(0.0f); }

/* The first n (0..VL) lanes; the others are `fill` on loading and stay untouched on storing. */
FW_INLINE vf vf_load_fill(const float *p, int n, float fill) {
#if defined(FW_AVX512)
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1u), p);
#else
    vf v = vf_set(fill);
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
#endif
}
FW_INLINE vf vf_load_n(const float *p, int n) { return vf_load_fill(p, n, 0.0f); }
FW_INLINE void vf_store_n(float *p, vf v, int n) {
#if defined(FW_AVX512)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v);
#else
    memcpy(p, &v, (size_t)n * sizeof(float));
#endif
}

/* Lane by lane through the C library, for what has no vector form. */
FW_INLINE vf vf_map(float (*f)(float), vf v) {
    float lanes[VL];
    vf_store(lanes, v);
    for (int i = 0; i < VL; i++) lanes[i] = f(lanes[i]);
    return vf_load(lanes);
}
FW_INLINE vf vf_map2(float (*f)(float, float), vf a, vf b) {
    float left[VL], right[VL];
    vf_store(left, a);
    vf_store(right, b);
    for (int i = 0; i < VL; i++) left[i] = f(left[i], right[i]);
    return vf_load(left);
}

/* a * b + c, fused where the machine can. */
FW_INLINE vf vf_fma(vf a, vf b, vf c) {
#if defined(FW_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(FW_AVX2) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(FW_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
FW_INLINE vf vf_max(vf a, vf b) { /* b > a ? b : a */
#if defined(FW_AVX512)
    return _mm512_max_ps(b, a);
#elif defined(FW_AVX2)
    return _mm256_max_ps(b, a);
#elif defined(FW_SSE2)
    return _mm_max_ps(b, a);
#elif defined(FW_WASM)
    return (vf)wasm_f32x4_pmax((v128_t)a, (v128_t)b);
#elif VL == 1
    return b > a ? b : a;
#else
    vi m = b > a;
    return (vf)(((vi)b & m) | ((vi)a & ~m));
#endif
}
FW_INLINE vf vf_min(vf a, vf b) { /* b < a ? b : a */
#if defined(FW_AVX512)
    return _mm512_min_ps(b, a);
#elif defined(FW_AVX2)
    return _mm256_min_ps(b, a);
#elif defined(FW_SSE2)
    return _mm_min_ps(b, a);
#elif defined(FW_WASM)
    return (vf)wasm_f32x4_pmin((v128_t)a, (v128_t)b);
#elif VL == 1
    return b < a ? b : a;
#else
    vi m = b < a;
    return (vf)(((vi)b & m) | ((vi)a & ~m));
#endif
}

/* Bits, conversions and masks. */
FW_INLINE vi vf_bits(vf v) { vi i; memcpy(&i, &v, sizeof i); return i; }
FW_INLINE vf vi_float_bits(vi i) { vf v; memcpy(&v, &i, sizeof v); return v; }
#if VL == 1
FW_INLINE vf vi_to_vf(vi i) { return (vf)i; }
FW_INLINE vi vf_to_vi(vf v) { return (vi)v; } /* towards zero; the value must fit */
FW_INLINE vi vf_gt(vf a, vf b) { return -(a > b); }
FW_INLINE vi vf_ge(vf a, vf b) { return -(a >= b); }
FW_INLINE vi vf_eq(vf a, vf b) { return -(a == b); }
FW_INLINE vf vf_select(vi mask, vf a, vf b) { return mask ? a : b; }
#else
FW_INLINE vf vi_to_vf(vi i) { return __builtin_convertvector(i, vf); }
FW_INLINE vi vf_to_vi(vf v) { return __builtin_convertvector(v, vi); }
FW_INLINE vi vf_gt(vf a, vf b) { return a > b; }
FW_INLINE vi vf_ge(vf a, vf b) { return a >= b; }
FW_INLINE vi vf_eq(vf a, vf b) { return a == b; }
FW_INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
#endif
FW_INLINE vi vf_nan(vf v) { return ~vf_eq(v, v); }
FW_INLINE vf vf_abs(vf v) { return vi_float_bits(vf_bits(v) & vi_set(0x7fffffff)); }
FW_INLINE vf vf_copysign(vf size, vf sign) {
    return vi_float_bits((vf_bits(size) & vi_set(0x7fffffff)) | (vf_bits(sign) & vi_set(INT32_MIN)));
}

FW_INLINE vf vf_sqrt(vf v) {
#if defined(FW_AVX512)
    return _mm512_sqrt_ps(v);
#elif defined(FW_AVX2)
    return _mm256_sqrt_ps(v);
#elif defined(FW_SSE2)
    return _mm_sqrt_ps(v);
#elif defined(FW_NEON)
    return vsqrtq_f32(v);
#elif defined(FW_WASM)
    return (vf)wasm_f32x4_sqrt((v128_t)v);
#else
    return vf_map(sqrtf, v);
#endif
}
/* To the nearest integer, halves to even. */
FW_INLINE vf vf_round(vf v) {
#if defined(FW_AVX512)
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FW_AVX2)
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FW_SSE2) && defined(__SSE4_1__)
    return _mm_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FW_NEON)
    return vrndnq_f32(v);
#elif defined(FW_WASM)
    return (vf)wasm_f32x4_nearest((v128_t)v);
#else
    return vf_map(rintf, v);
#endif
}
FW_INLINE vf vf_floor(vf v) {
#if defined(FW_AVX512)
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(FW_AVX2)
    return _mm256_round_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(FW_SSE2) && defined(__SSE4_1__)
    return _mm_round_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(FW_NEON)
    return vrndmq_f32(v);
#elif defined(FW_WASM)
    return (vf)wasm_f32x4_floor((v128_t)v);
#else
    return vf_map(floorf, v);
#endif
}
FW_INLINE vf vf_ceil(vf v) { return -vf_floor(-v); }
/* 1 / v within 1 ulp for normal v and result. */
FW_INLINE vf vf_reciprocal(vf v) {
#if defined(FW_AVX512)
    vf guess = _mm512_rcp14_ps(v);
    return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(v, guess, _mm512_set1_ps(1.0f)), guess);
#else
    return vf_set(1.0f) / v;
#endif
}
FW_INLINE float vf_sum(vf v) {
#if defined(FW_AVX512)
    return _mm512_reduce_add_ps(v);
#else
    float lanes[VL], sum = 0.0f;
    vf_store(lanes, v);
    for (int i = 0; i < VL; i++) sum += lanes[i];
    return sum;
#endif
}
/* The greatest lane; a NaN is dropped unless it stands in the first lane. */
FW_INLINE float vf_peak(vf v) {
#if defined(FW_AVX512)
    return _mm512_reduce_max_ps(v);
#else
    float lanes[VL], peak;
    vf_store(lanes, v);
    peak = lanes[0];
    for (int i = 1; i < VL; i++) peak = lanes[i] > peak ? lanes[i] : peak;
    return peak;
#endif
}

/* The address of row m (a constant) of rows `s1` bytes apart, where FW_STRIDES(floats) has declared s1 and its odd
 * multiples. On x86 each of the first 16 is base + s * (1, 2, 4 or 8), one addressing mode: 8 registers, not 16.
 * FW_HIDE_STRIDES inside the loop keeps the compiler from adding them up before it. */
#define FW_STRIDES(floats)                                                                                             \
    ptrdiff_t s1 = (floats) * (ptrdiff_t)sizeof(float), s3 = 3 * s1, s5 = 5 * s1, s7 = 7 * s1, s9 = 9 * s1,            \
              s11 = 11 * s1, s13 = 13 * s1, s15 = 15 * s1
#define FW_HIDE_STRIDES                                                                                                \
    do {                                                                                                               \
        FW_OPAQUE(s1); FW_OPAQUE(s3); FW_OPAQUE(s5); FW_OPAQUE(s7);                                                    \
        FW_OPAQUE(s9); FW_OPAQUE(s11); FW_OPAQUE(s13); FW_OPAQUE(s15);                                                 \
    } while (0)
#define FW_ROW(base, m) fw_row(base, m, s1, s3, s5, s7, s9, s11, s13, s15)
FW_INLINE const float *fw_row(const char *base, int m, ptrdiff_t s1, ptrdiff_t s3, ptrdiff_t s5, ptrdiff_t s7,
                              ptrdiff_t s9, ptrdiff_t s11, ptrdiff_t s13, ptrdiff_t s15) {
    const int twos = m & 1 ? 1 : m & 2 ? 2 : m & 4 ? 4 : 8, odd = m / twos;
    const ptrdiff_t step = odd == 1   ? s1
                           : odd == 3 ? s3
                           : odd == 5 ? s5
                           : odd == 7 ? s7
                           : odd == 9 ? s9
                           : odd == 11 ? s11
                           : odd == 13 ? s13
                                       : s15;
    return (const float *)(const void *)(m == 0 ? base : m < 16 ? base + step * twos : base + s1 * m);
}

#endif
