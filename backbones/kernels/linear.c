/* Linear layers, alone and together with what stands before and after them, in a single thread.
 * x is (n, t, c): n samples, t pixels, c channels.
 */

#include "rows.h"

/* Samples of a tile, whose rows stay in the cache from one pass to the next. */
#define TILE 96

static long samples_of_tile(long t) { return t < TILE ? TILE / t : 1; }

/* A linear layer of (m, k) rows: the weight is (n, k), and `turned` holds it transposed. */

void linear_forward(const float *x, const float *weight, float *turned, const float *bias, float *y,
                    long m, long k, long n) {
    transpose(weight, turned, n, k);
    multiply(x, k, 1, turned, y, bias, m, n, k, 0);
}

/* grad_x may be NULL. */
void linear_backward(const float *x, const float *weight, const float *grad, float *grad_x,
                     float *grad_weight, float *grad_bias, long m, long k, long n) {
    memset(grad_weight, 0, n * k * sizeof(float));
    memset(grad_bias, 0, n * sizeof(float));
    for (long i = 0; i < m; i += TILE) {
        long rows = m - i < TILE ? m - i : TILE;
        multiply(grad + i * n, 1, n, x + i * k, grad_weight, NULL, n, k, rows, 1);
        if (grad_x) multiply(grad + i * n, n, 1, weight, grad_x + i * k, NULL, rows, k, n, 0);
        add_rows(grad + i * n, grad_bias, rows, n);
    }
}

/* A linear layer of adaLN's output, with GELU if `slope` is given: (n, t, c) -> (n, t, o). `scratch`
 * holds a tile and the transposed weight. */

void enter_forward(const float *x, const float *shift, const float *scale, const float *weight,
                   const float *bias, float *y, float *slope, float *mean, float *rstd,
                   float *scratch, long n, long t, long c, long o, long stride, float eps) {
    long most = samples_of_tile(t);
    float *turned = scratch + most * t * c;
    transpose(weight, turned, o, c);
    for (long i = 0; i < n; i += most) {
        long samples = n - i < most ? n - i : most, from = i * t, rows = samples * t;
        for (long j = 0; j < samples; j++) {
            long at = from + j * t, apart = (i + j) * stride;
            normalise(x + at * c, shift + apart, scale + apart, scratch + j * t * c, mean + at,
                      rstd + at, t, c, eps);
        }
        multiply(scratch, c, 1, turned, y + from * o, bias, rows, o, c, 0);
        if (slope) apply_gelu(y + from * o, y + from * o, slope + from * o, rows * o);
    }
}

void enter_backward(const float *x, const float *shift, const float *scale, const float *weight,
                    const float *slope, const float *mean, const float *rstd, const float *grad,
                    float *grad_x, float *grad_shift, float *grad_scale, float *grad_weight,
                    float *grad_bias, float *scratch, long n, long t, long c, long o, long stride) {
    long most = samples_of_tile(t);
    float *normal = scratch, *grad_normal = scratch + most * t * c;
    float *grad_linear = grad_normal + most * t * c;
    memset(grad_weight, 0, o * c * sizeof(float));
    memset(grad_bias, 0, o * sizeof(float));
    for (long i = 0; i < n; i += most) {
        long samples = n - i < most ? n - i : most, from = i * t, rows = samples * t;
        const float *g = grad + from * o;
        if (slope) {
            EACH(k, rows * o) STORE(grad_linear + k, LOAD(g + k) * LOAD(slope + from * o + k));
            g = grad_linear;
        }
        for (long j = 0; j < rows; j++) {
            const float *a = scale + (i + j / t) * stride, *b = shift + (i + j / t) * stride;
            float m = mean[from + j], r = rstd[from + j];
            EACH(k, c)
            STORE(normal + j * c + k,
                  (LOAD(x + (from + j) * c + k) - m) * r * (1 + LOAD(a + k)) + LOAD(b + k));
        }
        multiply(g, 1, o, normal, grad_weight, NULL, o, c, rows, 1);
        add_rows(g, grad_bias, rows, o);
        multiply(g, o, 1, weight, grad_normal, NULL, rows, c, o, 0);
        for (long j = 0; j < samples; j++) {
            long at = from + j * t, sample = i + j;
            normalise_backward(x + at * c, scale + sample * stride, grad_normal + j * t * c,
                               mean + at, rstd + at, grad_x + at * c, grad_shift + sample * c,
                               grad_scale + sample * c, t, c);
        }
    }
}

