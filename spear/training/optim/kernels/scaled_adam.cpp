// One ScaledAdam update of one tensor in two passes over memory: the sums it needs, then the update itself.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {
constexpr int kLanes = 64;
constexpr int64_t kBlock = 8192;  // elements summed in single precision before they join the total
}  // namespace

// sums[0..2] = sum of p g, of g g, of p p.
extern "C" void spear_moments(const float* p, const float* g, int64_t count, double* sums) {
  sums[0] = sums[1] = sums[2] = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock), whole = begin + (end - begin) / kLanes * kLanes;
    float pg[kLanes] = {}, gg[kLanes] = {}, pp[kLanes] = {};
    for (int64_t i = begin; i < whole; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        const float a = p[i + k], b = g[i + k];
        pg[k] += a * b;
        gg[k] += b * b;
        pp[k] += a * a;
      }
    }
    for (int64_t i = whole; i < end; ++i) {
      pg[0] += p[i] * g[i];
      gg[0] += g[i] * g[i];
      pp[0] += p[i] * p[i];
    }
    for (int k = 0; k < kLanes; ++k) {
      sums[0] += pg[k];
      sums[1] += gg[k];
      sums[2] += pp[k];
    }
  }
}

// v <- beta2 v + (1 - beta2) g^2;  delta <- beta1 delta + pull p + step g / (sqrt(v correction) + eps);  p <- p + delta, with g times clip.
extern "C" void spear_scaled_adam(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ delta, float* __restrict__ v, int64_t count,
                                  float beta1, float beta2, float eps, float correction, float clip, float pull, float step) {
  const float rest = 1.0f - beta2;
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = g[i] * clip;
    const float moment = beta2 * v[i] + rest * gradient * gradient;
    const float change = beta1 * delta[i] + pull * p[i] + step * gradient / (std::sqrt(moment * correction) + eps);
    v[i] = moment;
    delta[i] = change;
    p[i] += change;
  }
}
