/* Fused passes over rows of channels, for networks whose layers are too small for PyTorch's loops.
 * x is (n, t, c): n samples, t pixels, c channels.
 */

#include "rows.h"

/* adaLN: y = u (1 + scale) + shift with u = (x - mean) rstd; shift and scale have a row stride. */

void adaln_forward(const float *x, const float *shift, const float *scale, float *y, float *mean,
                   float *rstd, long n, long t, long c, long stride, float eps) {
    for (long i = 0; i < n; i++) {
        const float *a = scale + i * stride, *b = shift + i * stride;
        for (long j = 0; j < t; j++, x += c, y += c) {
            vec sum = {0}, squares = {0};
            EACH(k, c) sum += LOAD(x + k);
            float m = add_lanes(sum) / c;
            EACH(k, c) {
                vec d = KEEP(LOAD(x + k) - m);
                squares += d * d;
            }
            float r = 1 / __builtin_sqrtf(add_lanes(squares) / c + eps);
            EACH(k, c) STORE(y + k, (LOAD(x + k) - m) * r * (1 + LOAD(a + k)) + LOAD(b + k));
            *mean++ = m;
            *rstd++ = r;
        }
    }
}

void adaln_backward(const float *x, const float *scale, const float *grad, const float *mean,
                    const float *rstd, float *grad_x, float *grad_shift, float *grad_scale, long n,
                    long t, long c, long stride) {
    memset(grad_shift, 0, n * c * sizeof(float));
    memset(grad_scale, 0, n * c * sizeof(float));
    for (long i = 0; i < n; i++, grad_shift += c, grad_scale += c) {
        const float *a = scale + i * stride;
        for (long j = 0; j < t; j++, x += c, grad += c, grad_x += c) {
            float m = *mean++, r = *rstd++;
            vec sum = {0}, along = {0};
            EACH(k, c) {
                vec u = (LOAD(x + k) - m) * r, g = LOAD(grad + k), gu = g * (1 + LOAD(a + k));
                STORE(grad_shift + k, LOAD(grad_shift + k) + g);
                STORE(grad_scale + k, LOAD(grad_scale + k) + g * u);
                sum += gu;
                along += gu * u;
            }
            float s = add_lanes(sum) / c, l = add_lanes(along) / c;
            EACH(k, c) {
                vec u = (LOAD(x + k) - m) * r, gu = LOAD(grad + k) * (1 + LOAD(a + k));
                STORE(grad_x + k, (gu - s - u * l) * r);
            }
        }
    }
}

/* Gates: y = x + gate b, or gate b where x is NULL. */

void gate_forward(const float *x, const float *gate, const float *b, float *y, long n, long t,
                  long c, long stride) {
    for (long i = 0; i < n; i++, gate += stride)
        for (long j = 0; j < t; j++, b += c, y += c) {
            if (x) {
                EACH(k, c) STORE(y + k, LOAD(x + k) + LOAD(gate + k) * LOAD(b + k));
                x += c;
            } else
                EACH(k, c) STORE(y + k, LOAD(gate + k) * LOAD(b + k));
        }
}

void gate_backward(const float *gate, const float *b, const float *grad, float *grad_gate,
                   float *grad_b, long n, long t, long c, long stride) {
    memset(grad_gate, 0, n * c * sizeof(float));
    for (long i = 0; i < n; i++, gate += stride, grad_gate += c)
        for (long j = 0; j < t; j++, b += c, grad += c, grad_b += c)
            EACH(k, c) {
                vec g = LOAD(grad + k);
                STORE(grad_gate + k, LOAD(grad_gate + k) + g * LOAD(b + k));
                STORE(grad_b + k, g * LOAD(gate + k));
            }
}

/* The mean over pixels, and its gradient. */

void mean_forward(const float *x, float *y, long n, long t, long c) {
    memset(y, 0, n * c * sizeof(float));
    for (long i = 0; i < n; i++, y += c) {
        for (long j = 0; j < t; j++, x += c) EACH(k, c) STORE(y + k, LOAD(y + k) + LOAD(x + k));
        EACH(k, c) STORE(y + k, LOAD(y + k) / (float)t);
    }
}

void mean_backward(const float *grad, float *grad_x, long n, long t, long c) {
    for (long i = 0; i < n; i++, grad += c)
        for (long j = 0; j < t; j++, grad_x += c)
            EACH(k, c) STORE(grad_x + k, LOAD(grad + k) / (float)t);
}

