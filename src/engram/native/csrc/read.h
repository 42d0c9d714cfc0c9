// Gate and convolution of a few positions in one pass: what a decoding step does with projected rows.
#pragma once
#include <cstdint>

namespace engram {

// One residual stream of one layer; positions are batch-major, strides count floats from one position to the next.
struct ReadStream {
  int64_t batch, length, dim;
  const float* value;   // projected rows
  const float* key;
  int64_t projected_stride;
  const float* stream;  // hidden states
  int64_t stream_stride;
  const float* norm_key;    // [dim], weights of the key's and the query's norm
  const float* norm_query;
  double norm_eps;
  bool signed_sqrt;
  float* out;  // receives gate * value, and the convolution added to it
  int64_t out_stride;
  const float* conv;  // [dim, kernel]; null without a convolution, and then nothing below is read
  int64_t kernel, dilation;
  const float* norm_conv;  // [dim]
  double conv_eps;
  float* normed;  // receives the convolution's inputs
  int64_t normed_stride;
  const float* past;  // inputs of the positions before, [batch, past_length, dim]; may be null
  int64_t past_length, past_batch_stride, past_stride;
};

void read_stream(const ReadStream& task);

}  // namespace engram
