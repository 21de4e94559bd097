/* The sixteen lanes of int8_vector.h in four registers of 128 bits: NEON and SIMD of WebAssembly.
 *
 * fw_dp in one dot product of the machine where it has one. That of ARMv8.2 multiplies bytes of the same kind only, so
 * unsigned x meets w + 128; what that adds, 128 * x, depends on x alone and is computed once for all weights that x meets.
 * The rest multiplies 16-bit halves. All ways are exact. */
#ifndef FW_INT8_NARROW_H
#define FW_INT8_NARROW_H

#include <stdint.h>
#include <string.h>

#if !defined(FW_GENERIC) && defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
#define FW_INT8_128 1
#include <arm_neon.h>
#elif !defined(FW_GENERIC) && defined(__wasm_simd128__)
#define FW_INT8_128 1
#include <wasm_simd128.h>
#endif

#if defined(FW_INT8_128)
#define FW_NARROW static inline __attribute__((always_inline))
typedef int32_t fw_q __attribute__((vector_size(16)));
typedef float fw_r __attribute__((vector_size(16)));
typedef struct { fw_q a, b, c, d; } fw_i32;
typedef struct { fw_r a, b, c, d; } fw_f32;
typedef fw_i32 fw_x4;
typedef fw_i32 fw_w4;

/* One register. */
FW_NARROW fw_q fw_q_set(int32_t v) { return (fw_q){v, v, v, v}; }
FW_NARROW fw_r fw_r_set(float v) { return (fw_r){v, v, v, v}; }
FW_NARROW fw_q fw_q_add(fw_q a, fw_q b) { return a + b; }
FW_NARROW fw_q fw_q_sub(fw_q a, fw_q b) { return a - b; }
FW_NARROW fw_q fw_q_mul(fw_q a, fw_q b) { return a * b; }
FW_NARROW fw_r fw_r_add(fw_r a, fw_r b) { return a + b; }
FW_NARROW fw_r fw_r_div(fw_r a, fw_r b) { return a / b; }
FW_NARROW fw_r fw_r_clamp(fw_r v, fw_r lo, fw_r hi) /* a NaN becomes lo, as on x86 */
{
    const fw_q above = v > lo, below = v < hi;
    return (fw_r)((below & above & (fw_q)v) | (~above & (fw_q)lo) | (above & ~below & (fw_q)hi));
}
FW_NARROW fw_q fw_q_load(const void *p)
{
    fw_q v;
    memcpy(&v, p, 16);
    return v;
}
FW_NARROW fw_r fw_r_load(const void *p) { return (fw_r)fw_q_load(p); }

#if defined(__aarch64__)
FW_NARROW fw_q fw_q_min(fw_q a, fw_q b) { return (fw_q)vminq_s32((int32x4_t)a, (int32x4_t)b); }
FW_NARROW fw_q fw_q_max(fw_q a, fw_q b) { return (fw_q)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
FW_NARROW fw_r fw_r_from(fw_q v) { return (fw_r)vcvtq_f32_s32((int32x4_t)v); }
FW_NARROW fw_q fw_r_rint(fw_r v) { return (fw_q)vcvtnq_s32_f32((float32x4_t)v); }
FW_NARROW fw_r fw_r_mul(fw_r a, fw_r b)
{
    fw_r t = a * b;
    __asm__("" : "+w"(t));
    return t;
}
FW_NARROW fw_i32 fw_i32_u8(const uint8_t *p)
{
    const uint8x16_t v = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_high_u8(v);
    fw_i32 r;
    r.a = (fw_q)vmovl_u16(vget_low_u16(low)), r.b = (fw_q)vmovl_high_u16(low);
    r.c = (fw_q)vmovl_u16(vget_low_u16(high)), r.d = (fw_q)vmovl_high_u16(high);
    return r;
}
FW_NARROW fw_q fw_q_dp(fw_q acc, fw_q x, fw_q w)
{
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return (fw_q)vusdotq_s32((int32x4_t)acc, (uint8x16_t)x, (int8x16_t)w);
#elif defined(__ARM_FEATURE_DOTPROD)
    const uint8x16_t half = vdupq_n_u8(128);
    const uint32x4_t extra = vdotq_u32(vdupq_n_u32(0), (uint8x16_t)x, half);
    return (fw_q)vsubq_u32(vdotq_u32((uint32x4_t)acc, (uint8x16_t)x, veorq_u8((uint8x16_t)w, half)), extra);
#else
    const int16x8_t x0 = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8((uint8x16_t)x)));
    const int16x8_t x1 = vreinterpretq_s16_u16(vmovl_high_u8((uint8x16_t)x));
    const int16x8_t w0 = vmovl_s8(vget_low_s8((int8x16_t)w)), w1 = vmovl_high_s8((int8x16_t)w);
    const int32x4_t p0 = vmull_s16(vget_low_s16(x0), vget_low_s16(w0)), p1 = vmull_high_s16(x0, w0);
    const int32x4_t p2 = vmull_s16(vget_low_s16(x1), vget_low_s16(w1)), p3 = vmull_high_s16(x1, w1);
    return acc + (fw_q)vpaddq_s32(vpaddq_s32(p0, p1), vpaddq_s32(p2, p3));
