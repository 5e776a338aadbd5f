// Causal attention over windows and sinks in bfloat16, forward and backward (the ideas of 2205.14135).
//
// A thread goes from the last query block of a KV head to the first. The key blocks that these still see are in a ring
// of slots, which for a window stays in the processor's cache; sinks have slots of their own. A key block is done with
// the first query block that stands at it.
//
// Scores are held as keys x queries: the maximum and the sum of a query are lanes of vectors, and what one product
// gives is laid out as the next one takes it. So only blocks of queries and keys are transposed, each once.
//
// Dimensions: B batch, H query heads, K KV heads, R = H / K, T keys, Tq queries, D head_dim.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "window.h"

using namespace sash;

namespace {

constexpr float HIDDEN = -1e30;  // the score of what is not seen: nothing, once something is seen

struct Forward {
    const Call& call;
    Blocks blocks;
    const long D;
    bf16 *keys, *values, *rows, *queries, *p;  // values transposed, queries transposed and paired, p paired
    float *scores, *out, *most, *sum, *factor;

    Forward(const Call& call, Memory& memory) : call(call), blocks(call), D(call.D) {
        for (bf16** x : {&keys, &values}) *x = memory.take<bf16>(blocks.n_slots() * BLOCK * D);
        for (bf16** x : {&rows, &queries}) *x = memory.take<bf16>(BLOCK * D);
        for (float** x : {&most, &sum, &factor}) *x = memory.take<float>(BLOCK);
        p = memory.take<bf16>(BLOCK * BLOCK);
        scores = memory.take<float>(BLOCK * BLOCK);
        out = memory.take<float>(D * BLOCK);
    }

    void open(long b, long h, long j) {
        long slot = blocks.slot(j) * BLOCK * D;
        copy_rows(keys + slot, call.k.at(b, h, j * BLOCK), call.k.time, blocks.n_keys(j), D);
        copy_rows(rows, call.v.at(b, h, j * BLOCK), call.v.time, blocks.n_keys(j), D);
        transpose(values + slot, rows, D);
    }

    void block(long b, long h, long i) {
        long n = blocks.n_queries(i);
        copy_rows(rows, call.q.at(b, h, i * BLOCK), call.q.time, n, D);
        transpose_paired(queries, rows, D);
        std::fill_n(most, BLOCK, HIDDEN);
        std::fill_n(sum, BLOCK, 0);
        std::fill_n(out, D * BLOCK, 0);
        blocks.each(i, [&](long j) {
            long slot = blocks.slot(j) * BLOCK * D, m = blocks.n_rows(i, j);
            product<false>(scores, BLOCK, keys + slot, D, queries, BLOCK, m, BLOCK, D);
            probabilities(i, j, m);
            product<true>(out, BLOCK, values + slot, BLOCK, p, BLOCK, D, BLOCK, m);
        });
        float* lse = call.lse + (b * call.H + h) * call.Tq + i * BLOCK;
        for (long t = 0; t < n; t++) lse[t] = most[t] + std::log2(sum[t]);
        for (long t = 0; t < BLOCK; t++) factor[t] = 1 / sum[t];
        put_transposed(call.out.at(b, h, i * BLOCK), call.out.time, out, factor, n, D);
    }

    void close(long, long, long) {}

   private:
    // Scores of m keys -> p, not yet divided by their sum; what there was before is scaled to the new maximum.
    void probabilities(long i, long j, long m) {
        const bool all = blocks.all_seen(i, j);
        const __m512 scale = _mm512_set1_ps(call.scale * M_LOG2E), hidden = _mm512_set1_ps(HIDDEN);
        for (long t = 0; t < BLOCK; t += LANES) {
            __m512 before = _mm512_load_ps(most + t), now = before, total = _mm512_setzero_ps();
            for (long k = 0; k < m; k++) {
                float* x = scores + k * BLOCK + t;
                __mmask16 seen = all ? 0xffff : blocks.see(i, t, j * BLOCK + k);
                __m512 scaled = _mm512_mask_mul_ps(hidden, seen, _mm512_load_ps(x), scale);
                now = _mm512_max_ps(now, scaled);
                _mm512_store_ps(x, scaled);
            }
            for (long k = 0; k < m; k += 2) {
                const float* x = scores + k * BLOCK + t;
                __m512 p0 = exp2(_mm512_sub_ps(_mm512_load_ps(x), now));
                __m512 p1 = exp2(_mm512_sub_ps(_mm512_load_ps(x + BLOCK), now));
                total = _mm512_add_ps(total, _mm512_add_ps(p0, p1));
                _mm512_store_si512(p + k * BLOCK + 2 * t, paired(rounded(p0, p1)));
            }
            __m512 f = exp2(_mm512_sub_ps(before, now));
            _mm512_store_ps(factor + t, f);
            _mm512_store_ps(most + t, now);
            _mm512_store_ps(sum + t, _mm512_fmadd_ps(_mm512_load_ps(sum + t), f, total));
        }
        for (long d = 0; d < D; d++)
            for (long t = 0; t < BLOCK; t++) out[d * BLOCK + t] *= factor[t];
    }
};

struct Backward {
    const Call& call;
    Blocks blocks;
    const long D;
    bf16 *keys, *values, *keys_t, *rows, *q_t, *q_pairs, *grad_t, *grad_pairs, *p, *ds, *ds_pairs;
    float *sum_k, *sum_v, *scores, *dp, *dq, *delta, *lse, *scale;

