/* Fused passes over rows of channels, for networks whose layers are too small for PyTorch's loops.
 * x is (n, t, c): n samples, t pixels, c channels. Threads share the samples, or the channels where
 * sums go over samples, so results do not depend on the number of threads.
 */

#include "rows.h"
#include <omp.h>

#define FOR_SAMPLES _Pragma("omp parallel for") for (long i = 0; i < n; i++)

/* Threads that OpenMP uses. */
long threads(void) { return omp_get_max_threads(); }

/* Channels of each thread, which are whole vectors. */
static long channels_of_thread(long c) {
    long vectors = (c + LANES - 1) / LANES, count = threads();
    return (vectors + count - 1) / count * LANES;
}

/* adaLN: y = u (1 + scale) + shift with u = (x - mean) rstd; shift and scale have a row stride. */

void adaln_forward(const float *x, const float *shift, const float *scale, float *y, float *mean,
                   float *rstd, long n, long t, long c, long stride, float eps) {
    FOR_SAMPLES
    normalise(x + i * t * c, shift + i * stride, scale + i * stride, y + i * t * c, mean + i * t,
              rstd + i * t, t, c, eps);
}

void adaln_backward(const float *x, const float *scale, const float *grad, const float *mean,
                    const float *rstd, float *grad_x, float *grad_shift, float *grad_scale, long n,
                    long t, long c, long stride) {
    FOR_SAMPLES
    normalise_backward(x + i * t * c, scale + i * stride, grad + i * t * c, mean + i * t,
                       rstd + i * t, grad_x + i * t * c, grad_shift + i * c, grad_scale + i * c, t,
                       c);
}

/* Gates: y = x + gate b, or gate b where x is NULL. */

void gate_forward(const float *x, const float *gate, const float *b, float *y, long n, long t,
                  long c, long stride) {
    FOR_SAMPLES
    apply_gate(x ? x + i * t * c : NULL, gate + i * stride, b + i * t * c, y + i * t * c, t, c);
}

void gate_backward(const float *gate, const float *b, const float *grad, float *grad_gate,
                   float *grad_b, long n, long t, long c, long stride) {
    FOR_SAMPLES
    apply_gate_backward(gate + i * stride, b + i * t * c, grad + i * t * c, grad_gate + i * c,
                        grad_b + i * t * c, t, c);
}

/* The mean over pixels, and its gradient. */

void mean_forward(const float *x, float *y, long n, long t, long c) {
    FOR_SAMPLES {
        const float *pixel = x + i * t * c;
        float *mean = y + i * c;
        memset(mean, 0, c * sizeof(float));
        for (long j = 0; j < t; j++, pixel += c)
            EACH(k, c) STORE(mean + k, LOAD(mean + k) + LOAD(pixel + k));
        EACH(k, c) STORE(mean + k, LOAD(mean + k) / (float)t);
    }
}

void mean_backward(const float *grad, float *grad_x, long n, long t, long c) {
    FOR_SAMPLES {
        float *pixel = grad_x + i * t * c;
        for (long j = 0; j < t; j++, pixel += c)
            EACH(k, c) STORE(pixel + k, LOAD(grad + i * c + k) / (float)t);
    }
}

/* Squares of 2x2 pixels as channels, (n, 2h, 2w, c) -> (n, h, w, 4c), and back. The pixels of x begin
 * `apart` numbers after each other. */

void unshuffle(const float *restrict x, float *restrict y, long n, long h, long w, long c,
               long apart) {
    long line = 2 * w * apart;
    FOR_SAMPLES
    for (long row = i * h; row < (i + 1) * h; row++)
        for (long j = 0; j < w; j++) {
            const float *top = x + 2 * (row * line + j * apart), *bottom = top + line;
            float *square = y + (row * w + j) * 4 * c;
            for (long k = 0; k < c; k++) {
                square[4 * k] = top[k];
                square[4 * k + 1] = top[apart + k];
                square[4 * k + 2] = bottom[k];
                square[4 * k + 3] = bottom[apart + k];
            }
        }
}

void shuffle(const float *restrict x, float *restrict y, long n, long h, long w, long c,
             long apart) {
    long line = 2 * w * c;
    FOR_SAMPLES
    for (long row = i * h; row < (i + 1) * h; row++)
        for (long j = 0; j < w; j++) {
            const float *square = x + (row * w + j) * apart;
            float *top = y + 2 * (row * line + j * c), *bottom = top + line;
            for (long k = 0; k < c; k++) {
                top[k] = square[4 * k];
                top[c + k] = square[4 * k + 1];
                bottom[k] = square[4 * k + 2];
                bottom[c + k] = square[4 * k + 3];
            }
        }
}