/* Squares of 2x2 pixels as channels, (n, 2h, 2w, c) -> (n, h, w, 4c), and back. The pixels of x begin
 * `apart` numbers after each other. */

void unshuffle(const float *restrict x, float *restrict y, long n, long h, long w, long c,
               long apart) {
    long line = 2 * w * apart;
    for (long i = 0; i < n * h; i++, x += 2 * line)
        for (long j = 0; j < w; j++, y += 4 * c) {
            const float *top = x + 2 * j * apart, *bottom = top + line;
            for (long k = 0; k < c; k++) {
                y[4 * k] = top[k];
                y[4 * k + 1] = top[apart + k];
                y[4 * k + 2] = bottom[k];
                y[4 * k + 3] = bottom[apart + k];
            }
        }
}

void shuffle(const float *restrict x, float *restrict y, long n, long h, long w, long c,
             long apart) {
    long line = 2 * w * c;
    for (long i = 0; i < n * h; i++, y += 2 * line)
        for (long j = 0; j < w; j++, x += apart) {
            float *top = y + 2 * j * c, *bottom = top + line;
            for (long k = 0; k < c; k++) {
                top[k] = x[4 * k];
                top[c + k] = x[4 * k + 1];
                bottom[k] = x[4 * k + 2];
                bottom[c + k] = x[4 * k + 3];
            }
        }
}

/* Exact GELU. */

void gelu_forward(const float *x, float *y, float *slope, long size) {
    EACH(k, size) {
        vec d;
        STORE(y + k, gelu(LOAD(x + k), &d));
        STORE(slope + k, d);
    }
}

/* Depthwise k x k convolutions of (n, h, w, c), stride 1, that keep the size. Weights are
 * (k k, c). */

/* Convolve `count` neighbouring pixels, whose sums are independent and so overlap. */
INLINE void convolve_pixels(const float *corner, const float *weight, const float *bias, float *y,
                            float *slope, long line, long c, const long side, const long count) {
    EACH(k, c) {
        vec sums[4];
        UNROLL
        for (long r = 0; r < count; r++) sums[r] = bias ? LOAD(bias + k) : (vec){0};
        UNROLL
        for (long p = 0; p < side; p++)
            UNROLL
            for (long q = 0; q < side; q++) {
                vec tap = LOAD(weight + (p * side + q) * c + k);
                UNROLL
                for (long r = 0; r < count; r++)
                    sums[r] += tap * LOAD(corner + p * line + (q + r) * c + k);
            }
        UNROLL
        for (long r = 0; r < count; r++) {
            if (slope) {
                vec d;
                sums[r] = gelu(sums[r], &d);
                STORE(slope + r * c + k, d);
            }
            STORE(y + r * c + k, sums[r]);
        }
    }
}

INLINE void convolve(const float *frame, const float *weight, const float *bias, float *y,
                     float *slope, long h, long w, long c, const long side) {
    long line = (w + side - 1) * c;
    for (long i = 0; i < h; i++) {
        long j = 0;
#define PIXELS(count)                                                                              \
    for (; j + count <= w; j += count) {                                                           \
        long at = (i * w + j) * c;                                                                 \
        convolve_pixels(frame + i * line + j * c, weight, bias, y + at, slope ? slope + at : NULL, \
                        line, c, side, count);                                                     \
    }
        PIXELS(4)
        PIXELS(1)
#undef PIXELS
    }
}

INLINE void correlate(const float *frame, const float *grad, float *grad_weight, long h, long w,
                      long c, const long side) {
    long line = (w + side - 1) * c;
    EACH(k, c)
    for (long p = 0; p < side; p++) {
        vec sums[7];
        UNROLL
        for (long q = 0; q < side; q++) sums[q] = LOAD(grad_weight + (p * side + q) * c + k);
        for (long i = 0; i < h; i++)
            for (long j = 0; j < w; j++) {
                vec g = LOAD(grad + (i * w + j) * c + k);
                const float *row = frame + (i + p) * line + j * c + k;
                UNROLL
                for (long q = 0; q < side; q++) sums[q] += g * LOAD(row + q * c);
            }
        UNROLL
        for (long q = 0; q < side; q++) STORE(grad_weight + (p * side + q) * c + k, sums[q]);
    }
}

