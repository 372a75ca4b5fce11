// The activations of a body and their derivatives, 16 floats at a time.
//
// exp reduces to [-ln2/2, ln2/2] and takes a polynomial. Polynomials are fitted by least squares at Chebyshev points.
// gelu needs the normal distribution function with a small *relative* error in its left tail: see `normal_cdf`.
#pragma once

#include "simd.h"

namespace moec {

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, IDENTITY };

// (exp(r) - 1 - r) / r^2, lowest power first: relative error of exp 4e-9 before rounding.
constexpr float EXP[] = {0.499999879f, 0.166665125f, 0.0416696463f, 0.00836962837f, 0.00137488231f};
// p, highest power first: error 7e-8 before rounding.
constexpr float ERFC[] = {0.165894857f,  -0.793495343f, 1.4178156f,  -1.03754196f,  0.196092122f,
                          -0.141949599f, 0.0818991603f, 0.377082193f, 0.999701213f, -1.26549817f};

inline __m512 all(float v) { return _mm512_set1_ps(v); }

// max and min return their second operand where one is NaN, so NaN passes.
inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(all(105.f), _mm512_max_ps(all(-105.f), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, all(0.693145752f), x);  // ln 2 in two parts, the first with zeros at its end
  r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), r);
  __m512 p = all(EXP[4]);
  for (int i = 3; i >= 0; i--) p = _mm512_fmadd_ps(p, r, all(EXP[i]));
  p = _mm512_fmadd_ps(p, r, all(1.f));
  p = _mm512_fmadd_ps(p, r, all(1.f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(all(1.f), _mm512_add_ps(all(1.f), e));
}

// The probability that a standard normal variable is below x. For z = |x| / sqrt(2) and t = 1 / (1 + z/2),
// erfc(z) = t * exp(-z*z + p(t)), with p a polynomial on [0.124, 1]: small relative error everywhere.
inline __m512 normal_cdf(__m512 x) {
  __m512 z = _mm512_min_ps(all(14.f), _mm512_mul_ps(_mm512_abs_ps(x), all(0.707106781f)));
  __m512 t = _mm512_div_ps(all(1.f), _mm512_fmadd_ps(z, all(0.5f), all(1.f)));
  __m512 p = all(ERFC[0]);
  for (int i = 1; i < int(sizeof(ERFC) / sizeof(*ERFC)); i++) p = _mm512_fmadd_ps(p, t, all(ERFC[i]));
  // z*z rounds, and the exponent is large: its rounding error is added back
  __m512 square = _mm512_mul_ps(z, z), rest = _mm512_fmsub_ps(z, z, square);
  __m512 tail = _mm512_mul_ps(_mm512_mul_ps(all(0.5f), t), exp16(_mm512_sub_ps(_mm512_sub_ps(p, square), rest)));
  return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), all(1.f), tail);
}

// tanh-gelu is x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
inline __m512 gelu_gate(__m512 x) {
  __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(0.044715f), all(1.f));
  return sigmoid(_mm512_mul_ps(_mm512_mul_ps(x, all(1.59576912f)), cubic));
}

inline __m512 activate(Activation kind, __m512 x) {
  switch (kind) {
    case SILU: return _mm512_div_ps(x, _mm512_add_ps(all(1.f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    case GELU: return _mm512_mul_ps(x, normal_cdf(x));
    case GELU_TANH: return _mm512_mul_ps(x, gelu_gate(x));
    case RELU: return _mm512_max_ps(_mm512_setzero_ps(), x);
    case RELU2: {
      __m512 r = _mm512_max_ps(_mm512_setzero_ps(), x);
      return _mm512_mul_ps(r, r);
    }
    case IDENTITY: break;
  }
  return x;
}

inline __m512 derivative(Activation kind, __m512 x) {
  const __m512 zero = _mm512_setzero_ps(), one = all(1.f);
  switch (kind) {
    case SILU: {
      __m512 s = sigmoid(x);
      return _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    }
    case GELU: {
      __m512 density = _mm512_mul_ps(all(0.39894228f), exp16(_mm512_mul_ps(_mm512_mul_ps(x, x), all(-0.5f))));
      return _mm512_fmadd_ps(x, density, normal_cdf(x));
    }
    case GELU_TANH: {  // with s = sigmoid(2u): s + x * s * (1 - s) * 2u'
      __m512 s = gelu_gate(x);
      __m512 slope = _mm512_mul_ps(all(1.59576912f), _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(0.134145f), one));
      return _mm512_fmadd_ps(_mm512_mul_ps(x, slope), _mm512_mul_ps(s, _mm512_sub_ps(one, s)), s);
    }
    case RELU2: return _mm512_mul_ps(all(2.f), _mm512_max_ps(zero, x));
    case RELU:
    case IDENTITY: break;
  }
  return one;
}

// Of the pre-activation x, from that of the activation. Where relu is flat nothing passes, not even infinity; where x is NaN all does.
inline __m512 gradient(Activation kind, __m512 grad, __m512 x) {
  const __m512 product = kind == RELU ? grad : _mm512_mul_ps(grad, derivative(kind, x));
  if (kind != RELU && kind != RELU2) return product;
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), product);
}

}  // namespace moec
