// The Swoosh activations in one pass over memory: softplus(z) - 0.08 z - c with z = x - shift, and its derivative times a gradient.
// Plain loops without branches, which the compiler turns into vector code; no fast-math, so that NaN stays NaN.

#include <cstdint>
#include <cstring>

namespace {

constexpr float kSlope = 0.08f;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return from_bits(uint32_t(*p) << 16); }
inline void store(float* p, float value) { *p = value; }

// To the nearest bfloat16, ties to even; NaN keeps its highest mantissa bit.
inline void store(uint16_t* p, float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  *p = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// exp(-|z|): the argument in halves of ln 2 around a power of two, and a polynomial for the rest.
inline float exp_minus_abs(float z) {
  float t = from_bits(to_bits(z) | 0x80000000u);
  t = t < -87.0f ? -87.0f : t;
  const float shifted = t * 1.44269504f + 12582912.0f;  // the sum rounds to a whole number in the low bits
  const float whole = shifted - 12582912.0f;
  const float r = (t - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

// log(1 + e) for e in [0, 1], by the series of 2 atanh(e / (2 + e)).
inline float log1p_unit(float e) {
  const float s = e / (2.0f + e);
  const float q = s * s;
  float p = 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

template <typename T>
void forward(const T* x, T* out, int64_t count, float shift, float constant) {
  for (int64_t i = 0; i < count; ++i) {
    const float z = load(x + i) - shift;
    const float positive = z > 0.0f ? z : 0.0f;
    store(out + i, positive + log1p_unit(exp_minus_abs(z)) - kSlope * z - constant);
  }
}

template <typename T>
void backward(const T* x, const T* grad, T* out, int64_t count, float shift) {
  for (int64_t i = 0; i < count; ++i) {
    const float z = load(x + i) - shift;
    const float e = exp_minus_abs(z);
    const float sigmoid = (z >= 0.0f ? 1.0f : e) / (1.0f + e);
    store(out + i, (sigmoid - kSlope) * load(grad + i));
  }
}

}  // namespace

extern "C" {
void spear_swoosh_f32(const float* x, float* out, int64_t count, float shift, float constant) { forward(x, out, count, shift, constant); }
void spear_swoosh_bf16(const uint16_t* x, uint16_t* out, int64_t count, float shift, float constant) { forward(x, out, count, shift, constant); }
void spear_swoosh_grad_f32(const float* x, const float* grad, float* out, int64_t count, float shift) { backward(x, grad, out, count, shift); }
void spear_swoosh_grad_bf16(const uint16_t* x, const uint16_t* grad, uint16_t* out, int64_t count, float shift) { backward(x, grad, out, count, shift); }
}
