/* Sixteen lanes of 8-bit arithmetic, the ground on which the other int8 files stand.
 *
 * Conventions of all int8 kernels
 *   Tensors     every 8-bit tensor is unsigned inside the program: value = (q - zero) * scale, q and zero in
 *               0..255. A signed QDQ tensor (q', zero') is the same tensor with q = q' + 128 and
 *               zero = zero' + 128, so only inputs and outputs of the graph are flipped (fw_u8_flip).
 *   Layout      [N][H][W][Cs]: Cs bytes a pixel, the channels rounded up to 16. Lanes past the last channel hold
 *               some byte; no reduction reads them (their weights are zero).
 *   Rounding    to the nearest, ties to even, then saturation: q = clamp(rint(t) + zero, lo, hi) with t in float32.
 *               lo and hi are the limits of an activation in output steps (0 and 255 without one), so that ReLU
 *               and ReLU6 cost nothing. All paths (AVX-512, AVX2, NEON, WASM, C99) give the same bits.
 *
 * Types and operations (16 lanes each): fw_i32 int32, fw_f32 float32, fw_x4 and fw_w4 groups of four bytes a lane.
 *   fw_dp(acc, x, w)        acc + sum over the four bytes of x (unsigned) * w (signed), exact
 *   fw_x4_set(p)            the four bytes at p in every lane;   fw_x4_load(p), fw_w4_load(p) 64 bytes at p
 *   fw_f32_mul, fw_f32_add  never contracted to a fused multiply-add: products are rounded to float32
 *   fw_i32_rint(f)          nearest even; |f| < 2^31
 *   fw_u8_store(p, v, zero, lo, hi, lanes)      the first 1..16 bytes of clamp(v + zero, lo, hi)
 *   fw_u8_store4(to, run, v, zero, lo, hi)      the same for four vectors at to[0..3]; run of them lie side by side
 */
#ifndef FW_INT8_VECTOR_H
#define FW_INT8_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "int8_narrow.h"

#if !defined(FW_GENERIC) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FW_INT8_512 1
#include <immintrin.h>
#elif !defined(FW_GENERIC) && defined(__AVX2__)
#define FW_INT8_256 1
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define FW_INT8_INLINE static inline __attribute__((always_inline))
#define FW_INT8_FUNCTION static __attribute__((noinline, unused))
#else
#define FW_INT8_INLINE static inline
#define FW_INT8_FUNCTION static
#endif
/* Without vectors a lane is a loop of its own: unrolling around it only makes code. */
#if !defined(FW_INT8_512) && !defined(FW_INT8_256) && !defined(FW_INT8_128)
#define FW_INT8_UNROLL
#elif defined(__clang__)
#define FW_INT8_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FW_INT8_UNROLL _Pragma("GCC unroll 32")
#endif

/* Hides from the compiler what it knows of a variable; see FW_OPAQUE in vector.h. */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(FW_GENERIC)
#define FW_INT8_OPAQUE(variable) __asm__("" : "+r"(variable))
#else
#define FW_INT8_OPAQUE(variable) ((void)0)
#endif

/* Part `part` of `parts` of `total` items: [begin, end). */
FW_INT8_INLINE int fw_int8_begin(int total, int part, int parts)
{
    return (int)((int64_t)total * part / parts);
}

FW_INT8_INLINE int32_t fw_int8_clamp(int32_t v, int32_t lo, int32_t hi)
{
    return v < lo ? lo : v > hi ? hi : v;
}

#if defined(FW_INT8_512)
typedef __m512i fw_i32;
typedef __m512 fw_f32;
typedef __m512i fw_x4;
typedef __m512i fw_w4;

