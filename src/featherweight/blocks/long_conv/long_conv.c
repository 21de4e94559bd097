/* Long convolutions of real sequences, one row (sample, channel) at a time, in cache-sized blocks.

   Row v of length L and taps k of length K live modulo X^M = i with 2M >= L + K - 1: the first M results are
   the real part, the next M the imaginary part, so a linear convolution of real numbers costs one complex
   transform of half its padded length each way and the zeros of the padding are never stored. Taps at
   negative lags -d take the place 2M - d with the opposite sign, as X^2M = -1.

   Spectra are stored as blocks in the order of the transform: for each leaf, LEAF real parts, LEAF imaginary
   ones. The factor 1/M is part of the spectrum of the taps. */

#include "transform.h"

typedef struct {
    const plan_t *plan;
    const float *taps; /* spectrum of the channel's taps */
    float *sum;        /* spectrum of the gradient of the taps, or NULL */
    float *kept;       /* where `spectrum` writes */
} job_t;

/* Load n real numbers, times a gate where there is one, twisted and padded with zeros, folded modulo X^M = i.
   */
static void read_row(const plan_t *plan, const float *x, const float *gate, long n, float *re, float *im) {
    long m = plan->size, j = 0;
    const float *c = plan->twist, *s = plan->twist + m;
    long low = n < m ? n : m, high = n - low;
    for (; j + VL <= high; j += VL) {
        vf a = load(x + j), b = load(x + m + j);
        if (gate) a *= load(gate + j), b *= load(gate + m + j);
        turn(&a, &b, load(c + j), load(s + j));
        store(re + j, a);
        store(im + j, b);
    }
    for (; high == 0 && j + VL <= low; j += VL) {
        vf a = load(x + j);
        if (gate) a *= load(gate + j);
        store(re + j, a * load(c + j));
        store(im + j, a * load(s + j));
    }
    for (; j < low; j++) {
        float a = x[j] * (gate ? gate[j] : 1.0f);
        float b = j < high ? x[m + j] * (gate ? gate[m + j] : 1.0f) : 0.0f;
        re[j] = a * c[j] - b * s[j];
        im[j] = a * s[j] + b * c[j];
    }
    memset(re + low, 0, (m - low) * sizeof(float));
    memset(im + low, 0, (m - low) * sizeof(float));
}

/* Write n real results, untwisted, times `factor` where there is one. */
static void write_row(const plan_t *plan, const float *re, const float *im, long n, const float *factor,
                      float *y) {
    long m = plan->size, j = 0;
    const float *c = plan->twist, *s = plan->twist + m;
    long low = n < m ? n : m;
    for (; j + VL <= low; j += VL) {
        vf a = load(re + j) * load(c + j) + load(im + j) * load(s + j);
        store(y + j, factor ? a * load(factor + j) : a);
    }
    for (; j < low; j++) y[j] = (re[j] * c[j] + im[j] * s[j]) * (factor ? factor[j] : 1.0f);
    for (j = 0; j < n - m; j++) y[m + j] = (im[j] * c[j] - re[j] * s[j]) * (factor ? factor[m + j] : 1.0f);
}

static void product_leaf(const job_t *job, long at, float *re, float *im) {
    vf r[VL], i[VL];
    const float *k = job->taps + 2 * at;
    leaf_forward(r, i, re, im, job->plan->leaf);
    for (int n = 0; n < VL; n++) turn(&r[n], &i[n], load(k + n * VL), load(k + LEAF + n * VL));
    leaf_inverse(r, i, re, im, job->plan->leaf);
}

static void product(const job_t *job, long level, long size, long at, float *re, float *im) {
    if (level == job->plan->levels) {
        product_leaf(job, at, re, im);
        return;
    }
    long radix = job->plan->radix[level], n = size / radix;
    forward_pass(job->plan, level, size, re, im);
    for (long p = 0; p < radix; p++) product(job, level + 1, n, at + p * n, re + p * n, im + p * n);
    inverse_pass(job->plan, level, size, re, im);
}

