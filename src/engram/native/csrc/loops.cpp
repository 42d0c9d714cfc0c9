#include "loops.h"

#include <algorithm>
#include <cmath>

#include "clones.h"

namespace engram {
namespace {

constexpr double kSignedSqrtFloor = 1e-6;
constexpr int64_t kLanes = 16;  // sums run in so many parts, which the compiler keeps in one or two registers

}  // namespace

ENGRAM_CLONES void load_bfloat16(const uint16_t* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
}

ENGRAM_CLONES void store_bfloat16(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = nearest_bfloat16(bits_of(from[i]));
}

ENGRAM_CLONES float sum_of_products(const float* __restrict a, const float* __restrict b, int64_t n) {
  float parts[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) parts[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) parts[i % kLanes] += a[i] * b[i];
  float sum = 0;
  for (float part : parts) sum += part;
  return sum;
}

float inverse_rms(double sum_of_squares, int64_t n, double eps) {
  return static_cast<float>(1.0 / std::sqrt(sum_of_squares / static_cast<double>(n) + eps));
}

float inverse_rms(const float* x, int64_t n, double eps) { return inverse_rms(static_cast<double>(sum_of_products(x, x, n)), n, eps); }

double open_gate(double score, bool signed_sqrt) {
  if (signed_sqrt) {
    const double root = std::sqrt(std::max(std::fabs(score), kSignedSqrtFloor));
    score = score > 0 ? root : score < 0 ? -root : score;
  }
  return 1.0 / (1.0 + std::exp(-score));
}

float gate_slope(float score, float gate, bool signed_sqrt) {
  const float magnitude = std::fabs(score), slope = gate * (1 - gate);
  if (!signed_sqrt || std::isnan(score)) return slope;
  return magnitude < static_cast<float>(kSignedSqrtFloor) ? 0.0f : slope * 0.5f / std::sqrt(magnitude);  // flat below the floor
}

}  // namespace engram
