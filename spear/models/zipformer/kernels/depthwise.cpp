// Gradient of the weight of a depthwise convolution with stride 1, frames and pixels before channels.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 32;  // columns that stay in the first-level cache while all taps visit them

// sum[c] += x[k][c] * g[k][c] over `count` pixels of `stride` floats each, for W channels held in registers.
template <int W>
inline void accumulate(const float* x, const float* g, float* sum, int64_t count, int64_t stride) {
  float held[W];
  std::memcpy(held, sum, sizeof held);
  for (int64_t k = 0; k < count; ++k, x += stride, g += stride) {
    for (int c = 0; c < W; ++c) held[c] += x[c] * g[c];
  }
  std::memcpy(sum, held, sizeof held);
}

inline void accumulate_all(const float* x, const float* g, float* sum, int64_t count, int64_t channels) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) accumulate<64>(x + c, g + c, sum + c, count, channels);
  for (; c + 16 <= channels; c += 16) accumulate<16>(x + c, g + c, sum + c, count, channels);
  for (; c < channels; ++c) accumulate<1>(x + c, g + c, sum + c, count, channels);
}

}  // namespace

// x (n, rows, cols, channels), g (n, out_rows, out_cols, channels) -> out (kernel_rows, kernel_cols, channels), which is set to
// sum over n, r, c of g[n, r, c] x[n, r + i - pad_rows, c + j - pad_cols], zeros outside x.
extern "C" void spear_depthwise_weight_grad(
    const float* x, const float* g, float* out, int64_t n, int64_t rows, int64_t cols, int64_t out_rows, int64_t out_cols, int64_t channels,
    int64_t kernel_rows, int64_t kernel_cols, int64_t pad_rows, int64_t pad_cols) {
  std::fill(out, out + kernel_rows * kernel_cols * channels, 0.0f);
  for (int64_t item = 0; item < n; ++item) {
    for (int64_t r = 0; r < out_rows; ++r) {
      const float* gradient = g + (item * out_rows + r) * out_cols * channels;
      for (int64_t begin = 0; begin < out_cols; begin += kBlock) {
        const int64_t end = std::min(out_cols, begin + kBlock);
        for (int64_t i = std::max<int64_t>(0, pad_rows - r); i < std::min(kernel_rows, rows + pad_rows - r); ++i) {
          const float* line = x + (item * rows + r + i - pad_rows) * cols * channels;
          for (int64_t j = 0; j < kernel_cols; ++j) {
            const int64_t shift = j - pad_cols;
            const int64_t first = std::max(begin, -shift), last = std::min(end, cols - shift);
            if (first >= last) continue;
            float* sum = out + (i * kernel_cols + j) * channels;
            accumulate_all(line + (first + shift) * channels, gradient + first * channels, sum, last - first, channels);
          }
        }
      }
    }
  }
}