static void spectrum(const job_t *job, long level, long size, long at, float *re, float *im) {
    if (level == job->plan->levels) {
        vf r[VL], i[VL];
        leaf_forward(r, i, re, im, job->plan->leaf);
        memcpy(job->kept + 2 * at, r, sizeof r);
        memcpy(job->kept + 2 * at + LEAF, i, sizeof i);
        return;
    }
    long radix = job->plan->radix[level], n = size / radix;
    forward_pass(job->plan, level, size, re, im);
    for (long p = 0; p < radix; p++) spectrum(job, level + 1, n, at + p * n, re + p * n, im + p * n);
}

static void from_spectrum(const job_t *job, long level, long size, long at, float *re, float *im) {
    if (level == job->plan->levels) {
        vf r[VL], i[VL];
        memcpy(r, job->kept + 2 * at, sizeof r);
        memcpy(i, job->kept + 2 * at + LEAF, sizeof i);
        leaf_inverse(r, i, re, im, job->plan->leaf);
        return;
    }
    long radix = job->plan->radix[level], n = size / radix;
    for (long p = 0; p < radix; p++) from_spectrum(job, level + 1, n, at + p * n, re + p * n, im + p * n);
    inverse_pass(job->plan, level, size, re, im);
}

/* Leaf of the backward pass. g: gradient of the convolution's result, becomes that of its input (correlation
   with the taps); v: the input, becomes the convolution's result where `again` asks for it; job->sum gathers
   g conj(v). */
static void backward_leaf(const job_t *job, long at, float *gr, float *gi, float *vr, float *vi, int again) {
    vf r[VL], i[VL], a[VL], b[VL];
    const float *k = job->taps + 2 * at;
    float *sum = job->sum + 2 * at;
    leaf_forward(a, b, vr, vi, job->plan->leaf);
    leaf_forward(r, i, gr, gi, job->plan->leaf);
    for (int n = 0; n < VL; n++) {
        vf c = load(k + n * VL), s = load(k + LEAF + n * VL);
        store(sum + n * VL, load(sum + n * VL) + r[n] * a[n] + i[n] * b[n]);
        store(sum + LEAF + n * VL, load(sum + LEAF + n * VL) + i[n] * a[n] - r[n] * b[n]);
        turn(&r[n], &i[n], c, -s);
        turn(&a[n], &b[n], c, s);
    }
    leaf_inverse(r, i, gr, gi, job->plan->leaf);
    if (again) leaf_inverse(a, b, vr, vi, job->plan->leaf);
}

static void backward(const job_t *job, long level, long size, long at, float *gr, float *gi, float *vr,
                     float *vi, int again) {
    if (level == job->plan->levels) {
        backward_leaf(job, at, gr, gi, vr, vi, again);
        return;
    }
    long radix = job->plan->radix[level], n = size / radix;
    forward_pass(job->plan, level, size, gr, gi);
    forward_pass(job->plan, level, size, vr, vi);
    for (long p = 0; p < radix; p++) {
        long q = p * n;
        backward(job, level + 1, n, at + q, gr + q, gi + q, vr + q, vi + q, again);
    }
    inverse_pass(job->plan, level, size, gr, gi);
    if (again) inverse_pass(job->plan, level, size, vr, vi);
}

/* Taps of all channels: `length` at lags 0, 1, ... and `length_before` at lags -1, -2, ...; `spectra`
   (channels, 2M) where they are known already, else NULL. */
typedef struct {
    const float *after, *before;
    long length, length_before;
    const float *spectra;
} taps_t;

/* Spectrum of a channel's taps: the stored one, or made in `out` with the help of line (2M) and scratch (2M).
   */