FW_INT8_INLINE fw_i32 fw_i32_load(const int32_t *p) { return _mm512_loadu_si512(p); }
FW_INT8_INLINE fw_i32 fw_i32_set(int32_t v) { return _mm512_set1_epi32(v); }
FW_INT8_INLINE fw_i32 fw_i32_add(fw_i32 a, fw_i32 b) { return _mm512_add_epi32(a, b); }
FW_INT8_INLINE fw_i32 fw_i32_sub(fw_i32 a, fw_i32 b) { return _mm512_sub_epi32(a, b); }
FW_INT8_INLINE fw_i32 fw_i32_mul(fw_i32 a, fw_i32 b) { return _mm512_mullo_epi32(a, b); }
FW_INT8_INLINE fw_i32 fw_i32_min(fw_i32 a, fw_i32 b) { return _mm512_min_epi32(a, b); }
FW_INT8_INLINE fw_i32 fw_i32_max(fw_i32 a, fw_i32 b) { return _mm512_max_epi32(a, b); }
FW_INT8_INLINE fw_i32 fw_i32_u8(const uint8_t *p)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
FW_INT8_INLINE void fw_i32_store(int32_t *p, fw_i32 v) { _mm512_storeu_si512(p, v); }
FW_INT8_INLINE fw_f32 fw_f32_load(const float *p) { return _mm512_loadu_ps(p); }
FW_INT8_INLINE void fw_f32_store(float *p, fw_f32 v, int lanes)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << lanes) - 1u), v);
}
FW_INT8_INLINE fw_f32 fw_f32_set(float v) { return _mm512_set1_ps(v); }
FW_INT8_INLINE fw_f32 fw_f32_i32(fw_i32 v) { return _mm512_cvtepi32_ps(v); }
FW_INT8_INLINE fw_f32 fw_f32_mul(fw_f32 a, fw_f32 b)
{
    fw_f32 t = _mm512_mul_ps(a, b);
    __asm__("" : "+v"(t));
    return t;
}
FW_INT8_INLINE fw_f32 fw_f32_add(fw_f32 a, fw_f32 b) { return _mm512_add_ps(a, b); }
FW_INT8_INLINE fw_f32 fw_f32_div(fw_f32 a, fw_f32 b) { return _mm512_div_ps(a, b); }
FW_INT8_INLINE fw_f32 fw_f32_clamp(fw_f32 v, float lo, float hi)
{
    return _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(lo)), _mm512_set1_ps(hi));
}
FW_INT8_INLINE fw_i32 fw_i32_rint(fw_f32 v)
{
    return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FW_INT8_INLINE fw_x4 fw_x4_set(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
FW_INT8_INLINE fw_x4 fw_x4_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
FW_INT8_INLINE fw_w4 fw_w4_load(const int8_t *p) { return _mm512_loadu_si512(p); }
FW_INT8_INLINE fw_i32 fw_dp(fw_i32 acc, fw_x4 x, fw_w4 w)
{
#if defined(__AVX512VNNI__)
    /* Not the intrinsic: GCC 12 copies the sums around it and then spills them. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "vm"(w));
    return acc;
#else
    const __m512i low = _mm512_set1_epi16(255);
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(x, low), _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
}
FW_INT8_INLINE void fw_u8_store(uint8_t *p, fw_i32 v, int zero, int lo, int hi, int lanes)
{
    __m512i q = _mm512_add_epi32(v, _mm512_set1_epi32(zero));
    q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_set1_epi32(lo)), _mm512_set1_epi32(hi));
    _mm_mask_storeu_epi8(p, (__mmask16)((1u << lanes) - 1u), _mm512_cvtepi32_epi8(q));
}
/* 64 bytes: clamp(v0..v3 + zero, lo, hi), v0's lanes first. Literal zero and limits cost nothing where they change nothing. */
FW_INT8_INLINE __m512i fw_u8_pack4(fw_i32 v0, fw_i32 v1, fw_i32 v2, fw_i32 v3, int zero, int lo, int hi)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i low = _mm512_packs_epi32(v0, v1), high = _mm512_packs_epi32(v2, v3), q;
    if (!__builtin_constant_p(zero) || zero != 0) {
        const __m512i z = _mm512_set1_epi16((short)zero);
        low = _mm512_adds_epi16(low, z);
        high = _mm512_adds_epi16(high, z);
    }
    q = _mm512_packus_epi16(low, high);
    if (!__builtin_constant_p(lo) || !__builtin_constant_p(hi) || lo > 0 || hi < 255)
        q = _mm512_min_epu8(_mm512_max_epu8(q, _mm512_set1_epi8((char)lo)), _mm512_set1_epi8((char)hi));
    return _mm512_permutexvar_epi32(order, q);
}
FW_INT8_INLINE void fw_u8_store4(uint8_t *const *to, const int run, const fw_i32 *v, int zero, int lo, int hi)
{
    const __m512i q = fw_u8_pack4(v[0], v[1], v[2], v[3], zero, lo, hi);
    if (run == 4) {
        _mm512_storeu_si512(to[0], q);
    } else if (run == 2) {
        _mm256_storeu_si256((__m256i *)to[0], _mm512_castsi512_si256(q));
        _mm256_storeu_si256((__m256i *)to[2], _mm512_extracti64x4_epi64(q, 1));
    } else {
        _mm_storeu_si128((__m128i *)to[0], _mm512_castsi512_si128(q));
        _mm_storeu_si128((__m128i *)to[1], _mm512_extracti32x4_epi32(q, 1));
        _mm_storeu_si128((__m128i *)to[2], _mm512_extracti32x4_epi32(q, 2));
        _mm_storeu_si128((__m128i *)to[3], _mm512_extracti32x4_epi32(q, 3));
    }
}

#if defined(__AVX512VBMI__)
/* A table of 256 bytes in registers. */
typedef struct { __m512i part[4]; } fw_u8_lookup;
FW_INT8_INLINE fw_u8_lookup fw_u8_lookup_load(const uint8_t *table)
{
    fw_u8_lookup t;
    int i;
    for (i = 0; i < 4; ++i)
        t.part[i] = _mm512_loadu_si512(table + 64 * i);
    return t;
}
FW_INT8_INLINE __m512i fw_u8_lookup_of(const fw_u8_lookup *t, __m512i q)
{
    const __m512i low = _mm512_permutex2var_epi8(t->part[0], q, t->part[1]);
    const __m512i high = _mm512_permutex2var_epi8(t->part[2], q, t->part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(q), low, high);
}
#endif

#elif defined(FW_INT8_256)
typedef struct { __m256i a, b; } fw_i32;
typedef struct { __m256 a, b; } fw_f32;
typedef fw_i32 fw_x4;
typedef fw_i32 fw_w4;

#define FW_PAIR(T, A, B) T r; r.a = (A); r.b = (B); return r
FW_INT8_INLINE fw_i32 fw_i32_load(const int32_t *p)
{
    FW_PAIR(fw_i32, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
FW_INT8_INLINE fw_i32 fw_i32_set(int32_t v) { FW_PAIR(fw_i32, _mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
FW_INT8_INLINE fw_i32 fw_i32_add(fw_i32 x, fw_i32 y)
{
    FW_PAIR(fw_i32, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
FW_INT8_INLINE fw_i32 fw_i32_sub(fw_i32 x, fw_i32 y)
{
    FW_PAIR(fw_i32, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b));
}
FW_INT8_INLINE fw_i32 fw_i32_mul(fw_i32 x, fw_i32 y)
{
    FW_PAIR(fw_i32, _mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b));
}
FW_INT8_INLINE fw_i32 fw_i32_min(fw_i32 x, fw_i32 y)
{
    FW_PAIR(fw_i32, _mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b));
}
FW_INT8_INLINE fw_i32 fw_i32_max(fw_i32 x, fw_i32 y)
{
    FW_PAIR(fw_i32, _mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b));
}
FW_INT8_INLINE fw_i32 fw_i32_u8(const uint8_t *p)
{
    __m128i q = _mm_loadu_si128((const __m128i *)p);
    FW_PAIR(fw_i32, _mm256_cvtepu8_epi32(q), _mm256_cvtepu8_epi32(_mm_srli_si128(q, 8)));
}
FW_INT8_INLINE void fw_i32_store(int32_t *p, fw_i32 v)
{
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)p + 1, v.b);
}
FW_INT8_INLINE fw_f32 fw_f32_load(const float *p) { FW_PAIR(fw_f32, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
FW_INT8_INLINE void fw_f32_store(float *p, fw_f32 v, int lanes)
{
    float all[16];
    _mm256_storeu_ps(all, v.a);
    _mm256_storeu_ps(all + 8, v.b);
    memcpy(p, all, (size_t)lanes * sizeof(float));
}
FW_INT8_INLINE fw_f32 fw_f32_set(float v) { FW_PAIR(fw_f32, _mm256_set1_ps(v), _mm256_set1_ps(v)); }
FW_INT8_INLINE fw_f32 fw_f32_i32(fw_i32 v) { FW_PAIR(fw_f32, _mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)); }
FW_INT8_INLINE fw_f32 fw_f32_mul(fw_f32 x, fw_f32 y)
{
    fw_f32 t;
    t.a = _mm256_mul_ps(x.a, y.a);
    t.b = _mm256_mul_ps(x.b, y.b);
    __asm__("" : "+x"(t.a), "+x"(t.b));
    return t;
}
FW_INT8_INLINE fw_f32 fw_f32_add(fw_f32 x, fw_f32 y)
{
    FW_PAIR(fw_f32, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
FW_INT8_INLINE fw_f32 fw_f32_div(fw_f32 x, fw_f32 y)
{
    FW_PAIR(fw_f32, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b));
}
FW_INT8_INLINE fw_f32 fw_f32_clamp(fw_f32 v, float lo, float hi)
{
    const __m256 l = _mm256_set1_ps(lo), h = _mm256_set1_ps(hi);
    FW_PAIR(fw_f32, _mm256_min_ps(_mm256_max_ps(v.a, l), h), _mm256_min_ps(_mm256_max_ps(v.b, l), h));
}
FW_INT8_INLINE fw_i32 fw_i32_rint(fw_f32 v)
{
    const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    FW_PAIR(fw_i32, _mm256_cvttps_epi32(_mm256_round_ps(v.a, mode)), _mm256_cvttps_epi32(_mm256_round_ps(v.b, mode)));
}
FW_INT8_INLINE fw_x4 fw_x4_set(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return fw_i32_set(four);
}
FW_INT8_INLINE fw_x4 fw_x4_load(const uint8_t *p) { return fw_i32_load((const int32_t *)(const void *)p); }
FW_INT8_INLINE fw_w4 fw_w4_load(const int8_t *p) { return fw_i32_load((const int32_t *)(const void *)p); }
FW_INT8_INLINE __m256i fw_dp8(__m256i acc, __m256i x, __m256i w)
{
#if defined(__AVXVNNI__)
    __asm__("{vex} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "xm"(w));
    return acc;
#else
    const __m256i low = _mm256_set1_epi16(255);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
FW_INT8_INLINE fw_i32 fw_dp(fw_i32 acc, fw_x4 x, fw_w4 w) { FW_PAIR(fw_i32, fw_dp8(acc.a, x.a, w.a), fw_dp8(acc.b, x.b, w.b)); }
FW_INT8_INLINE void fw_u8_store(uint8_t *p, fw_i32 v, int zero, int lo, int hi, int lanes)
{
    uint8_t part[16];
    __m256i q = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
    q = _mm256_adds_epi16(q, _mm256_set1_epi16((short)zero));
    __m128i u = _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    u = _mm_min_epu8(_mm_max_epu8(u, _mm_set1_epi8((char)lo)), _mm_set1_epi8((char)hi));
    if (lanes == 16) {
        _mm_storeu_si128((__m128i *)p, u);
    } else {
        _mm_storeu_si128((__m128i *)part, u);
        memcpy(p, part, (size_t)lanes);
    }
}

#elif !defined(FW_INT8_128)
typedef struct { int32_t v[16]; } fw_i32;
typedef struct { float v[16]; } fw_f32;
typedef struct { uint8_t v[64]; } fw_x4;
typedef struct { int8_t v[64]; } fw_w4;

#define FW_LANES(T, EXPR) T r; int i; for (i = 0; i < 16; ++i) r.v[i] = (EXPR); return r
FW_INT8_INLINE fw_i32 fw_i32_load(const int32_t *p) { FW_LANES(fw_i32, p[i]); }
FW_INT8_INLINE fw_i32 fw_i32_set(int32_t v) { FW_LANES(fw_i32, v); }
FW_INT8_INLINE fw_i32 fw_i32_add(fw_i32 a, fw_i32 b) { FW_LANES(fw_i32, a.v[i] + b.v[i]); }
FW_INT8_INLINE fw_i32 fw_i32_sub(fw_i32 a, fw_i32 b) { FW_LANES(fw_i32, a.v[i] - b.v[i]); }
FW_INT8_INLINE fw_i32 fw_i32_mul(fw_i32 a, fw_i32 b) { FW_LANES(fw_i32, a.v[i] * b.v[i]); }
FW_INT8_INLINE fw_i32 fw_i32_min(fw_i32 a, fw_i32 b) { FW_LANES(fw_i32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
FW_INT8_INLINE fw_i32 fw_i32_max(fw_i32 a, fw_i32 b) { FW_LANES(fw_i32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FW_INT8_INLINE fw_i32 fw_i32_u8(const uint8_t *p) { FW_LANES(fw_i32, p[i]); }
FW_INT8_INLINE void fw_i32_store(int32_t *p, fw_i32 v) { memcpy(p, v.v, sizeof v.v); }
FW_INT8_INLINE fw_f32 fw_f32_load(const float *p) { FW_LANES(fw_f32, p[i]); }
FW_INT8_INLINE void fw_f32_store(float *p, fw_f32 v, int lanes) { memcpy(p, v.v, (size_t)lanes * sizeof(float)); }
FW_INT8_INLINE fw_f32 fw_f32_set(float v) { FW_LANES(fw_f32, v); }
FW_INT8_INLINE fw_f32 fw_f32_i32(fw_i32 v) { FW_LANES(fw_f32, (float)v.v[i]); }
FW_INT8_INLINE fw_f32 fw_f32_mul(fw_f32 a, fw_f32 b)
{
    fw_f32 t;
    int i;
    for (i = 0; i < 16; ++i)
        t.v[i] = a.v[i] * b.v[i];
#if defined(__GNUC__) && !defined(__STRICT_ANSI__)
    __asm__("" : "+m"(t)); /* GCC and Clang fuse multiply and add unless the product passes through memory */
#endif
    return t;
}
FW_INT8_INLINE fw_f32 fw_f32_add(fw_f32 a, fw_f32 b) { FW_LANES(fw_f32, a.v[i] + b.v[i]); }
FW_INT8_INLINE fw_f32 fw_f32_div(fw_f32 a, fw_f32 b) { FW_LANES(fw_f32, a.v[i] / b.v[i]); }
FW_INT8_INLINE fw_f32 fw_f32_clamp(fw_f32 v, float lo, float hi)
{
    FW_LANES(fw_f32, !(v.v[i] > lo) ? lo : v.v[i] > hi ? hi : v.v[i]); /* NaN becomes lo, as on x86 */
}
/* Adding 1.5 * 2^23 leaves the nearest even integer in the low bits; larger values are clamped, as only their
 * saturation matters. */
FW_INT8_INLINE fw_i32 fw_i32_rint(fw_f32 f)
{
    const fw_f32 v = fw_f32_clamp(f, -4194303.0f, 4194303.0f);
    FW_LANES(fw_i32, (int32_t)((v.v[i] + 12582912.0f) - 12582912.0f));
}
FW_INT8_INLINE fw_x4 fw_x4_set(const uint8_t *p)
{
    fw_x4 r;
    int i;
    for (i = 0; i < 64; ++i)
        r.v[i] = p[i & 3];
    return r;
}
FW_INT8_INLINE fw_x4 fw_x4_load(const uint8_t *p)
{
    fw_x4 r;
    memcpy(r.v, p, 64);
    return r;
}
FW_INT8_INLINE fw_w4 fw_w4_load(const int8_t *p)
{
    fw_w4 r;
    memcpy(r.v, p, 64);
    return r;
}
FW_INT8_INLINE fw_i32 fw_dp(fw_i32 acc, fw_x4 x, fw_w4 w)
{
    FW_LANES(fw_i32, acc.v[i] + x.v[4 * i] * w.v[4 * i] + x.v[4 * i + 1] * w.v[4 * i + 1] +
                         x.v[4 * i + 2] * w.v[4 * i + 2] + x.v[4 * i + 3] * w.v[4 * i + 3]);
}
FW_INT8_INLINE void fw_u8_store(uint8_t *p, fw_i32 v, int zero, int lo, int hi, int lanes)
{
    int i;
    for (i = 0; i < lanes; ++i)
        p[i] = (uint8_t)fw_int8_clamp(v.v[i] + zero, lo, hi);
}
#endif

#if !defined(FW_INT8_512)
FW_INT8_INLINE void fw_u8_store4(uint8_t *const *to, const int run, const fw_i32 *v, int zero, int lo, int hi)
{
    int i;
    (void)run;
    FW_INT8_UNROLL
    for (i = 0; i < 4; ++i)
        fw_u8_store(to[i], v[i], zero, lo, hi, 16);
}
#endif

#endif
