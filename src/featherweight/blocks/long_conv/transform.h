/* Complex transforms of length M over split planes, for convolutions of real sequences.

   A transform evaluates the polynomial z at the M roots of X^M = i: z is twisted by exp(i pi n / 2M) when it
   is loaded, then goes through a decimation-in-frequency transform whose output stays in the order in which
   it falls out. Products of spectra need no order, and the inverse undoes it, so nothing is ever permuted.

   Levels: radix 2, 3, 4, 5 or 8 passes over the whole block, each leaving independent sub-blocks, then leaves
   of VL * VL numbers: a VL-point transform across vectors, a transposition, and another one. Vectors always
   run over consecutive numbers, and a sub-block is finished, product and inverse included, while it is in
   cache. */

#include <stddef.h>
#include <string.h>

#ifndef VL
#error "VL, the floats of a vector, must be 4, 8 or 16"
#endif
#define LEAF (VL * VL)
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4)));
typedef int vi __attribute__((vector_size(4 * VL)));

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf v) { *(vf_any *)p = v; }

typedef struct {
    long size;              /* M */
    long levels;            /* passes before the leaves */
    const long *radix;      /* of each pass, outermost first */
    const float *const *tw; /* of each pass: w^j, (w^2j, ...) as planes of size / radix numbers, cos then sin */
    const float *leaf;      /* w_LEAF^(p b) for p = 1..VL-1: VL cosines, VL sines each */
    const float *twist;     /* exp(i pi n / 2M): M cosines, then M sines */
} plan_t;

INLINE void dft2(vf *r, vf *i) {
    vf a = r[0], b = i[0];
    r[0] = a + r[1];
    i[0] = b + i[1];
    r[1] = a - r[1];
    i[1] = b - i[1];
}

INLINE void dft3(vf *r, vf *i) {
    const float h = 0.866025403784438647f;
    vf sr = r[1] + r[2], si = i[1] + i[2], dr = (r[1] - r[2]) * h, di = (i[1] - i[2]) * h;
    vf mr = r[0] - 0.5f * sr, mi = i[0] - 0.5f * si;
    r[0] += sr;
    i[0] += si;
    r[1] = mr + di;
    i[1] = mi - dr;
    r[2] = mr - di;
    i[2] = mi + dr;
}

INLINE void dft4(vf *r, vf *i) {
    vf ar = r[0] + r[2], ai = i[0] + i[2], br = r[0] - r[2], bi = i[0] - i[2];
    vf cr = r[1] + r[3], ci = i[1] + i[3], dr = r[1] - r[3], di = i[1] - i[3];
    r[0] = ar + cr;
    i[0] = ai + ci;
    r[1] = br + di;
    i[1] = bi - dr;
    r[2] = ar - cr;
    i[2] = ai - ci;
    r[3] = br - di;
    i[3] = bi + dr;
}

INLINE void dft5(vf *r, vf *i) {
    const float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
    const float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
    vf ar = r[1] + r[4], ai = i[1] + i[4], br = r[2] + r[3], bi = i[2] + i[3];
    vf cr = r[1] - r[4], ci = i[1] - i[4], dr = r[2] - r[3], di = i[2] - i[3];
    vf pr = r[0] + c1 * ar + c2 * br, pi = i[0] + c1 * ai + c2 * bi;
    vf qr = r[0] + c2 * ar + c1 * br, qi = i[0] + c2 * ai + c1 * bi;
    vf ur = s1 * ci + s2 * di, ui = s1 * cr + s2 * dr;
    vf wr = s2 * ci - s1 * di, wi = s2 * cr - s1 * dr;
    r[0] += ar + br;
    i[0] += ai + bi;
    r[1] = pr + ur;
    i[1] = pi - ui;
    r[4] = pr - ur;
    i[4] = pi + ui;
    r[2] = qr + wr;
    i[2] = qi - wi;
    r[3] = qr - wr;
    i[3] = qi + wi;
}