static void apply_gates(const float *x, const float *gate, const float *b, float *y, long n, long t,
                        long c, long stride) {
    for (long i = 0; i < n; i++) {
        long at = i * t * c;
        apply_gate(x ? x + at : NULL, gate + i * stride, b + at, y + at, t, c);
    }
}

static void apply_gates_backward(const float *gate, const float *b, const float *grad,
                                 float *grad_gate, float *grad_b, long n, long t, long c,
                                 long stride) {
    for (long i = 0; i < n; i++) {
        long at = i * t * c;
        apply_gate_backward(gate + i * stride, b + at, grad + at, grad_gate + i * c, grad_b + at, t,
                            c);
    }
}

/* A gated residual branch that ends in a linear layer: x + gate (W (factor h) + bias), with h
 * (n, t, k) and x (n, t, c). `factor` (n, k) may be NULL. `branch` keeps what the gate scales. */

void leave_forward(const float *x, const float *gate, const float *h, const float *factor,
                   const float *weight, const float *bias, float *y, float *branch, float *scratch,
                   long n, long t, long c, long k, long stride) {
    long most = samples_of_tile(t);
    float *turned = scratch + most * t * k;
    transpose(weight, turned, c, k);
    for (long i = 0; i < n; i += most) {
        long samples = n - i < most ? n - i : most, from = i * t, rows = samples * t;
        const float *in = h + from * k;
        if (factor) {
            apply_gates(NULL, factor + i * k, in, scratch, samples, t, k, k);
            in = scratch;
        }
        multiply(in, k, 1, turned, branch + from * c, bias, rows, c, k, 0);
        apply_gates(x + from * c, gate + i * stride, branch + from * c, y + from * c, samples, t,
                     c, stride);
    }
}

void leave_backward(const float *gate, const float *h, const float *factor, const float *weight,
                    const float *branch, const float *grad, float *grad_gate, float *grad_h,
                    float *grad_factor, float *grad_weight, float *grad_bias, float *scratch,
                    long n, long t, long c, long k, long stride) {
    long most = samples_of_tile(t);
    float *grad_branch = scratch, *scaled = scratch + most * t * c;
    memset(grad_weight, 0, c * k * sizeof(float));
    memset(grad_bias, 0, c * sizeof(float));
    for (long i = 0; i < n; i += most) {
        long samples = n - i < most ? n - i : most, from = i * t, rows = samples * t;
        const float *in = h + from * k;
        apply_gates_backward(gate + i * stride, branch + from * c, grad + from * c, grad_gate + i * c,
                      grad_branch, samples, t, c, stride);
        if (factor) {
            apply_gates(NULL, factor + i * k, in, scaled, samples, t, k, k);
            in = scaled;
        }
        multiply(grad_branch, 1, c, in, grad_weight, NULL, c, k, rows, 1);
        add_rows(grad_branch, grad_bias, rows, c);
        if (!factor) {
            multiply(grad_branch, c, 1, weight, grad_h + from * k, NULL, rows, k, c, 0);
            continue;
        }
        multiply(grad_branch, c, 1, weight, scaled, NULL, rows, k, c, 0);
        apply_gates_backward(factor + i * k, h + from * k, scaled, grad_factor + i * k, grad_h + from * k,
                      samples, t, k, k);
    }
}
