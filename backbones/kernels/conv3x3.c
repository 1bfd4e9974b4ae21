/* 3x3 convolutions of (n, h, w, c), stride 1, that keep the size, with fewer products than one per tap
 * and output.
 *
 * Winograd's F(2x2, 3x3), after Lavin and Gray, arXiv:1509.09308, section 4.1: a tile of 2 x 2 outputs
 * takes 16 products per pair of channels in the place of 36. A plane holds one of the 16 for all
 * tiles. Small images, at the foot, need no planes.
 *
 * Legend: c and o channels of input and output, g a weight, u its 16 planes.
 */

#include "rows.h"

#define PLANES 16

/* Planes begin in different lines of the cache: at a distance of whole pages, they would evict each
 * other. */
INLINE long apart(long numbers) { return numbers + 16; }

/* One side of the transforms, and of their transposes for the backward pass. A tile has 4 x 4 inputs
 * or 2 x 2 outputs. */

INLINE void split_input(const vec *d, vec *v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
}

INLINE void join_input(const vec *v, vec *d) {
    d[0] = v[0];
    d[1] = v[1] - v[2] + v[3];
    d[2] = v[1] + v[2] - v[0];
    d[3] = -v[3];
}

INLINE void join_output(const vec *m, vec *y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
}

INLINE void split_output(const vec *y, vec *m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
}

INLINE void split_weight(const vec *g, vec *u, long t, long s) {
    vec outer = 0.5f * (g[0] + g[2 * t]), inner = 0.5f * g[t];
    u[0] = g[0];
    u[s] = outer + inner;
    u[2 * s] = outer - inner;
    u[3 * s] = g[2 * t];
}

INLINE void join_weight(const vec *u, vec *g, long s, long t) {
    vec sum = 0.5f * (u[s] + u[2 * s]);
    g[0] = u[0] + sum;
    g[t] = 0.5f * (u[s] - u[2 * s]);
    g[2 * t] = sum + u[3 * s];
}

/* Weights to planes: taps lie `tap` apart, and rows of `cols` weights `row` apart. */
static void split_weights(const float *g, float *u, long rows, long cols, long row, long tap) {
    long plane = apart(rows * cols);
    for (long r = 0; r < rows; r++, g += row, u += cols) EACH(k, cols) {
            vec taps[9], half[12], planes[PLANES];
            UNROLL
            for (long p = 0; p < 9; p++) taps[p] = LOAD(g + p * tap + k);
            UNROLL
            for (long j = 0; j < 3; j++) split_weight(taps + j, half + j, 3, 3);
            UNROLL
            for (long i = 0; i < 4; i++) split_weight(half + 3 * i, planes + 4 * i, 1, 1);
            UNROLL
            for (long p = 0; p < PLANES; p++) STORE(u + p * plane + k, planes[p]);
        }
}

static void join_weights(const float *u, float *g, long rows, long cols, long row, long tap) {
    long plane = apart(rows * cols);
    for (long r = 0; r < rows; r++, g += row, u += cols) EACH(k, cols) {
            vec taps[9], half[12], planes[PLANES];
            UNROLL
            for (long p = 0; p < PLANES; p++) planes[p] = LOAD(u + p * plane + k);
            UNROLL
            for (long i = 0; i < 4; i++) join_weight(planes + 4 * i, half + 3 * i, 1, 1);
            UNROLL
            for (long j = 0; j < 3; j++) join_weight(half + j, taps + j, 3, 3);
            UNROLL
            for (long p = 0; p < 9; p++) STORE(g + p * tap + k, taps[p]);
        }
}

/* An image in a frame of zeros: tiles overlap by two pixels, and begin one before the image. */
typedef struct {
    long h, w, c;       // of the image
    long down, across;  // tiles
    long line;          // of the frame, in numbers
} grid;

INLINE grid grid_of(long h, long w, long c) {
    long down = (h + 1) / 2, across = (w + 1) / 2;
    return (grid){h, w, c, down, across, (2 * across + 2) * c};
}

/* The other side, row by row: a whole tile and its transform do not fit into the registers. */

INLINE vec split_input_row(const float *d, long line, const long row, long width) {
    (void)width;  // which only PARTS reads
    switch (row) {
        case 0: return LOAD(d) - LOAD(d + 2 * line);
        case 1: return LOAD(d + line) + LOAD(d + 2 * line);
        case 2: return LOAD(d + 2 * line) - LOAD(d + line);
        default: return LOAD(d + line) - LOAD(d + 3 * line);
    }
}

INLINE vec join_input_row(const float *v, long line, const long row, long width) {
    (void)width;
    switch (row) {
        case 0: return LOAD(v);
        case 1: return LOAD(v + line) - LOAD(v + 2 * line) + LOAD(v + 3 * line);
        case 2: return LOAD(v + line) + LOAD(v + 2 * line) - LOAD(v);
        default: return -LOAD(v + 3 * line);
    }
}

INLINE vec join_output_row(const float *m, long line, const long row, long width) {
    (void)width;
    if (row == 0) return LOAD(m) + LOAD(m + line) + LOAD(m + 2 * line);
    return LOAD(m + line) - LOAD(m + 2 * line) - LOAD(m + 3 * line);
}

