/* Updates of all tensors of a small network in one call. Tensors that are updated together lie alike
 * in memory. `sizes` are their numbers of elements.
 */

#include "rows.h"
#include <math.h>

/* Move averages towards weights by a share of the distance. */
void lerp_tensors(float *const *averages, float *const *weights, const long *sizes, long count,
                  float share) {
    for (long i = 0; i < count; i++) {
        float *average = averages[i];
        const float *weight = weights[i];
        EACH(k, sizes[i]) {
            vec from = LOAD(average + k);
            STORE(average + k, from + share * (LOAD(weight + k) - from));
        }
    }
}

/* AdamW: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2. Every tensor has two moments and counts
 * its steps. Nothing happens if `bad` is not zero. */
void adamw_tensors(float *const *weights, float *const *grads, float *const *means,
                   float *const *squares, float *const *steps, const long *sizes, long count,
                   const float *bad, double lr, double beta1, double beta2, double eps,
                   double decay) {
    if (bad && *bad) return;
    const float keep1 = beta1, add1 = 1 - beta1, keep2 = beta2, add2 = 1 - beta2;
    const float shrink = 1 - lr * decay, epsilon = eps;
    for (long i = 0; i < count; i++) {
        float *weight = weights[i], *mean = means[i], *square = squares[i];
        const float *grad = grads[i];
        double step = ++*steps[i];
        float size = lr / (1 - pow(beta1, step)), root = sqrt(1 - pow(beta2, step));
        EACH(k, sizes[i]) {
            vec g = LOAD(grad + k);
            vec m = keep1 * LOAD(mean + k) + add1 * g;
            vec s = keep2 * LOAD(square + k) + add2 * g * g;
            vec deviation = (vec)_mm256_sqrt_ps((__m256)s) / root;
            STORE(mean + k, m);
            STORE(square + k, s);
            STORE(weight + k, shrink * LOAD(weight + k) - size * m / (deviation + epsilon));
        }
    }
}
