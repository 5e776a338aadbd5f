// Products and layouts of blocks of bfloat16, with AMX and AVX-512.
//
// Of both factors of a product AMX takes pairs along the dimension that is summed over: of the first as it lies,
// (M, K), of the second the two rows of a pair in turns, (K / 2, N, 2), which is called paired here.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sash {

using bf16 = uint16_t;
constexpr long BLOCK = 64;  // queries and keys of a block
constexpr long LANES = 16;  // float32 of a vector; also rows of an AMX tile, and pairs in one of its rows

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const TileConfig CONFIG;  // not a local one: gcc 12 does not know that all of it is read

// c (M, N) = or += a (M, K) times b (K, N) paired. All are multiples of 32; ld is the length of a row.
template <bool add>
void product(float* c, long ldc, const bf16* a, long lda, const bf16* b, long ldb, long M, long N, long K) {
    asm volatile("" ::: "memory");  // gcc 12 does not know either that tiles are loaded from memory
    for (long m = 0; m < M; m += 32)
        for (long n = 0; n < N; n += 32) {
            float *upper = c + m * ldc + n, *lower = upper + 16 * ldc;
            if (add) {
                _tile_loadd(0, upper, ldc * 4);
                _tile_loadd(1, upper + 16, ldc * 4);
                _tile_loadd(2, lower, ldc * 4);
                _tile_loadd(3, lower + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long k = 0; k < K; k += 32) {
                _tile_loadd(4, a + m * lda + k, lda * 2);
                _tile_loadd(6, b + k * ldb + 2 * n, ldb * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + k * ldb + 2 * n + 32, ldb * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + (m + 16) * lda + k, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, ldc * 4);
            _tile_stored(1, upper + 16, ldc * 4);
            _tile_stored(2, lower, ldc * 4);
            _tile_stored(3, lower + 16, ldc * 4);
        }
}

// 2 to the power of each, to 3e-7 of it.
inline __m512 exp2(__m512 x) {
    __m512 rest = _mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF)), y = _mm512_set1_ps(1.8775767e-3f);
    for (float c : {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, x);
}

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 widened(const bf16* x) { return widened(_mm256_loadu_si256((const __m256i*)x)); }

// Two vectors in bfloat16, one behind the other.
inline __m512i rounded(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// The same with the values of both in turns.
inline __m512i paired(__m512i ab) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, ab);
}

// 16 rows of 16 pairs, ld apart, transposed.
inline void transpose16(__m512i* to, const bf16* from, long ld) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * ld);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int e = 0; e < 2; e++) {
            a[i + 2 * e] = _mm512_unpacklo_epi64(b[i + e], b[i + e + 2]);
            a[i + 2 * e + 1] = _mm512_unpackhi_epi64(b[i + e], b[i + e + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int e = 0; e < 4; e++) {
            b[i + e] = _mm512_shuffle_i32x4(a[i + e], a[i + e + 4], 0x88);
            b[i + e + 4] = _mm512_shuffle_i32x4(a[i + e], a[i + e + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        to[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        to[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    }
}

// 32 rows of 32, ld apart, transposed.
inline void transpose32(__m512i* to, const bf16* from, long ld) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                          22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi16(1));
    __m512i upper[16], lower[16];
    transpose16(upper, from, ld);
    transpose16(lower, from + 16 * ld, ld);
    for (int i = 0; i < 16; i++) {
        to[2 * i] = _mm512_permutex2var_epi16(upper[i], even, lower[i]);
        to[2 * i + 1] = _mm512_permutex2var_epi16(upper[i], odd, lower[i]);
    }
}

// n rows of D -> (BLOCK, D); the rest are zeros.
inline void copy_rows(bf16* to, const bf16* from, long ld, long n, long D) {
    for (long t = 0; t < n; t++) memcpy(to + t * D, from + t * ld, D * sizeof(bf16));
    memset(to + n * D, 0, (BLOCK - n) * D * sizeof(bf16));
}

// (BLOCK, D) -> (D / 2, BLOCK, 2), which is its transpose, paired.
inline void transpose_paired(bf16* to, const bf16* from, long D) {
    for (long t = 0; t < BLOCK; t += 16)
        for (long d = 0; d < D; d += 32) {
            __m512i pairs[16];
            transpose16(pairs, from + t * D + d, D);
            for (long i = 0; i < 16; i++) _mm512_storeu_si512(to + (d + 2 * i) * BLOCK + 2 * t, pairs[i]);
        }
}

// (BLOCK, D) -> (D, BLOCK).
inline void transpose(bf16* to, const bf16* from, long D) {
    for (long t = 0; t < BLOCK; t += 32)
        for (long d = 0; d < D; d += 32) {
            __m512i rows[32];
            transpose32(rows, from + t * D + d, D);
            for (long i = 0; i < 32; i++) _mm512_storeu_si512(to + (d + i) * BLOCK + t, rows[i]);
        }
}

// (BLOCK, D) -> (BLOCK / 2, D, 2).
inline void pair_rows(bf16* to, const bf16* from, long D) {
    for (long t = 0; t < BLOCK; t += 2)
        for (long d = 0; d < D; d += LANES) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + t * D + d)));
            __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + (t + 1) * D + d)));
            _mm512_storeu_si512(to + t * D + 2 * d, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
}

// (n, D) of float32 times a factor -> rows.
inline void put_rows(bf16* to, long ld, const float* from, float factor, long n, long D) {
    __m512 f = _mm512_set1_ps(factor);
    for (long t = 0; t < n; t++)
        for (long d = 0; d < D; d += 2 * LANES) {
            const float* x = from + t * D + d;
            __m512 a = _mm512_mul_ps(_mm512_load_ps(x), f), b = _mm512_mul_ps(_mm512_load_ps(x + LANES), f);
            _mm512_storeu_si512(to + t * ld + d, rounded(a, b));
        }
}

// (D, BLOCK) of float32, each column times its factor -> n rows of D.
inline void put_transposed(bf16* to, long ld, const float* from, const float* factors, long n, long D) {
    alignas(64) bf16 pairs[16 * 32];
    for (long t = 0; t < n; t += 16)
        for (long d = 0; d < D; d += 32) {
            __m512 f = _mm512_load_ps(factors + t);
            for (long i = 0; i < 16; i++) {
                const float* x = from + (d + 2 * i) * BLOCK + t;
                __m512 a = _mm512_mul_ps(_mm512_load_ps(x), f), b = _mm512_mul_ps(_mm512_load_ps(x + BLOCK), f);
                _mm512_store_si512(pairs + i * 32, paired(rounded(a, b)));
            }
            __m512i rows[16];
            transpose16(rows, pairs, 32);
            for (long i = 0; i < 16 && t + i < n; i++) _mm512_storeu_si512(to + (t + i) * ld + d, rows[i]);
        }
}

}  // namespace sash
