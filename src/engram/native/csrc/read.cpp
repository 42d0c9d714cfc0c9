#include "read.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "loops.h"

namespace engram {
namespace {

constexpr int64_t kLanes = 16;  // as in loops.cpp

// Sum over a[i] * wa[i] * b[i] * wb[i].
ENGRAM_CLONES float weighted_product(const float* __restrict a, const float* __restrict wa, const float* __restrict b,
                                     const float* __restrict wb, int64_t n) {
  float parts[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) parts[lane] += (a[i + lane] * wa[i + lane]) * (b[i + lane] * wb[i + lane]);
  for (; i < n; ++i) parts[i % kLanes] += (a[i] * wa[i]) * (b[i] * wb[i]);
  float sum = 0;
  for (float part : parts) sum += part;
  return sum;
}

ENGRAM_CLONES void scale(const float* __restrict x, float factor, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

ENGRAM_CLONES void scale_by(const float* __restrict x, float factor, const float* __restrict weight, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

ENGRAM_CLONES void add_tap(const float* __restrict x, const float* __restrict weight, int64_t kernel, float* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i] * weight[i * kernel];
}

float gate(const ReadStream& task, int64_t position) {
  const float* key = task.key + position * task.projected_stride;
  const float* query = task.stream + position * task.stream_stride;
  const float product = weighted_product(key, task.norm_key, query, task.norm_query, task.dim);
  const double score = static_cast<double>(product) * inverse_rms(key, task.dim, task.norm_eps) *
                       inverse_rms(query, task.dim, task.norm_eps) / std::sqrt(static_cast<double>(task.dim));
  return static_cast<float>(open_gate(score, task.signed_sqrt));
}

// The convolution's input `back` positions before `position` of a sequence; null before the start.
const float* input_at(const ReadStream& task, int64_t row, int64_t position, int64_t back) {
  const int64_t at = position - back;
  if (at >= 0) return task.normed + (row * task.length + at) * task.normed_stride;
  if (!task.past || task.past_length + at < 0) return nullptr;
  return task.past + row * task.past_batch_stride + (task.past_length + at) * task.past_stride;
}

}  // namespace

void read_stream(const ReadStream& task) {
  for (int64_t position = 0; position < task.batch * task.length; ++position) {
    float* out = task.out + position * task.out_stride;
    scale(task.value + position * task.projected_stride, gate(task, position), out, task.dim);
    if (task.conv)
      scale_by(out, inverse_rms(out, task.dim, task.conv_eps), task.norm_conv, task.normed + position * task.normed_stride, task.dim);
  }
  if (!task.conv) return;
  std::vector<float> sum(task.dim);
  for (int64_t row = 0; row < task.batch; ++row) {
    for (int64_t position = 0; position < task.length; ++position) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t tap = 0; tap < task.kernel; ++tap) {
        const float* input = input_at(task, row, position, (task.kernel - 1 - tap) * task.dilation);
        if (input) add_tap(input, task.conv + tap, task.kernel, sum.data(), task.dim);
      }
      float* out = task.out + (row * task.length + position) * task.out_stride;
      for (int64_t i = 0; i < task.dim; ++i) out[i] += sum[i] / (1.0f + std::exp(-sum[i]));
    }
  }
}

}  // namespace engram