#define BY_SIDE(call)             \
    switch (side) {               \
        case 3: call(3); break;   \
        case 5: call(5); break;   \
        case 7: call(7); break;   \
    }

/* With `slope`, y is GELU's output and `slope` its derivative. `frame` holds one framed image of
 * zeros. */
void depthwise_forward(const float *x, const float *weight, const float *bias, float *y,
                       float *slope, float *frame, long n, long h, long w, long c, long side) {
    long pad = side / 2, size = h * w * c;
    for (long i = 0; i < n; i++) {
        put_into_frame(x + i * size, frame, h, w, c, pad, (w + 2 * pad) * c);
#define CALL(s) \
    convolve(frame, weight, bias, y + i * size, slope ? slope + i * size : NULL, h, w, c, s)
        BY_SIDE(CALL)
#undef CALL
    }
}

/* `flipped` is the weight turned by 180 degrees. `slope` may be NULL. `frame` holds two framed images
 * of zeros and an image. */
void depthwise_backward(const float *x, const float *flipped, const float *slope, const float *grad,
                        float *grad_x, float *grad_weight, float *grad_bias, float *frame, long n,
                        long h, long w, long c, long side) {
    long pad = side / 2, size = h * w * c, line = (w + 2 * pad) * c, framed = (h + 2 * pad) * line;
    float *grad_frame = frame + framed, *scaled = grad_frame + framed;
    memset(grad_weight, 0, side * side * c * sizeof(float));
    memset(grad_bias, 0, c * sizeof(float));
    for (long i = 0; i < n; i++) {
        const float *g = grad + i * size;
        if (slope) {
            EACH(k, size) STORE(scaled + k, LOAD(g + k) * LOAD(slope + i * size + k));
            g = scaled;
        }
        for (long j = 0; j < h * w; j++)
            EACH(k, c) STORE(grad_bias + k, LOAD(grad_bias + k) + LOAD(g + j * c + k));
        put_into_frame(x + i * size, frame, h, w, c, pad, line);
        put_into_frame(g, grad_frame, h, w, c, pad, line);
#define CALL(s)                                                                     \
    correlate(frame, g, grad_weight, h, w, c, s);                                   \
    convolve(grad_frame, flipped, NULL, grad_x + i * size, NULL, h, w, c, s)
        BY_SIDE(CALL)
#undef CALL
    }
}

/* Samples of a tile, whose rows stay in the cache from one pass to the next. */
#define TILE 96

static long samples_of_tile(long t) { return t < TILE ? TILE / t : 1; }

/* Transpose a matrix: (m, n) -> (n, m). */
void transpose_matrix(const float *x, float *y, long m, long n) { transpose(x, y, m, n); }

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
        adaln_forward(x + from * c, shift + i * stride, scale + i * stride, scratch, mean + from,
                      rstd + from, samples, t, c, stride, eps);
        multiply(scratch, c, 1, turned, y + from * o, bias, rows, o, c, 0);
        if (slope) gelu_forward(y + from * o, y + from * o, slope + from * o, rows * o);
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
        adaln_backward(x + from * c, scale + i * stride, grad_normal, mean + from, rstd + from,
                       grad_x + from * c, grad_shift + i * c, grad_scale + i * c, samples, t, c,
                       stride);
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
            gate_forward(NULL, factor + i * k, in, scratch, samples, t, k, k);
            in = scratch;
        }
        multiply(in, k, 1, turned, branch + from * c, bias, rows, c, k, 0);
        gate_forward(x + from * c, gate + i * stride, branch + from * c, y + from * c, samples, t,
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
        gate_backward(gate + i * stride, branch + from * c, grad + from * c, grad_gate + i * c,
                      grad_branch, samples, t, c, stride);
        if (factor) {
            gate_forward(NULL, factor + i * k, in, scaled, samples, t, k, k);
            in = scaled;
        }
        multiply(grad_branch, 1, c, in, grad_weight, NULL, c, k, rows, 1);
        add_rows(grad_branch, grad_bias, rows, c);
        if (!factor) {
            multiply(grad_branch, c, 1, weight, grad_h + from * k, NULL, rows, k, c, 0);
            continue;
        }
        multiply(grad_branch, c, 1, weight, scaled, NULL, rows, k, c, 0);
        gate_backward(factor + i * k, h + from * k, scaled, grad_factor + i * k, grad_h + from * k,
                      samples, t, k, k);
    }
}
