// Gate and convolution of whole sequences, forward and backward: what training does with projected rows.
#pragma once
#include <cstdint>

namespace engram {

// Rows of float32 or bfloat16; arithmetic is float32 either way.
struct Numbers {
  uint8_t* data;
  bool half;
};

// What the backward pass needs to know about one position of one stream: the gate's score, the gate, and what the norms of key, query and
// gated value multiply by.
struct Kept {
  float score, gate, key, query, conv;
};

struct Gated {
  int64_t batch, length, branches, dim, keys;  // one key per stream, or one for all
  Numbers projected;                           // [batch, length, (1 + keys) * dim]: the value, then the keys
  Numbers streams;                             // [batch, length, branches, dim], hidden states
  const float* mask;                           // [batch, length], factors of the value; may be null
  const float* const* norms;                   // weights [dim]: of the keys, of as many queries, of the convolution's input per stream
  double norm_eps;
  bool signed_sqrt;
  const float* taps;  // [branches * dim, kernel]; null without a convolution, and then nothing below is read
  int64_t kernel, dilation;
  double conv_eps;
};

// Gradients that are not wanted are null.
struct GatedGradients {
  Numbers out;        // of the result, in the type of the streams
  Numbers projected;  // the same shapes and types as in Gated
  Numbers streams;
  float* const* norms;  // in the order of Gated
  float* taps;
};

// Writes the result, in shape and type of the streams, and `kept` [batch, length, branches].
void gated_forward(const Gated& task, Numbers out, Kept* kept, int64_t threads);

// Sums over positions are taken in an order that depends on the shapes alone, never on the threads.
void gated_backward(const Gated& task, const Kept* kept, const GatedGradients& gradients, int64_t threads);

}  // namespace engram
