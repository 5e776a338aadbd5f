// Cross-entropy of rows of logits in bfloat16, and its gradient in their place.

#include <algorithm>
#include <cmath>

#include "products.h"

using namespace sash;

namespace {

// f(place, which of its 16 logits there are, those times the logarithm of e to base 2), over a row.
template <class F>
void each(const bf16* row, long V, F f) {
    for (long v = 0; v < V; v += LANES) {
        __mmask16 there = V - v < LANES ? (1 << (V - v)) - 1 : 0xffff;
        __m512 x = widened(_mm256_maskz_loadu_epi16(there, row + v));
        f(v, there, _mm512_mul_ps(x, _mm512_set1_ps(M_LOG2E)));
    }
}

// The logarithm of the sum of exp(logit), base 2.
float log_z(const bf16* row, long V) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    each(row, V, [&](long, __mmask16 there, __m512 x) { most = _mm512_mask_max_ps(most, there, most, x); });
    const float of_all = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(of_all);
    each(row, V, [&](long, __mmask16 there, __m512 x) {
        sum = _mm512_mask_add_ps(sum, there, sum, exp2(_mm512_sub_ps(x, most)));
    });
    return of_all + std::log2(_mm512_reduce_add_ps(sum));
}

void put(bf16* to, __mmask16 there, __m512 x) { _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(x)); }

}  // namespace

// (n, V) logits -> the loss of each row, 0 where its target is `ignored`. With what each row's loss weighs, logits
// become the gradient, to which z_loss log(Z)^2 adds its own.
extern "C" void loss_and_grad(float* losses, bf16* logits, const int64_t* targets, const float* weights, long n, long V,
                               long ignored, float z_loss, int n_threads) {
#pragma omp parallel for num_threads(n_threads)
    for (long i = 0; i < n; i++) {
        bf16* row = logits + i * V;
        const bool real = targets[i] != ignored;
        const long goal = std::max<int64_t>(targets[i], 0);
        const float z = log_z(row, V), x = _mm512_cvtss_f32(widened(_mm256_set1_epi16(row[goal])));
        losses[i] = real * (z - x * float(M_LOG2E)) * float(M_LN2);
        if (!weights) continue;
        const float weight = real * weights[i], of_all = weight * (1 + 2 * z_loss * z * float(M_LN2));
        each(row, V, [&](long v, __mmask16 there, __m512 x) {
            put(row + v, there, _mm512_mul_ps(exp2(_mm512_sub_ps(x, _mm512_set1_ps(z))), _mm512_set1_ps(of_all)));
        });
        put(row + goal, 1, _mm512_set1_ps(std::exp2(x * float(M_LOG2E) - z) * of_all - weight));
    }
}