static const float *spectrum_of(const plan_t *plan, const taps_t *taps, long channel, float *out, float *line,
                                float *scratch) {
    long m = plan->size;
    const float *after = taps->after + channel * taps->length, scale = 1.0f / m;
    const float *before = taps->before + channel * taps->length_before;
    if (taps->spectra) return taps->spectra + channel * 2 * m;
    for (long d = 0; d < taps->length; d++) line[d] = after[d] * scale;
    memset(line + taps->length, 0, (2 * m - taps->length) * sizeof(float));
    for (long d = 0; d < taps->length_before; d++) line[2 * m - 1 - d] -= before[d] * scale;
    job_t job = {plan, NULL, NULL, out};
    long n = taps->length_before || taps->length > m ? 2 * m : m;
    read_row(plan, line, NULL, n, scratch, scratch + m);
    spectrum(&job, 0, m, 0, scratch, scratch + m);
    return out;
}

/* Spectra of channels [from, to) into out (channels, 2M); scratch: 4M floats. */
void fw_spectra(const plan_t *plan, const taps_t *taps, long from, long to, float *out, float *scratch) {
    long m = plan->size;
    for (long h = from; h < to; h++) spectrum_of(plan, taps, h, out + h * 2 * m, scratch, scratch + 2 * m);
}

/* y = post * (taps (*) (pre * u)) for channels [from, to) of u (batch, channels, length); scratch: 6M floats.
   */
void fw_forward(const plan_t *plan, const float *u, const float *pre, const float *post, const taps_t *taps,
                float *y, long batch, long channels, long length, long from, long to, float *scratch) {
    long m = plan->size;
    float *re = scratch, *im = scratch + m, *line = scratch + 2 * m, *own = scratch + 4 * m;
    for (long h = from; h < to; h++) {
        job_t job = {plan, spectrum_of(plan, taps, h, own, line, re), NULL, NULL};
        for (long b = 0; b < batch; b++) {
            long row = (b * channels + h) * length;
            read_row(plan, u + row, pre ? pre + row : NULL, length, re, im);
            product(&job, 0, m, 0, re, im);
            write_row(plan, re, im, length, post ? post + row : NULL, y + row);
        }
    }
}

/* Gradients of a tap: `at` counts modulo 2M. */
INLINE float tap_of(const plan_t *plan, const float *re, const float *im, long at) {
    long m = plan->size, j = at < m ? at : at - m;
    float c = plan->twist[j], s = plan->twist[m + j];
    return (at < m ? re[j] * c + im[j] * s : im[j] * c - re[j] * s) / m;
}

/* Where fw_backward writes; a gate's gradient is NULL where there is no gate. */
typedef struct {
    float *u, *pre, *post, *after, *before;
} gradients_t;

/* Gradients of fw_forward for channels [from, to), given that of y; scratch: 8M floats. */
void fw_backward(const plan_t *plan, const float *grad, const float *u, const float *pre, const float *post,
                 const taps_t *taps, const gradients_t *to_write, long batch, long channels, long length,
                 long from, long to, float *scratch) {
    long m = plan->size;
    float *gr = scratch, *gi = gr + m, *vr = gi + m, *vi = vr + m, *sum = vi + m, *own = sum + 2 * m;
    for (long h = from; h < to; h++) {
        job_t job = {plan, spectrum_of(plan, taps, h, own, gr, vr), sum, sum};
        memset(sum, 0, 2 * m * sizeof(float));
        for (long b = 0; b < batch; b++) {
            long row = (b * channels + h) * length;
            read_row(plan, grad + row, post ? post + row : NULL, length, gr, gi);
            read_row(plan, u + row, pre ? pre + row : NULL, length, vr, vi);
            backward(&job, 0, m, 0, gr, gi, vr, vi, post != NULL);
            if (post) write_row(plan, vr, vi, length, grad + row, to_write->post + row);
            if (pre) write_row(plan, gr, gi, length, u + row, to_write->pre + row);
            write_row(plan, gr, gi, length, pre ? pre + row : NULL, to_write->u + row);
        }
        from_spectrum(&job, 0, m, 0, gr, gi);
        for (long d = 0; d < taps->length; d++)
            to_write->after[h * taps->length + d] = tap_of(plan, gr, gi, d);
        for (long d = 0; d < taps->length_before; d++)
            to_write->before[h * taps->length_before + d] = -tap_of(plan, gr, gi, 2 * m - 1 - d);
    }
}
