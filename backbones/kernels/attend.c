/* Softmax attention of few tokens, head by head: softmax(q k^T scale + bias) v.
 *
 * q (n, heads, t, e), k and v (n, heads, s, e) are read by strides whose last is 1. Results are
 * (n, t, heads, e). Each head is copied to rows that are whole vectors: E and S are e and s, rounded
 * up to whole vectors.
 */

#include "rows.h"

#define ROUND_UP(size) (((size) + LANES - 1) / LANES * LANES)

typedef struct {
    long sample, head, token;
} Strides;

/* Copy a head's tokens to rows of E, times a factor, with zeros behind. */
static void copy_in(const float *x, long stride, float *rows, long tokens, long e, float factor) {
    long padded = ROUND_UP(e);
    for (long i = 0; i < tokens; i++, x += stride, rows += padded) {
        for (long j = 0; j < e; j++) rows[j] = x[j] * factor;
        for (long j = e; j < padded; j++) rows[j] = 0;
    }
}

/* Copy a head's tokens to columns: (E, S), with zeros behind. */
static void copy_turned(const float *x, long stride, float *columns, long tokens, long e) {
    long padded = ROUND_UP(tokens);
    for (long j = 0; j < e; j++) {
        for (long i = 0; i < tokens; i++) columns[j * padded + i] = x[i * stride + j];
        for (long i = tokens; i < padded; i++) columns[j * padded + i] = 0;
    }
}

static void copy_out(const float *rows, float *x, long stride, long tokens, long e, float factor) {
    for (long i = 0; i < tokens; i++, x += stride, rows += ROUND_UP(e))
        for (long j = 0; j < e; j++) x[j] = rows[j] * factor;
}

/* Turn rows of s logits into weights, in place. What is behind them becomes zero. */
static void softmax_rows(float *logits, const float *bias, long t, long s) {
    long padded = ROUND_UP(s);
    for (long i = 0; i < t; i++, logits += padded) {
        if (bias) {
            for (long j = 0; j < s; j++) logits[j] += bias[j];
            bias += s;
        }
        for (long j = s; j < padded; j++) logits[j] = -__builtin_inff();

        vec most = *(vec *)logits, sum = {0};
        for (long j = LANES; j < padded; j += LANES) {
            vec x = *(vec *)(logits + j);
            most = choose(x > most, x, most);
        }
        float top = greatest_lane(most);
        for (long j = 0; j < padded; j += LANES) {
            vec e = keep_part(exp_of_negative(*(vec *)(logits + j) - top), s - j);
            *(vec *)(logits + j) = e;
            sum += e;
        }
        float factor = 1 / add_lanes(sum);
        for (long j = 0; j < padded; j += LANES) *(vec *)(logits + j) *= factor;
    }
}

/* `weights` (n, heads, t, S) is kept for the backward pass. `scratch` holds a head. */
void attend_forward(const float *q, const float *k, const float *v, const float *bias, float *out,
                    float *weights, float *scratch, long n, long heads, long t, long s, long e,
                    long q_sample, long q_head, long q_token, long k_sample, long k_head,
                    long k_token, float scale) {
    long wide = ROUND_UP(e), keys = ROUND_UP(s);
    float *queries = scratch, *turned = queries + t * wide, *values = turned + wide * keys;
    float *result = values + s * wide;
    for (long i = 0; i < n; i++)
        for (long h = 0; h < heads; h++, weights += t * keys) {
            long at = i * k_sample + h * k_head;
            copy_in(q + i * q_sample + h * q_head, q_token, queries, t, e, scale);
            copy_turned(k + at, k_token, turned, s, e);
            copy_in(v + at, k_token, values, s, e, 1);

            multiply(queries, wide, 1, turned, weights, NULL, t, keys, e, 0);
            softmax_rows(weights, bias ? bias + h * t * s : NULL, t, s);
            multiply(weights, keys, 1, values, result, NULL, t, wide, s, 0);
            copy_out(result, out + (i * t * heads + h) * e, heads * e, t, e, 1);
        }
}

/* The gradients have the strides of what they belong to. grad_bias (heads, t, s) may be NULL. */
void attend_backward(const float *q, const float *k, const float *v, const float *weights,
                     const float *grad, float *grad_q, float *grad_k, float *grad_v,
                     float *grad_bias, float *scratch, long n, long heads, long t, long s, long e,
                     long q_sample, long q_head, long q_token, long k_sample, long k_head,
                     long k_token, long dq_sample, long dq_head, long dq_token, long dk_sample,
                     long dk_head, long dk_token, float scale) {
    long wide = ROUND_UP(e), keys = ROUND_UP(s);
    float *queries = scratch, *rows = queries + t * wide, *turned = rows + s * wide;
    float *grads = turned + wide * keys, *slopes = grads + t * wide, *result = slopes + t * keys;
    if (grad_bias) memset(grad_bias, 0, heads * t * s * sizeof(float));
    for (long i = 0; i < n; i++)
        for (long h = 0; h < heads; h++, weights += t * keys) {
            long at = i * k_sample + h * k_head, to = i * dk_sample + h * dk_head;
            copy_in(grad + (i * t * heads + h) * e, heads * e, grads, t, e, 1);

            // The values' gradient, then the logits'.
            multiply(weights, 1, keys, grads, result, NULL, s, wide, t, 0);
            copy_out(result, grad_v + to, dk_token, s, e, 1);
            copy_turned(v + at, k_token, turned, s, e);
            multiply(grads, wide, 1, turned, slopes, NULL, t, keys, e, 0);
            for (long r = 0; r < t; r++) {
                const float *weight = weights + r * keys;
                float *slope = slopes + r * keys;
                vec sum = {0};
                for (long j = 0; j < keys; j += LANES)
                    sum += *(vec *)(slope + j) * *(const vec *)(weight + j);
                float mean = add_lanes(sum);
                for (long j = 0; j < keys; j += LANES)
                    *(vec *)(slope + j) = (*(vec *)(slope + j) - mean) * *(const vec *)(weight + j);
                if (grad_bias) {
                    float *b = grad_bias + (h * t + r) * s;
                    for (long j = 0; j < s; j++) b[j] += slope[j];
                }
            }

            // The queries' gradient, and the keys'.
            copy_in(k + at, k_token, rows, s, e, 1);
            multiply(slopes, keys, 1, rows, result, NULL, t, wide, s, 0);
            copy_out(result, grad_q + i * dq_sample + h * dq_head, dq_token, t, e, scale);
            copy_in(q + i * q_sample + h * q_head, q_token, queries, t, e, scale);
            multiply(slopes, 1, keys, queries, result, NULL, s, wide, t, 0);
            copy_out(result, grad_k + to, dk_token, s, e, 1);
        }
}