/* Split the tiles of an image into planes, each `plane` numbers after the one before. */
static void split_image(const float *x, float *frame, float *v, grid g, long plane) {
    put_into_frame(x, frame, g.h, g.w, g.c, g.c, 1, g.line);
    for (long i = 0; i < g.down; i++)
        for (long j = 0; j < g.across; j++, v += g.c) {
            const float *corner = frame + 2 * i * g.line + 2 * j * g.c;
            EACH(k, g.c)
            UNROLL
            for (long p = 0; p < 4; p++) {
                vec row[4], planes[4];
                UNROLL
                for (long q = 0; q < 4; q++)
                    row[q] = split_input_row(corner + q * g.c + k, g.line, p, width);
                split_input(row, planes);
                UNROLL
                for (long q = 0; q < 4; q++) STORE(v + (4 * p + q) * plane + k, planes[q]);
            }
        }
}

/* Add up the tiles of planes in a frame, and copy the image in its middle. */
static void join_image(const float *v, float *frame, float *x, grid g, long plane) {
    memset(frame, 0, (2 * g.down + 2) * g.line * sizeof(float));
    for (long i = 0; i < g.down; i++)
        for (long j = 0; j < g.across; j++, v += g.c) {
            float *corner = frame + 2 * i * g.line + 2 * j * g.c;
            EACH(k, g.c)
            UNROLL
            for (long p = 0; p < 4; p++) {
                vec planes[4], row[4];
                UNROLL
                for (long q = 0; q < 4; q++)
                    planes[q] = join_input_row(v + q * plane + k, 4 * plane, p, width);
                join_input(planes, row);
                UNROLL
                for (long q = 0; q < 4; q++) {
                    float *at = corner + p * g.line + q * g.c + k;
                    STORE(at, LOAD(at) + row[q]);
                }
            }
        }
    for (long i = 0; i < g.h; i++)
        memcpy(x + i * g.w * g.c, frame + (i + 1) * g.line + g.c, g.w * g.c * sizeof(float));
}

/* Join the planes of products to an image of outputs. */
static void join_outputs(const float *m, const float *bias, float *y, grid g, long plane) {
    for (long i = 0; i < g.down; i++)
        for (long j = 0; j < g.across; j++, m += g.c) {
            float *corner = y + (2 * i * g.w + 2 * j) * g.c;
            EACH(k, g.c)
            UNROLL
            for (long p = 0; p < 2; p++) {
                if (2 * i + p == g.h) continue;
                vec planes[4], row[2];
                UNROLL
                for (long q = 0; q < 4; q++)
                    planes[q] = join_output_row(m + q * plane + k, 4 * plane, p, width);
                join_output(planes, row);
                UNROLL
                for (long q = 0; q < 2; q++)
                    if (2 * j + q < g.w)
                        STORE(corner + (p * g.w + q) * g.c + k,
                              bias ? row[q] + LOAD(bias + k) : row[q]);
            }
        }
}

/* Split an image of the outputs' gradients into planes. */
static void split_outputs(const float *y, float *m, grid g, long plane) {
    for (long i = 0; i < g.down; i++)
        for (long j = 0; j < g.across; j++, m += g.c) {
            const float *corner = y + (2 * i * g.w + 2 * j) * g.c;
            EACH(k, g.c) {
                vec half[4][2];
                UNROLL
                for (long q = 0; q < 2; q++) {
                    vec column[2], rows[4];
                    UNROLL
                    for (long p = 0; p < 2; p++)
                        column[p] = 2 * i + p < g.h && 2 * j + q < g.w
                                        ? LOAD(corner + (p * g.w + q) * g.c + k)
                                        : (vec){0};
                    split_output(column, rows);
                    UNROLL
                    for (long p = 0; p < 4; p++) half[p][q] = rows[p];
                }
                UNROLL
                for (long p = 0; p < 4; p++) {
                    vec planes[4];
                    split_output(half[p], planes);
                    UNROLL
                    for (long q = 0; q < 4; q++) STORE(m + (4 * p + q) * plane + k, planes[q]);
                }
            }
        }
}

/* Both passes take `samples` at once, whose planes should stay in the cache. `scratch` begins with two
 * frames of zeros, then come the planes of two weights, of the inputs and of the outputs. */

/* weight (o, 3, 3, c); `taps` holds it as (3, 3, c, o) */
void winograd_forward(const float *x, const float *weight, float *taps, const float *bias,
                      float *y, float *scratch, long n, long h, long w, long c, long o,
                      long samples) {
    grid in = grid_of(h, w, c), out = grid_of(h, w, o);
    long each = in.down * in.across, weights = apart(c * o);
    long inputs = apart(samples * each * c), outputs = apart(samples * each * o);
    float *frame = scratch, *u = frame + 2 * (2 * in.down + 2) * in.line;
    float *v = u + 2 * PLANES * weights, *m = v + PLANES * inputs;
    transpose(weight, taps, o, 9 * c);
    split_weights(taps, u, c, o, o, c * o);
    for (long i = 0; i < n; i += samples) {
        long count = n - i < samples ? n - i : samples, tiles = count * each;
        for (long s = 0; s < count; s++)
            split_image(x + (i + s) * h * w * c, frame, v + s * each * c, in, inputs);
        for (long p = 0; p < PLANES; p++)
            multiply(v + p * inputs, c, 1, u + p * weights, m + p * outputs, NULL, tiles, o, c, 0);
        for (long s = 0; s < count; s++)
            join_outputs(m + s * each * o, bias, y + (i + s) * h * w * o, out, outputs);
    }
}

