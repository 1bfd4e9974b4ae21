/* Fused passes over rows of channels in float32, for networks whose layers are too small for
 * PyTorch's loops. Single thread. x is (n, t, c): n samples, t pixels, c channels, and c is a
 * multiple of 8. Sums run in one order, so results are the same in every run.
 */

#include <stddef.h>
#include <string.h>

#define LANES 8
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int ints __attribute__((vector_size(32), aligned(4)));

#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define EACH(i, c) for (long i = 0; i < (c); i += LANES)
#define INLINE static inline __attribute__((always_inline))

INLINE vec fill(float value) { return value - (vec){0}; }

INLINE vec choose(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }

INLINE float add_lanes(vec v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

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
                vec d = LOAD(x + k) - m;
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

/* The sum over rows: (m, c) -> (c,). */

void sum_rows(const float *x, float *y, long m, long c) {
    memset(y, 0, c * sizeof(float));
    for (long j = 0; j < m; j++, x += c) EACH(k, c) STORE(y + k, LOAD(y + k) + LOAD(x + k));
}

/* Exact GELU. The tail of the normal distribution is Abramowitz and Stegun's 7.1.26, as in PyTorch.
 */

INLINE vec exp_of_negative(vec x) {
    x = choose(x < -87, fill(-87), x);
    ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (vec)((n + 127) << 23);
}

/* Return gelu(x), and its derivative in *slope. */
INLINE vec gelu(vec x, vec *slope) {
    vec size = choose(x < 0, -x, x);
    vec e = exp_of_negative(-0.5f * x * x);
    vec s = 1 / (1 + 0.3275911f * 0.70710678f * size);
    vec p = 1.061405429f * s - 1.453152027f;
    p = p * s + 1.421413741f;
    p = p * s - 0.284496736f;
    p = p * s + 0.254829592f;
    vec tail = 0.5f * p * s * e;
    vec normal = choose(x < 0, tail, 1 - tail);
    *slope = normal + x * e * 0.39894228f;
    return x * normal;
}

void gelu_forward(const float *x, float *y, float *slope, long size) {
    EACH(k, size) {
        vec d;
        STORE(y + k, gelu(LOAD(x + k), &d));
        STORE(slope + k, d);
    }
}

/* Depthwise k x k convolutions of (n, h, w, c), stride 1, that keep the size. Weights are
 * (k k, c). Each image lies in a frame of zeros, so that no pixel is a special case. */

static void put_into_frame(const float *x, float *frame, long h, long w, long c, long pad) {
    long line = (w + 2 * pad) * c;
    for (long i = 0; i < h; i++)
        memcpy(frame + (i + pad) * line + pad * c, x + i * w * c, w * c * sizeof(float));
}

/* Convolve `count` neighbouring pixels, whose sums are independent and so overlap. */
INLINE void convolve_pixels(const float *corner, const float *weight, const float *bias, float *y,
                            float *slope, long line, long c, const long side, const long count) {
    EACH(k, c) {
        vec sums[count];
        for (long r = 0; r < count; r++) sums[r] = bias ? LOAD(bias + k) : (vec){0};
        for (long p = 0; p < side; p++)
            for (long q = 0; q < side; q++) {
                vec tap = LOAD(weight + (p * side + q) * c + k);
                for (long r = 0; r < count; r++)
                    sums[r] += tap * LOAD(corner + p * line + (q + r) * c + k);
            }
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
        vec sums[side];
        for (long q = 0; q < side; q++) sums[q] = LOAD(grad_weight + (p * side + q) * c + k);
        for (long i = 0; i < h; i++)
            for (long j = 0; j < w; j++) {
                vec g = LOAD(grad + (i * w + j) * c + k);
                const float *row = frame + (i + p) * line + j * c + k;
                for (long q = 0; q < side; q++) sums[q] += g * LOAD(row + q * c);
            }
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
        put_into_frame(x + i * size, frame, h, w, c, pad);
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
    long pad = side / 2, size = h * w * c, framed = (h + 2 * pad) * (w + 2 * pad) * c;
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
        put_into_frame(x + i * size, frame, h, w, c, pad);
        put_into_frame(g, grad_frame, h, w, c, pad);
#define CALL(s)                                                                     \
    correlate(frame, g, grad_weight, h, w, c, s);                                   \
    convolve(grad_frame, flipped, NULL, grad_x + i * size, NULL, h, w, c, s)
        BY_SIDE(CALL)
#undef CALL
    }
}