#endif
}
/* Bytes of v, saturated. */
FW_NARROW fw_q fw_q_bytes(fw_i32 v)
{
    const int16x8_t low = vcombine_s16(vqmovn_s32((int32x4_t)v.a), vqmovn_s32((int32x4_t)v.b));
    const int16x8_t high = vcombine_s16(vqmovn_s32((int32x4_t)v.c), vqmovn_s32((int32x4_t)v.d));
    return (fw_q)vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
}
#else
FW_NARROW fw_q fw_q_min(fw_q a, fw_q b) { return (fw_q)wasm_i32x4_min((v128_t)a, (v128_t)b); }
FW_NARROW fw_q fw_q_max(fw_q a, fw_q b) { return (fw_q)wasm_i32x4_max((v128_t)a, (v128_t)b); }
FW_NARROW fw_r fw_r_from(fw_q v) { return (fw_r)wasm_f32x4_convert_i32x4((v128_t)v); }
FW_NARROW fw_q fw_r_rint(fw_r v)
{
    return (fw_q)wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_nearest((v128_t)v));
}
FW_NARROW fw_r fw_r_mul(fw_r a, fw_r b) { return a * b; } /* there is no fused multiply-add */
FW_NARROW fw_i32 fw_i32_u8(const uint8_t *p)
{
    const v128_t v = (v128_t)fw_q_load(p);
    const v128_t low = wasm_u16x8_extend_low_u8x16(v), high = wasm_u16x8_extend_high_u8x16(v);
    fw_i32 r;
    r.a = (fw_q)wasm_u32x4_extend_low_u16x8(low), r.b = (fw_q)wasm_u32x4_extend_high_u16x8(low);
    r.c = (fw_q)wasm_u32x4_extend_low_u16x8(high), r.d = (fw_q)wasm_u32x4_extend_high_u16x8(high);
    return r;
}
FW_NARROW fw_q fw_q_dp(fw_q acc, fw_q x, fw_q w)
{
    const v128_t vx = (v128_t)x, vw = (v128_t)w;
    const v128_t even = wasm_i16x8_shr(wasm_i16x8_shl(vw, 8), 8), odd = wasm_i16x8_shr(vw, 8);
    const v128_t low = wasm_i32x4_dot_i16x8(wasm_v128_and(vx, (v128_t)fw_q_set(0x00ff00ff)), even);
    return acc + (fw_q)low + (fw_q)wasm_i32x4_dot_i16x8(wasm_u16x8_shr(vx, 8), odd);
}
FW_NARROW fw_q fw_q_bytes(fw_i32 v)
{
    const v128_t low = wasm_i16x8_narrow_i32x4((v128_t)v.a, (v128_t)v.b);
    return (fw_q)wasm_u8x16_narrow_i16x8(low, wasm_i16x8_narrow_i32x4((v128_t)v.c, (v128_t)v.d));
}
#endif

/* Four registers. */
#define FW_QUAD1(T, F, X) T r; r.a = F(X.a); r.b = F(X.b); r.c = F(X.c); r.d = F(X.d); return r
#define FW_QUAD2(T, F, X, Y) T r; r.a = F(X.a, Y.a); r.b = F(X.b, Y.b); r.c = F(X.c, Y.c); r.d = F(X.d, Y.d); return r
#define FW_QUAD_SET(T, V) T r; r.a = r.b = r.c = r.d = (V); return r
#define FW_QUAD_LOAD(T, F, P) \
    T r; r.a = F(P); r.b = F((const char *)(P) + 16); r.c = F((const char *)(P) + 32); r.d = F((const char *)(P) + 48); return r

