// Large matrices of bfloat16, transposed.

#include <algorithm>

#include "products.h"

using namespace sash;

// (N, C), its rows ldf apart, to (C, N), whose rows are ldt apart and aligned to 64 bytes. What is whole goes past the
// processor's cache, into which no such matrix fits.
extern "C" void transpose(bf16* to, long ldt, const bf16* from, long ldf, long N, long C, int n_threads) {
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for
        for (long n = 0; n < N; n += 32)
            for (long c = 0; c < C; c += 32)
                if (n + 32 <= N && c + 32 <= C) {
                    __m512i rows[32];
                    transpose32(rows, from + n * ldf + c, ldf);
                    for (long i = 0; i < 32; i++) _mm512_stream_si512((__m512i*)(to + (c + i) * ldt + n), rows[i]);
                } else {
                    for (long i = c; i < std::min(c + 32, C); i++)
                        for (long t = n; t < std::min(n + 32, N); t++) to[i * ldt + t] = from[t * ldf + i];
                }
        _mm_sfence();  // before other threads read what went past the cache
    }
}
