/* What the passes over rows of channels share: vectors, GELU, matrix products, passes over a sample.
 *
 * Everything is float32. Sums run in one order, so results are the same in every run. The files are
 * built twice. With PARTS, the last vector of a row may hold fewer channels than it has lanes; without,
 * every number of channels is a multiple of 8.
 */

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define LANES 8
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int ints __attribute__((vector_size(32), aligned(4)));

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

/* In the body of EACH, `width` channels are left from i on. LOAD, STORE and KEEP read it. */
#define EACH(i, c) for (long i = 0, width = (c); width > 0; i += LANES, width -= LANES)

#ifdef PARTS
#define LOAD(p) load_part(p, width)
#define STORE(p, v) store_part(p, v, width)
#define KEEP(v) keep_part(v, width)
#else
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define KEEP(v) (v)
#endif

INLINE vec fill(float value) { return value - (vec){0}; }

INLINE vec choose(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }

INLINE float add_lanes(vec v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

INLINE float greatest_lane(vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* Lanes that a row still fills. */
INLINE ints lanes_below(long width) { return (ints){0, 1, 2, 3, 4, 5, 6, 7} < (int)width; }

INLINE vec keep_part(vec v, long width) {
    return width >= LANES ? v : (vec)(lanes_below(width) & (ints)v);
}

INLINE vec load_part(const float *p, long width) {
    if (width >= LANES) return *(const vec *)p;
    return (vec)_mm256_maskload_ps(p, (__m256i)lanes_below(width));
}

/* Masked stores are slow on some processors, so halves are stored. */
INLINE void store_part(float *p, vec v, long width) {
    if (width >= LANES) {
        *(vec *)p = v;
        return;
    }
    __m128 half = _mm256_castps256_ps128((__m256)v);
    if (width & 4) {
        _mm_storeu_ps(p, half);
        half = _mm256_extractf128_ps((__m256)v, 1);
        p += 4;
    }
    if (width & 2) {
        _mm_storel_pi((__m64 *)p, half);
        half = _mm_movehl_ps(half, half);
        p += 2;
    }
    if (width & 1) _mm_store_ss(p, half);
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

/* Matrix products c (m, n) = a b + bias, or c += a b: b (k, n) and c (m, n) lie row by row, their rows
 * `line` and `out` apart, and a has any strides. `vecs` vectors of columns are multiplied at once, and
 * `width` columns are left for the last one. A column's sum does not depend on the vector it is in, so
 * vectors of any width give the same bits. */

#ifdef __AVX512F__
#define COLUMNS 16
typedef float columns __attribute__((vector_size(64), aligned(4)));

INLINE __mmask16 columns_below(long width) { return (1 << width) - 1; }

INLINE columns load_columns(const float *p, long width) {
    if (width >= COLUMNS) return *(const columns *)p;
    return (columns)_mm512_maskz_loadu_ps(columns_below(width), p);
}

INLINE void store_columns(float *p, columns v, long width) {
    if (width >= COLUMNS)
        *(columns *)p = v;
    else
        _mm512_mask_storeu_ps(p, columns_below(width), (__m512)v);
}
#else
#define COLUMNS LANES
typedef vec columns;

INLINE columns load_columns(const float *p, long width) {
    (void)width;  // which only PARTS reads
    return LOAD(p);
}

INLINE void store_columns(float *p, columns v, long width) {
    (void)width;
    STORE(p, v);
}
#endif

// Rows of b that are multiplied before the next ones, so that they stay in the cache.
#define DEPTH 128
// Rows of a from which it pays to lay out these rows of b one after the other. At a distance of a
// power of two, they would evict each other.
#define MANY 24

typedef struct {
    const float *a;
    long row, column;
    const float *b;
    long line;
    float *c;
    long out;
    const float *bias;
    long k;
    int add;
} product;

#define WIDTH(v) ((v) < vecs - 1 ? COLUMNS : width)

INLINE void multiply_block(product x, long i, long j, long width, const long count,
                           const long vecs) {
    const float *a = x.a + i * x.row;
    float *c = x.c + i * x.out + j;
    columns sums[8][3];
    UNROLL
    for (long r = 0; r < count; r++)
        UNROLL
        for (long v = 0; v < vecs; v++)
            sums[r][v] = x.add    ? load_columns(c + r * x.out + v * COLUMNS, WIDTH(v))
                         : x.bias ? load_columns(x.bias + j + v * COLUMNS, WIDTH(v))
                                  : (columns){0};
    for (long p = 0; p < x.k; p++) {
        columns right[3];
        UNROLL
        for (long v = 0; v < vecs; v++)
            right[v] = load_columns(x.b + p * x.line + v * COLUMNS, WIDTH(v));
        UNROLL
        for (long r = 0; r < count; r++) {
            columns left = a[r * x.row + p * x.column] - (columns){0};
            UNROLL
            for (long v = 0; v < vecs; v++) sums[r][v] += left * right[v];
        }
    }
    UNROLL
    for (long r = 0; r < count; r++)
        UNROLL
        for (long v = 0; v < vecs; v++)
            store_columns(c + r * x.out + v * COLUMNS, sums[r][v], WIDTH(v));
}

INLINE void multiply_columns(product x, long m, long j, long width, const long vecs) {
    _Alignas(64) float panel[DEPTH * 3 * COLUMNS];
    x.b += j;
    if (m >= MANY) {
        for (long p = 0; p < x.k; p++)
            UNROLL
            for (long v = 0; v < vecs; v++)
                *(columns *)(panel + (p * vecs + v) * COLUMNS) =
                    load_columns(x.b + p * x.line + v * COLUMNS, WIDTH(v));
        x.b = panel;
        x.line = vecs * COLUMNS;
    }

    // a block of sums fills at most three quarters of the registers, of which AVX-512 has 32
    long i = 0;
#define ROWS(count) \
    for (; i + count <= m; i += count) multiply_block(x, i, j, width, count, vecs);
    if (COLUMNS > LANES) {
        ROWS(8)
    } else if (vecs < 3) {
        ROWS(6)
    }
    ROWS(4)
    ROWS(2)
    ROWS(1)
#undef ROWS
}

static __attribute__((noinline)) void multiply_apart(product x, long m, long n) {
    long k = x.k;
    for (long p = 0; p == 0 || p < k; p += DEPTH) {
        x.k = k - p < DEPTH ? k - p : DEPTH;
        for (long j = 0, vecs; j < n; j += vecs * COLUMNS) {
            // three vectors read the least, but two and two are better than three and one
            long left = (n - j + COLUMNS - 1) / COLUMNS;
            vecs = left == 3 || left > 4 ? 3 : left > 1 ? 2 : 1;
            long width = n - j - (vecs - 1) * COLUMNS;
#define BY_NUMBER(width)                                            \
    switch (vecs) {                                                 \
        case 3: multiply_columns(x, m, j, width, 3); break;         \
        case 2: multiply_columns(x, m, j, width, 2); break;         \
        default: multiply_columns(x, m, j, width, 1);               \
    }
            if (width >= COLUMNS)
                BY_NUMBER(COLUMNS)
            else
                BY_NUMBER(width)
#undef BY_NUMBER
        }
        x.a += DEPTH * x.column;
        x.b += DEPTH * x.line;
        x.add = 1;
    }
}

INLINE void multiply(const float *a, long row, long column, const float *b, float *c,
                     const float *bias, long m, long n, long k, int add) {
    multiply_apart((product){a, row, column, b, n, c, n, bias, k, add}, m, n);
}

/* Transpose a block of 8 x 8. Its rows lie n numbers apart, and those of the result m. */
INLINE void transpose_block(const float *x, float *y, long m, long n) {
    __m256 a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i++) a[i] = _mm256_loadu_ps(x + i * n);

    /* Join pairs of rows, then fours, within halves of vectors; then join the halves. */
    UNROLL for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < LANES / 2; i++) {
        _mm256_storeu_ps(y + i * m, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(y + (i + 4) * m, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

// Rows of a strip, whose columns fill whole lines of the cache.
#define STRIP (8 * LANES)

/* Transpose a strip of rows, from `first` on, of (m, n) into (n, m). */
static inline void transpose_strip(const float *x, float *y, long m, long n, long first) {
    long end = m - first < STRIP ? m : first + STRIP;
    for (long j = 0; j < n; j += LANES)
        for (long i = first; i < end; i += LANES) {
            if (i + LANES <= end && j + LANES <= n) {
                transpose_block(x + i * n + j, y + j * m + i, m, n);
                continue;
            }
            for (long q = j; q < j + LANES && q < n; q++)
                for (long p = i; p < i + LANES && p < end; p++) y[q * m + p] = x[p * n + q];
        }
}

static inline void transpose(const float *x, float *y, long m, long n) {
    for (long first = 0; first < m; first += STRIP) transpose_strip(x, y, m, n, first);
}

static inline void add_rows(const float *x, float *y, long m, long c) {
    for (long j = 0; j < m; j++, x += c) EACH(k, c) STORE(y + k, LOAD(y + k) + LOAD(x + k));
}

/* Put `part` of the channels of an image (h, w, c) into a frame of zeros whose lines hold `line` numbers,
 * so that no pixel is a special case. */
static inline void put_into_frame(const float *x, float *frame, long h, long w, long c, long part,
                                  long pad, long line) {
    for (long i = 0; i < h; i++)
        for (long j = 0; j < w; j++)
            memcpy(frame + (i + pad) * line + (j + pad) * c, x + (i * w + j) * c,
                   part * sizeof(float));
}

/* Passes over a sample of t pixels. */

static inline void normalise(const float *x, const float *shift, const float *scale, float *y,
                             float *mean, float *rstd, long t, long c, float eps) {
    for (long j = 0; j < t; j++, x += c, y += c) {
        vec sum = {0}, squares = {0};
        EACH(k, c) sum += LOAD(x + k);
        float m = add_lanes(sum) / c;
        EACH(k, c) {
            vec d = KEEP(LOAD(x + k) - m);
            squares += d * d;
        }
        float r = 1 / __builtin_sqrtf(add_lanes(squares) / c + eps);
        EACH(k, c) STORE(y + k, (LOAD(x + k) - m) * r * (1 + LOAD(scale + k)) + LOAD(shift + k));
        mean[j] = m;
        rstd[j] = r;
    }
}

static inline void normalise_backward(const float *x, const float *scale, const float *grad,
                                      const float *mean, const float *rstd, float *grad_x,
                                      float *grad_shift, float *grad_scale, long t, long c) {
    memset(grad_shift, 0, c * sizeof(float));
    memset(grad_scale, 0, c * sizeof(float));
    for (long j = 0; j < t; j++, x += c, grad += c, grad_x += c) {
        float m = mean[j], r = rstd[j];
        vec sum = {0}, along = {0};
        EACH(k, c) {
            vec u = (LOAD(x + k) - m) * r, g = LOAD(grad + k), gu = g * (1 + LOAD(scale + k));
            STORE(grad_shift + k, LOAD(grad_shift + k) + g);
            STORE(grad_scale + k, LOAD(grad_scale + k) + g * u);
            sum += gu;
            along += gu * u;
        }
        float s = add_lanes(sum) / c, l = add_lanes(along) / c;
        EACH(k, c) {
            vec u = (LOAD(x + k) - m) * r, gu = LOAD(grad + k) * (1 + LOAD(scale + k));
            STORE(grad_x + k, (gu - s - u * l) * r);
        }
    }
}

/* x may be NULL. */
static inline void apply_gate(const float *x, const float *gate, const float *b, float *y, long t,
                              long c) {
    for (long j = 0; j < t; j++, b += c, y += c) {
        if (x) {
            EACH(k, c) STORE(y + k, LOAD(x + k) + LOAD(gate + k) * LOAD(b + k));
            x += c;
        } else
            EACH(k, c) STORE(y + k, LOAD(gate + k) * LOAD(b + k));
    }
}

static inline void apply_gate_backward(const float *gate, const float *b, const float *grad,
                                       float *grad_gate, float *grad_b, long t, long c) {
    memset(grad_gate, 0, c * sizeof(float));
    for (long j = 0; j < t; j++, b += c, grad += c, grad_b += c)
        EACH(k, c) {
            vec g = LOAD(grad + k);
            STORE(grad_gate + k, LOAD(grad_gate + k) + g * LOAD(b + k));
            STORE(grad_b + k, g * LOAD(gate + k));
        }
}

static inline void apply_gelu(const float *x, float *y, float *slope, long size) {
    EACH(k, size) {
        vec d;
        STORE(y + k, gelu(LOAD(x + k), &d));
        STORE(slope + k, d);
    }
}