FW_NARROW fw_i32 fw_i32_load(const int32_t *p) { FW_QUAD_LOAD(fw_i32, fw_q_load, p); }
FW_NARROW fw_i32 fw_i32_set(int32_t v) { FW_QUAD_SET(fw_i32, fw_q_set(v)); }
FW_NARROW fw_i32 fw_i32_add(fw_i32 x, fw_i32 y) { FW_QUAD2(fw_i32, fw_q_add, x, y); }
FW_NARROW fw_i32 fw_i32_sub(fw_i32 x, fw_i32 y) { FW_QUAD2(fw_i32, fw_q_sub, x, y); }
FW_NARROW fw_i32 fw_i32_mul(fw_i32 x, fw_i32 y) { FW_QUAD2(fw_i32, fw_q_mul, x, y); }
FW_NARROW fw_i32 fw_i32_min(fw_i32 x, fw_i32 y) { FW_QUAD2(fw_i32, fw_q_min, x, y); }
FW_NARROW fw_i32 fw_i32_max(fw_i32 x, fw_i32 y) { FW_QUAD2(fw_i32, fw_q_max, x, y); }
FW_NARROW void fw_i32_store(int32_t *p, fw_i32 v) { memcpy(p, &v, sizeof v); }
FW_NARROW fw_f32 fw_f32_load(const float *p) { FW_QUAD_LOAD(fw_f32, fw_r_load, p); }
FW_NARROW void fw_f32_store(float *p, fw_f32 v, int lanes) { memcpy(p, &v, (size_t)lanes * sizeof(float)); }
FW_NARROW fw_f32 fw_f32_set(float v) { FW_QUAD_SET(fw_f32, fw_r_set(v)); }
FW_NARROW fw_f32 fw_f32_i32(fw_i32 v) { FW_QUAD1(fw_f32, fw_r_from, v); }
FW_NARROW fw_f32 fw_f32_mul(fw_f32 x, fw_f32 y) { FW_QUAD2(fw_f32, fw_r_mul, x, y); }
FW_NARROW fw_f32 fw_f32_add(fw_f32 x, fw_f32 y) { FW_QUAD2(fw_f32, fw_r_add, x, y); }
FW_NARROW fw_f32 fw_f32_div(fw_f32 x, fw_f32 y) { FW_QUAD2(fw_f32, fw_r_div, x, y); }
FW_NARROW fw_f32 fw_f32_clamp(fw_f32 v, float lo, float hi)
{
    const fw_r low = fw_r_set(lo), high = fw_r_set(hi);
    fw_f32 r;
    r.a = fw_r_clamp(v.a, low, high), r.b = fw_r_clamp(v.b, low, high);
    r.c = fw_r_clamp(v.c, low, high), r.d = fw_r_clamp(v.d, low, high);
    return r;
}
FW_NARROW fw_i32 fw_i32_rint(fw_f32 v) { FW_QUAD1(fw_i32, fw_r_rint, v); }
FW_NARROW fw_x4 fw_x4_set(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return fw_i32_set(four);
}
FW_NARROW fw_x4 fw_x4_load(const uint8_t *p) { FW_QUAD_LOAD(fw_x4, fw_q_load, p); }
FW_NARROW fw_w4 fw_w4_load(const int8_t *p) { FW_QUAD_LOAD(fw_w4, fw_q_load, p); }
FW_NARROW fw_i32 fw_dp(fw_i32 acc, fw_x4 x, fw_w4 w)
{
    acc.a = fw_q_dp(acc.a, x.a, w.a), acc.b = fw_q_dp(acc.b, x.b, w.b);
    acc.c = fw_q_dp(acc.c, x.c, w.c), acc.d = fw_q_dp(acc.d, x.d, w.d);
    return acc;
}
FW_NARROW void fw_u8_store(uint8_t *p, fw_i32 v, int zero, int lo, int hi, int lanes)
{
    const fw_i32 q = fw_i32_min(fw_i32_max(fw_i32_add(v, fw_i32_set(zero)), fw_i32_set(lo)), fw_i32_set(hi));
    const fw_q bytes = fw_q_bytes(q);
    memcpy(p, &bytes, (size_t)lanes);
}
#endif

#endif