    Backward(const Call& call, Memory& memory) : call(call), blocks(call), D(call.D) {
        for (bf16** x : {&keys, &values, &keys_t}) *x = memory.take<bf16>(blocks.n_slots() * BLOCK * D);
        for (float** x : {&sum_k, &sum_v}) *x = memory.take<float>(blocks.n_slots() * BLOCK * D);
        for (bf16** x : {&rows, &q_t, &q_pairs, &grad_t, &grad_pairs}) *x = memory.take<bf16>(BLOCK * D);
        for (bf16** x : {&p, &ds, &ds_pairs}) *x = memory.take<bf16>(BLOCK * BLOCK);
        for (float** x : {&scores, &dp}) *x = memory.take<float>(BLOCK * BLOCK);
        for (float** x : {&delta, &lse, &scale}) *x = memory.take<float>(BLOCK);
        dq = memory.take<float>(D * BLOCK);
    }

    void open(long b, long h, long j) {
        long slot = blocks.slot(j) * BLOCK * D;
        copy_rows(keys + slot, call.k.at(b, h, j * BLOCK), call.k.time, blocks.n_keys(j), D);
        copy_rows(values + slot, call.v.at(b, h, j * BLOCK), call.v.time, blocks.n_keys(j), D);
        transpose(keys_t + slot, keys + slot, D);
        std::fill_n(sum_k + slot, BLOCK * D, 0);
        std::fill_n(sum_v + slot, BLOCK * D, 0);
    }

    void block(long b, long h, long i) {
        long n = blocks.n_queries(i);
        copy_rows(rows, call.grad.at(b, h, i * BLOCK), call.grad.time, n, D);
        transpose_paired(grad_t, rows, D);
        pair_rows(grad_pairs, rows, D);
        std::fill_n(delta, BLOCK, 0);
        for (long t = 0; t < n; t++) delta[t] = product_of_rows(rows + t * D, call.out.at(b, h, i * BLOCK + t));
        copy_rows(rows, call.q.at(b, h, i * BLOCK), call.q.time, n, D);
        transpose_paired(q_t, rows, D);
        pair_rows(q_pairs, rows, D);
        std::fill_n(lse, BLOCK, 0);
        std::copy_n(call.lse + (b * call.H + h) * call.Tq + i * BLOCK, n, lse);
        std::fill_n(dq, D * BLOCK, 0);
        blocks.each(i, [&](long j) {
            long slot = blocks.slot(j) * BLOCK * D, m = blocks.n_rows(i, j);
            product<false>(scores, BLOCK, keys + slot, D, q_t, BLOCK, m, BLOCK, D);
            product<false>(dp, BLOCK, values + slot, D, grad_t, BLOCK, m, BLOCK, D);
            gradients_of_scores(i, j, m);
            product<true>(sum_v + slot, D, p, BLOCK, grad_pairs, D, m, D, BLOCK);
            product<true>(sum_k + slot, D, ds, BLOCK, q_pairs, D, m, D, BLOCK);
            product<true>(dq, BLOCK, keys_t + slot, BLOCK, ds_pairs, BLOCK, D, BLOCK, m);
        });
        std::fill_n(scale, BLOCK, call.scale);
        put_transposed(call.dq.at(b, h, i * BLOCK), call.dq.time, dq, scale, n, D);
    }