/* weight and grad_weight (o, 3, 3, c) */
void winograd_backward(const float *x, const float *weight, const float *grad, float *grad_x,
                       float *grad_weight, float *grad_bias, float *scratch, long n, long h,
                       long w, long c, long o, long samples) {
    grid in = grid_of(h, w, c), out = grid_of(h, w, o);
    long each = in.down * in.across, weights = apart(c * o);
    long inputs = apart(samples * each * c), outputs = apart(samples * each * o);
    long frame_size = (2 * in.down + 2) * in.line;
    float *frame = scratch, *sums = frame + frame_size, *u = sums + frame_size;
    float *grad_u = u + PLANES * weights, *v = grad_u + PLANES * weights, *m = v + PLANES * inputs;
    split_weights(weight, u, o, c, 9 * c, c);
    for (long i = 0; i < n; i += samples) {
        long count = n - i < samples ? n - i : samples, tiles = count * each;
        for (long s = 0; s < count; s++) {
            split_image(x + (i + s) * h * w * c, frame, v + s * each * c, in, inputs);
            split_outputs(grad + (i + s) * h * w * o, m + s * each * o, out, outputs);
        }
        for (long p = 0; p < PLANES; p++) {
            float *left = m + p * outputs, *right = v + p * inputs;
            multiply(left, 1, o, right, grad_u + p * weights, NULL, o, c, tiles, i > 0);
            if (grad_x) multiply(left, o, 1, u + p * weights, right, NULL, tiles, c, o, 0);
        }
        if (grad_x)
            for (long s = 0; s < count; s++)
                join_image(v + s * each * c, sums, grad_x + (i + s) * h * w * c, in, inputs);
    }
    join_weights(grad_u, grad_weight, o, c, 9 * c, c);
    if (grad_bias) {
        memset(grad_bias, 0, o * sizeof(float));
        add_rows(grad, grad_bias, n * h * w, o);
    }
}

/* On small images most taps meet the border. The same convolution then takes a product for each pair
 * of neighbouring pixels, which needs no planes. */

// Loop over the inputs at (i, j) next to the output at (p, q), and the tap between them.
#define NEIGHBOURS(p, q, h, w)                                          \
    for (long i = (p) ? (p)-1 : 0; i < (h) && i < (p) + 2; i++)          \
        for (long j = (q) ? (q)-1 : 0; j < (w) && j < (q) + 2; j++)
#define TAP(i, j, p, q) (3 * ((i) - (p) + 1) + (j) - (q) + 1)

/* weight (o, 3, 3, c); `taps` holds it as (3, 3, c, o) */
void neighbours_forward(const float *x, const float *weight, float *taps, const float *bias,
                        float *y, long n, long h, long w, long c, long o) {
    transpose(weight, taps, o, 9 * c);
    long inputs = h * w * c, outputs = h * w * o;
    for (long p = 0; p < h; p++)
        for (long q = 0; q < w; q++) {
            int add = 0;
            NEIGHBOURS(p, q, h, w) {
                const float *pixel = x + (i * w + j) * c, *tap = taps + TAP(i, j, p, q) * c * o;
                float *out = y + (p * w + q) * o;
                multiply_apart((product){pixel, inputs, 1, tap, o, out, outputs, bias, c, add}, n,
                               o);
                add = 1;
            }
        }
}

/* weight and grad_weight (o, 3, 3, c) */
void neighbours_backward(const float *x, const float *weight, const float *grad, float *grad_x,
                         float *grad_weight, float *grad_bias, long n, long h, long w, long c,
                         long o) {
    long inputs = h * w * c, outputs = h * w * o;
    memset(grad_weight, 0, 9 * c * o * sizeof(float));
    if (grad_x) memset(grad_x, 0, n * inputs * sizeof(float));
    for (long p = 0; p < h; p++)
        for (long q = 0; q < w; q++) {
            const float *out = grad + (p * w + q) * o;
            NEIGHBOURS(p, q, h, w) {
                long pixel = (i * w + j) * c, tap = TAP(i, j, p, q) * c;
                multiply_apart((product){out, 1, outputs, x + pixel, inputs, grad_weight + tap,
                                         9 * c, NULL, n, 1},
                               o, c);
                if (grad_x)
                    multiply_apart((product){out, outputs, 1, weight + tap, 9 * c, grad_x + pixel,
                                             inputs, NULL, o, 1},
                                   n, c);
            }
        }
    if (grad_bias) {
        memset(grad_bias, 0, o * sizeof(float));
        add_rows(grad, grad_bias, n * h * w, o);
    }
}
