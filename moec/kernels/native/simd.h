// One dtype, seen as what AVX-512 multiplies: a *word* is what one of 16 lanes takes at a time, 4 bytes: two bfloat16 (vdpbf16ps
// adds both products) or one float. A *line* is 16 words. float16 is converted to float when it is read; everything sums in float.
//
//   Element  how tensors hold a number        Kept  how scratch holds it, ready to be multiplied
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moec {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline __mmask16 first16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask32 first32(long n) { return n >= 32 ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1; }
using Word = uint32_t;

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

inline __m512 widen(__m256i bf16_bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits), 16));
}
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

// The first n of 16 numbers at p, p + step, ...; zeros after them. step is 1 or 2; nothing past the n-th is read.
inline __m512 load16(const float* p, long n, long step = 1) {
  if (step == 1) return _mm512_maskz_loadu_ps(first16(n), p);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512 a = _mm512_maskz_loadu_ps(first16(2 * n - 1), p), b = _mm512_maskz_loadu_ps(first16(2 * n - 17), p + 16);
  return _mm512_permutex2var_ps(a, even, b);
}
inline __m512 load16(const bf16* p, long n, long step = 1) {
  if (step == 1) return widen(_mm256_maskz_loadu_epi16(first16(n), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_loadu_epi16(first32(2 * n - 1), p), 16));
}
inline __m512 load16(const fp16* p, long n, long step = 1) {
  if (step == 1) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), p));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_maskz_loadu_epi16(first32(2 * n - 1), p)));
}

// The first n of 16 numbers to p; each rounded once, to nearest even.
inline void store16(float* p, long n, __m512 v) { _mm512_mask_storeu_ps(p, first16(n), v); }
inline void store16(bf16* p, long n, __m512 v) { _mm256_mask_storeu_epi16(p, first16(n), narrow(v)); }
inline void store16(fp16* p, long n, __m512 v) {
  _mm256_mask_storeu_epi16(p, first16(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// a0 b0 a1 b1 ...: 2n numbers to p.
template <class E>
inline void store_pairs(E* p, long n, __m512 a, __m512 b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  store16(p, 2 * n, _mm512_permutex2var_ps(a, low, b));
  store16(p + 16, 2 * n - 16, _mm512_permutex2var_ps(a, high, b));
}

struct Float32 {
  using Element = float;
  using Kept = float;
  using Words = Float32;  // whose words these are: what only multiplies is compiled for that
  static constexpr long per_word = 1, per_line = 16;
  static __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static __m512i full_line(const float* p) { return _mm512_loadu_si512(p); }
  static __m512i line(const float* p, long n, long step) { return _mm512_castps_si512(load16(p, n, step)); }
  // Words of 16 columns from the rows of one word: here one row.
  static __m512i words(const float* a, const float*, long n, long step) { return _mm512_castps_si512(load16(a, n, step)); }
  // The same of 32 columns.
  static void full_words(Word* to, const float* a, const float*) {
    _mm512_store_si512(to, full_line(a));
    _mm512_store_si512(to + 16, full_line(a + 16));
  }
  static void keep(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};

struct Float16 : Float32 {
  using Element = fp16;
  static __m512i full_line(const fp16* p) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
  }
  static __m512i line(const fp16* p, long n, long step) { return _mm512_castps_si512(load16(p, n, step)); }
  static void full_words(Word* to, const fp16* a, const fp16*) {
    _mm512_store_si512(to, full_line(a));
    _mm512_store_si512(to + 16, full_line(a + 16));
  }
  static __m512i words(const fp16* a, const fp16*, long n, long step) { return _mm512_castps_si512(load16(a, n, step)); }
  static __m512i words(const float* a, const float*, long n, long step) { return Float32::words(a, a, n, step); }
};

struct BFloat16 {
  using Element = bf16;
  using Kept = bf16;
  using Words = BFloat16;
  static constexpr long per_word = 2, per_line = 32;
  static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static __m512i full_line(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512i line(const bf16* p, long n, long step) {
    if (step == 1) return _mm512_maskz_loadu_epi16(first32(n), p);
    __m512i a = _mm512_maskz_loadu_epi16(first32(2 * n - 1), p), b = _mm512_maskz_loadu_epi16(first32(2 * n - 33), p + 32);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
  }
  // Each word holds a column of row a and of row b; b may be null: a row of zeros.
  static __m512i words(const bf16* a, const bf16* b, long n, long step) {
    if (step == 2) {
      __m512i low = _mm512_maskz_loadu_epi16(first32(2 * n - 1), a);
      __m512i high = b ? _mm512_maskz_loadu_epi16(first32(2 * n - 1), b) : _mm512_setzero_si512();
      return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
    }
    __m256i low = _mm256_maskz_loadu_epi16(first16(n), a);
    __m256i high = b ? _mm256_maskz_loadu_epi16(first16(n), b) : _mm256_setzero_si256();
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static void full_words(Word* to, const bf16* a, const bf16* b) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
    _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(first, high, second));
  }
  static void keep(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
};

// 16 x 16 words: lane j of load(i) goes to lane i of to + j * pitch.
template <class Load>
[[gnu::always_inline]] inline void transpose16(uint32_t* to, long pitch, Load&& load) {
  __m512i r[16], t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512i a = load(i), b = load(i + 1);
    t[i] = _mm512_unpacklo_epi32(a, b);
    t[i + 1] = _mm512_unpackhi_epi32(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_store_si512(to + j * pitch, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(to + (4 + j) * pitch, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(to + (8 + j) * pitch, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_store_si512(to + (12 + j) * pitch, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// The sum over the lanes of each of four vectors.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  auto half = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
  __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

}  // namespace moec