    void close(long b, long h, long j) {
        long slot = blocks.slot(j) * BLOCK * D, n = blocks.n_keys(j);
        put_rows(call.dk.at(b, h, j * BLOCK), call.dk.time, sum_k + slot, call.scale, n, D);
        put_rows(call.dv.at(b, h, j * BLOCK), call.dv.time, sum_v + slot, 1, n, D);
    }

   private:
    float product_of_rows(const bf16* x, const bf16* y) const {
        __m512 total = _mm512_setzero_ps();
        for (long d = 0; d < D; d += LANES) total = _mm512_fmadd_ps(widened(x + d), widened(y + d), total);
        return _mm512_reduce_add_ps(total);
    }

    // Scores and dp of m keys -> p and ds.
    void gradients_of_scores(long i, long j, long m) {
        const bool all = blocks.all_seen(i, j);
        const __m512 scale = _mm512_set1_ps(call.scale * M_LOG2E);
        for (long t = 0; t < BLOCK; t += LANES) {
            __m512 of_query = _mm512_load_ps(lse + t), less = _mm512_load_ps(delta + t);
            for (long k = 0; k < m; k += 2) {
                long at = k * BLOCK + t;
                __m512 p_[2], ds_[2];
                for (long e = 0; e < 2; e++) {
                    __mmask16 seen = all ? 0xffff : blocks.see(i, t, j * BLOCK + k + e);
                    __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + at + e * BLOCK), scale, of_query);
                    p_[e] = _mm512_maskz_mov_ps(seen, exp2(x));
                    ds_[e] = _mm512_mul_ps(p_[e], _mm512_sub_ps(_mm512_load_ps(dp + at + e * BLOCK), less));
                }
                put_two_rows(p + at, rounded(p_[0], p_[1]));
                put_two_rows(ds + at, rounded(ds_[0], ds_[1]));
                _mm512_store_si512(ds_pairs + at + t, paired(rounded(ds_[0], ds_[1])));
            }
        }
    }

    static void put_two_rows(bf16* to, __m512i both) {
        _mm256_store_si256((__m256i*)to, _mm512_castsi512_si256(both));
        _mm256_store_si256((__m256i*)(to + BLOCK), _mm512_extracti64x4_epi64(both, 1));
    }
};

template <class Pass>
long bytes_of_thread(const Call& call) {
    Memory memory{nullptr};
    Pass(call, memory);
    return memory.used;
}

template <class Pass>
void run(const Call& call, char* memory, int n_threads) {
    const Blocks blocks(call);
    const long R = call.H / call.K, n_bytes = bytes_of_thread<Pass>(call);
    const long n_blocks = blocks.count(), heads = call.K * call.parts;
    const long length = (n_blocks + call.pieces - 1) / call.pieces, pieces = (n_blocks + length - 1) / length;
#pragma omp parallel num_threads(n_threads)
    {
        Memory own{memory + omp_get_thread_num() * n_bytes};
        Pass pass(call, own);
        _tile_loadconfig(&CONFIG);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < call.B * heads * pieces; task++) {
            long piece = task % pieces, head = task / pieces % heads, b = task / pieces / heads;
            long h = head / call.parts, part = head % call.parts;
            long first = piece * length, last = std::min(first + length, n_blocks) - 1;
            long opened = blocks.newest(last) + 1, closed = opened;
            for (long j = 0; j < blocks.n_sinks; j++) pass.open(b, h, j);
            for (long i = last; i >= first; i--) {
                while (opened > blocks.oldest(i)) pass.open(b, h, --opened);
                for (long r = R * part / call.parts; r < R * (part + 1) / call.parts; r++) pass.block(b, h * R + r, i);
                long still = i == 0 ? opened : std::max(opened, blocks.newest(i - 1) + 1);
                while (closed > still) pass.close(b, head, --closed);
            }
            for (long j = 0; j < blocks.n_sinks; j++) pass.close(b, head, j);
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

long call_bytes() { return sizeof(Call); }

// Asks the system for AMX; 0 where it is granted.
long ask() { return syscall(SYS_arch_prctl, 0x1023, 18); }

// Bytes of `memory`, aligned to 64, that each thread needs.
long forward_bytes(const Call* call) { return bytes_of_thread<Forward>(*call); }
long backward_bytes(const Call* call) { return bytes_of_thread<Backward>(*call); }

void forward(const Call* call, char* memory, int n_threads) { run<Forward>(*call, memory, n_threads); }
void backward(const Call* call, char* memory, int n_threads) { run<Backward>(*call, memory, n_threads); }
}
