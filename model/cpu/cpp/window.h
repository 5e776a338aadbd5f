// What a call is given, and which keys its blocks of queries see.

#pragma once

#include <algorithm>

#include "products.h"

namespace sash {

struct Rows {  // of a tensor (B, heads, T, D): strides in elements, of the last dimension 1
    bf16* data;
    long batch, head, time;
    bf16* at(long b, long h, long t) const { return data + b * batch + h * head + t * time; }
};

struct Call {  // the same in model/kernels/amx.py
    long B, H, K, Tq, T, D, window, n_sink;
    long parts, pieces;  // a thread takes one of so many parts of R, and one of about so many pieces of Tq
    float scale;
    float* lse;  // (B, H, Tq), base 2
    Rows q, k, v, out, grad, dq, dk, dv;
};

// Which blocks of keys the queries of block i see, and in which slots those are.
struct Blocks {
    const Call& call;
    const long n_sinks, n_ring;

    explicit Blocks(const Call& call)
        : call(call), n_sinks((call.n_sink + BLOCK - 1) / BLOCK), n_ring(most_at_a_time()) {}

    long count() const { return (call.Tq + BLOCK - 1) / BLOCK; }
    long n_queries(long i) const { return std::min(BLOCK, call.Tq - i * BLOCK); }
    long n_keys(long j) const { return std::min(BLOCK, call.T - j * BLOCK); }
    long position(long i) const { return call.T - call.Tq + i * BLOCK; }  // of its first query
    long newest(long i) const { return (position(i) + n_queries(i) - 1) / BLOCK; }
    long oldest(long i) const { return std::max(n_sinks, std::max(0L, position(i) - call.window + 1) / BLOCK); }
    long n_slots() const { return n_sinks + n_ring; }
    long slot(long j) const { return j < n_sinks ? j : n_sinks + j % n_ring; }

    template <class F>
    void each(long i, F visit) const {
        for (long j = 0; j < std::min(n_sinks, newest(i) + 1); j++) visit(j);
        for (long j = oldest(i); j <= newest(i); j++) visit(j);
    }

    // How many of its keys: where there are only sinks to see, as few as a product takes.
    long n_rows(long i, long j) const {
        bool behind = (j + 1) * BLOCK <= position(i) - call.window + 1;
        return behind ? (std::min(BLOCK, call.n_sink - j * BLOCK) + 31) / 32 * 32 : BLOCK;
    }

    bool all_seen(long i, long j) const {
        return (j + 1) * BLOCK <= position(i) + 1 && position(i) + BLOCK - j * BLOCK <= call.window;
    }

    // The 16 queries from t on of block i that see a key.
    __mmask16 see(long i, long t, long key) const {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i back = _mm512_add_epi32(lane, _mm512_set1_epi32(position(i) + t - key));
        __mmask16 causal = _mm512_cmpge_epi32_mask(back, _mm512_setzero_si512());
        return key < call.n_sink ? causal : causal & _mm512_cmplt_epi32_mask(back, _mm512_set1_epi32(call.window));
    }

   private:
    long most_at_a_time() const {
        long n = 1;
        for (long i = 0; i < count(); i++) n = std::max(n, newest(i) - oldest(i) + 1);
        return n;
    }
};

// Memory of a thread, handed out from the front; from nowhere on it tells how much is needed.
struct Memory {
    char* base;
    long used = 0;

    template <class T>
    T* take(long n) {
        char* at = base + used;
        used += (n * sizeof(T) + 63) / 64 * 64;
        return (T*)at;
    }
};

}  // namespace sash