/* Exact GELU, a piece at a time. */

void gelu_forward(const float *x, float *y, float *slope, long size) {
    enum { PIECE = 4096 };
#pragma omp parallel for
    for (long from = 0; from < size; from += PIECE)
        apply_gelu(x + from, y + from, slope + from, size - from < PIECE ? size - from : PIECE);
}

/* Depthwise k x k convolutions of (n, h, w, c), stride 1, that keep the size. Weights are
 * (k k, c). Threads share the channels: a thread has `part` of them, and its pointers begin there. */

/* Convolve `count` neighbouring pixels, whose sums are independent and so overlap. */
INLINE void convolve_pixels(const float *corner, const float *weight, const float *bias, float *y,
                            float *slope, long line, long c, long part, const long side,
                            const long count) {
    EACH(k, part) {
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
                     float *slope, long h, long w, long c, long part, const long side) {
    long line = (w + side - 1) * c;
    for (long i = 0; i < h; i++) {
        long j = 0;
#define PIXELS(count)                                                                              \
    for (; j + count <= w; j += count) {                                                           \
        long at = (i * w + j) * c;                                                                 \
        convolve_pixels(frame + i * line + j * c, weight, bias, y + at, slope ? slope + at : NULL, \
                        line, c, part, side, count);                                               \
    }
        PIXELS(4)
        PIXELS(1)
#undef PIXELS
    }
}

INLINE void correlate(const float *frame, const float *grad, float *grad_weight, long h, long w,
                      long c, long part, const long side) {
    long line = (w + side - 1) * c;
    EACH(k, part)
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
    long pad = side / 2, size = h * w * c, most = channels_of_thread(c);
#pragma omp parallel for
    for (long from = 0; from < c; from += most) {
        long part = c - from < most ? c - from : most;
        for (long at = from; at < n * size; at += size) {
            put_into_frame(x + at, frame + from, h, w, c, part, pad, (w + 2 * pad) * c);
#define CALL(s)                                                                               \
    convolve(frame + from, weight + from, bias ? bias + from : NULL, y + at,                  \
             slope ? slope + at : NULL, h, w, c, part, s)
            BY_SIDE(CALL)
#undef CALL
        }
    }
}

/* `flipped` is the weight turned by 180 degrees. `slope` may be NULL. `frame` holds two framed images
 * of zeros and an image. */
void depthwise_backward(const float *x, const float *flipped, const float *slope, const float *grad,
                        float *grad_x, float *grad_weight, float *grad_bias, float *frame, long n,
                        long h, long w, long c, long side) {
    long pad = side / 2, size = h * w * c, line = (w + 2 * pad) * c, framed = (h + 2 * pad) * line;
    long most = channels_of_thread(c);
    memset(grad_weight, 0, side * side * c * sizeof(float));
    memset(grad_bias, 0, c * sizeof(float));
#pragma omp parallel for
    for (long from = 0; from < c; from += most) {
        long part = c - from < most ? c - from : most;
        float *image = frame + from, *grad_frame = image + framed, *scaled = grad_frame + framed;
        for (long at = from; at < n * size; at += size) {
            const float *g = grad + at;
            if (slope) {
                for (long j = 0; j < size; j += c)
                    EACH(k, part)
                    STORE(scaled + j + k, LOAD(g + j + k) * LOAD(slope + at + j + k));
                g = scaled;
            }
            for (long j = 0; j < size; j += c)
                EACH(k, part)
                STORE(grad_bias + from + k, LOAD(grad_bias + from + k) + LOAD(g + j + k));
            put_into_frame(x + at, image, h, w, c, part, pad, line);
            put_into_frame(g, grad_frame, h, w, c, part, pad, line);
#define CALL(s)                                                         \
    correlate(image, g, grad_weight + from, h, w, c, part, s);          \
    convolve(grad_frame, flipped + from, NULL, grad_x + at, NULL, h, w, c, part, s)
            BY_SIDE(CALL)
#undef CALL
        }
    }
}

/* Transpose a matrix: (m, n) -> (n, m). */
void transpose_matrix(const float *x, float *y, long m, long n) {
#pragma omp parallel for
    for (long first = 0; first < m; first += STRIP) transpose_strip(x, y, m, n, first);
}