INLINE void dft8(vf *r, vf *i) {
    const float h = 0.707106781186547524f;
    vf er[4] = {r[0], r[2], r[4], r[6]}, ei[4] = {i[0], i[2], i[4], i[6]};
    vf or[4] = {r[1], r[3], r[5], r[7]}, oi[4] = {i[1], i[3], i[5], i[7]};
    dft4(er, ei);
    dft4(or, oi);
    vf xr = (or[1] + oi[1]) * h, xi = (oi[1] - or[1]) * h;
    vf yr = oi[2], yi = -or[2];
    vf zr = (oi[3] - or[3]) * h, zi = (or[3] + oi[3]) * -h;
    r[0] = er[0] + or[0];
    i[0] = ei[0] + oi[0];
    r[4] = er[0] - or[0];
    i[4] = ei[0] - oi[0];
    r[1] = er[1] + xr;
    i[1] = ei[1] + xi;
    r[5] = er[1] - xr;
    i[5] = ei[1] - xi;
    r[2] = er[2] + yr;
    i[2] = ei[2] + yi;
    r[6] = er[2] - yr;
    i[6] = ei[2] - yi;
    r[3] = er[3] + zr;
    i[3] = ei[3] + zi;
    r[7] = er[3] - zr;
    i[7] = ei[3] - zi;
}

INLINE void turn(vf *r, vf *i, vf c, vf s) { /* multiply by c + i s */
    vf a = *r;
    *r = a * c - *i * s;
    *i = a * s + *i * c;
}

INLINE void dft16(vf *r, vf *i) {
    const float c[10] = {1, .923879532511286756f, .707106781186547524f, .382683432365089772f, 0,
                         -.382683432365089772f, -.707106781186547524f, -.923879532511286756f, -1,
                         -.923879532511286756f};
    const float s[10] = {0, -.382683432365089772f, -.707106781186547524f, -.923879532511286756f, -1,
                         -.923879532511286756f, -.707106781186547524f, -.382683432365089772f, 0,
                         .382683432365089772f};
    for (int b = 0; b < 4; b++) {
        vf cr[4] = {r[b], r[b + 4], r[b + 8], r[b + 12]}, ci[4] = {i[b], i[b + 4], i[b + 8], i[b + 12]};
        dft4(cr, ci);
        for (int p = 0; p < 4; p++) {
            if (b && p) turn(&cr[p], &ci[p], (vf){0} + c[b * p], (vf){0} + s[b * p]);
            r[b + 4 * p] = cr[p];
            i[b + 4 * p] = ci[p];
        }
    }
    vf xr[16], xi[16];
    for (int p = 0; p < 4; p++) {
        dft4(r + 4 * p, i + 4 * p);
        for (int q = 0; q < 4; q++) {
            xr[p + 4 * q] = r[4 * p + q];
            xi[p + 4 * q] = i[4 * p + q];
        }
    }
    memcpy(r, xr, sizeof xr);
    memcpy(i, xi, sizeof xi);
}

#if VL == 16
#define dft_lanes dft16
#elif VL == 8
#define dft_lanes dft8
#else
#define dft_lanes dft4
#endif

INLINE void transpose(vf *v) {
    for (int d = VL / 2; d; d /= 2) {
        vi low, high;
        for (int lane = 0; lane < VL; lane++) {
            low[lane] = lane & d ? VL + lane - d : lane;
            high[lane] = lane & d ? VL + lane : lane + d;
        }
        for (int n = 0; n < VL; n++)
            if (!(n & d)) {
                vf a = v[n], b = v[n + d];
                v[n] = __builtin_shuffle(a, b, low);
                v[n + d] = __builtin_shuffle(a, b, high);
            }
    }
}

/* The twiddles of column j: w^j from the table, and for radix 8 also w^2j and w^4j; the others are products.
   */
