/* The 3x3 taps of a pixel side by side, so that one matrix product takes them all: for convolutions of
 * (n, h, w, c) whose inputs or outputs have few channels.
 */

#include "rows.h"

/* The part of the three pixels around column j that lies in a line of w pixels: its first pixel, its
 * place among the three, and its length. */
typedef struct {
    long first, place, count;
} span;

INLINE span span_of(long j, long w) {
    long first = j ? j - 1 : 0, last = j + 1 < w ? j + 1 : w - 1;
    return (span){first, first - j + 1, last - first + 1};
}

/* Each pixel's surroundings, with zeros outside of the image: (n, h, w, c) -> (n, h, w, 3, 3, c). */
void gather_taps(const float *x, float *taps, long n, long h, long w, long c) {
    memset(taps, 0, n * h * w * 9 * c * sizeof(float));
    for (long m = 0; m < n; m++, x += h * w * c)
        for (long i = 0; i < h; i++)
            for (long j = 0; j < w; j++, taps += 9 * c) {
                span s = span_of(j, w);
                for (long p = i ? 0 : 1; p < 3 && i + p - 1 < h; p++) {
                    const float *from = x + ((i + p - 1) * w + s.first) * c;
                    float *to = taps + (3 * p + s.place) * c;
                    for (long k = 0; k < s.count * c; k++) to[k] = from[k];
                }
            }
}

/* The transpose: a pixel gives its taps to its surroundings. (n, h, w, 3, 3, c) -> (n, h, w, c) */
void scatter_taps(const float *taps, float *y, long n, long h, long w, long c) {
    memset(y, 0, n * h * w * c * sizeof(float));
    for (long m = 0; m < n; m++, y += h * w * c)
        for (long i = 0; i < h; i++)
            for (long j = 0; j < w; j++, taps += 9 * c) {
                span s = span_of(j, w);
                for (long p = i ? 0 : 1; p < 3 && i + p - 1 < h; p++) {
                    const float *from = taps + (3 * p + s.place) * c;
                    float *to = y + ((i + p - 1) * w + s.first) * c;
                    for (long k = 0; k < s.count * c; k++) to[k] += from[k];
                }
            }
}
