// Loops over the values of one row that several kernels share.
#pragma once
#include <cstdint>
#include <cstring>

namespace engram {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t nearest_bfloat16(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

void load_bfloat16(const uint16_t* __restrict from, float* __restrict to, int64_t n);
void store_bfloat16(const float* __restrict from, uint16_t* __restrict to, int64_t n);

float sum_of_products(const float* __restrict a, const float* __restrict b, int64_t n);

// 1 / sqrt(mean of squares + eps), taken in double: from the sum of squares, or from the values.
float inverse_rms(double sum_of_squares, int64_t n, double eps);
float inverse_rms(const float* x, int64_t n, double eps);

// What a gate makes of its score: sigmoid(s(score)), s the signed square root of |score| >= 1e-6 or the identity. A NaN stays one, zero stays zero.
double open_gate(double score, bool signed_sqrt);

// The derivative of open_gate, from its result.
float gate_slope(float score, float gate, bool signed_sqrt);

}  // namespace engram