#define PASS(RADIX, FIRST)                                                                                  \
    static void forward##RADIX(float *re, float *im, long size, const float *tw) {                           \
        long n = size / RADIX;                                                                               \
        for (long j = 0; j < n; j += VL) {                                                                   \
            vf r[RADIX], i[RADIX], c[RADIX], s[RADIX];                                                       \
            for (int q = 0; q < RADIX; q++) r[q] = load(re + q * n + j), i[q] = load(im + q * n + j);        \
            dft##RADIX(r, i);                                                                                \
            FIRST                                                                                            \
            for (int p = 1; p < RADIX; p++) turn(&r[p], &i[p], c[p], s[p]);                                  \
            for (int q = 0; q < RADIX; q++) store(re + q * n + j, r[q]), store(im + q * n + j, i[q]);        \
        }                                                                                                    \
    }                                                                                                        \
    static void inverse##RADIX(float *re, float *im, long size, const float *tw) {                           \
        long n = size / RADIX;                                                                               \
        for (long j = 0; j < n; j += VL) {                                                                   \
            vf r[RADIX], i[RADIX], c[RADIX], s[RADIX];                                                       \
            for (int q = 0; q < RADIX; q++) r[q] = load(re + q * n + j), i[q] = load(im + q * n + j);        \
            FIRST                                                                                            \
            for (int p = 1; p < RADIX; p++) turn(&r[p], &i[p], c[p], -s[p]);                                 \
            dft##RADIX(i, r);                                                                                \
            for (int q = 0; q < RADIX; q++) store(re + q * n + j, r[q]), store(im + q * n + j, i[q]);        \
        }                                                                                                    \
    }
#define ALL_FROM_TABLE(RADIX)                                                                                \
    for (int p = 1; p < RADIX; p++)                                                                          \
        c[p] = load(tw + (2 * p - 2) * n + j), s[p] = load(tw + (2 * p - 1) * n + j);
#define POWER(P, A, B) c[P] = c[A], s[P] = s[A], turn(&c[P], &s[P], c[B], s[B]);
#define SOME_FROM_TABLE                                                                                      \
    c[1] = load(tw + j), s[1] = load(tw + n + j);                                                            \
    c[2] = load(tw + 2 * n + j), s[2] = load(tw + 3 * n + j);                                                \
    c[4] = load(tw + 4 * n + j), s[4] = load(tw + 5 * n + j);                                                \
    POWER(3, 1, 2) POWER(5, 1, 4) POWER(6, 2, 4) POWER(7, 3, 4)

PASS(2, ALL_FROM_TABLE(2))
PASS(3, ALL_FROM_TABLE(3))
PASS(4, ALL_FROM_TABLE(4))
PASS(5, ALL_FROM_TABLE(5))
PASS(8, SOME_FROM_TABLE)

static void forward_pass(const plan_t *plan, long level, long size, float *re, float *im) {
    const float *tw = plan->tw[level];
    switch (plan->radix[level]) {
        case 2: forward2(re, im, size, tw); break;
        case 3: forward3(re, im, size, tw); break;
        case 4: forward4(re, im, size, tw); break;
        case 5: forward5(re, im, size, tw); break;
        default: forward8(re, im, size, tw);
    }
}

static void inverse_pass(const plan_t *plan, long level, long size, float *re, float *im) {
    const float *tw = plan->tw[level];
    switch (plan->radix[level]) {
        case 2: inverse2(re, im, size, tw); break;
        case 3: inverse3(re, im, size, tw); break;
        case 4: inverse4(re, im, size, tw); break;
        case 5: inverse5(re, im, size, tw); break;
        default: inverse8(re, im, size, tw);
    }
}

INLINE void leaf_forward(vf *r, vf *i, const float *re, const float *im, const float *tw) {
    for (int n = 0; n < VL; n++) r[n] = load(re + n * VL), i[n] = load(im + n * VL);
    dft_lanes(r, i);
    for (int p = 1; p < VL; p++) turn(&r[p], &i[p], load(tw + 2 * p * VL), load(tw + (2 * p + 1) * VL));
    transpose(r);
    transpose(i);
    dft_lanes(r, i);
}

INLINE void leaf_inverse(vf *r, vf *i, float *re, float *im, const float *tw) {
    dft_lanes(i, r);
    transpose(r);
    transpose(i);
    for (int p = 1; p < VL; p++) turn(&r[p], &i[p], load(tw + 2 * p * VL), -load(tw + (2 * p + 1) * VL));
    dft_lanes(i, r);
    for (int n = 0; n < VL; n++) store(re + n * VL, r[n]), store(im + n * VL, i[n]);
}
