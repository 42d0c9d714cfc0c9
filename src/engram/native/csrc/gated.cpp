// With v the value, k the key, q the hidden state and a the mask's factor of a position:
//   score = (k w_k) . (q w_q) / (rms(k) rms(q) sqrt(d)),  u = a gate(score) v,  n = u w_n / rms(u),  y = u + silu(sum over taps of w n)
#include "gated.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "loops.h"
#include "parallel.h"

namespace engram {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 256;       // positions of a sequence that are worked on in a row
constexpr int64_t kParts = 32;        // sums over positions are taken in at most so many parts, which are then added up in order
constexpr int64_t kGrain = 1 << 15;   // values per thread at least

struct GateSums {
  float key, query, product;
};

ENGRAM_CLONES GateSums gate_sums(const float* __restrict key, const float* __restrict query, const float* __restrict weight, int64_t n) {
  float k[kLanes] = {}, q[kLanes] = {}, p[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float a = key[i + lane], b = query[i + lane];
      k[lane] += a * a;
      q[lane] += b * b;
      p[lane] += (a * weight[i + lane]) * b;
    }
  }
  for (; i < n; ++i) {
    k[i % kLanes] += key[i] * key[i];
    q[i % kLanes] += query[i] * query[i];
    p[i % kLanes] += (key[i] * weight[i]) * query[i];
  }
  GateSums sums{};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums.key += k[lane];
    sums.query += q[lane];
    sums.product += p[lane];
  }
  return sums;
}

// e^x within two units in the last place, in a form that compilers can turn into vector instructions: 2^n times a polynomial.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;  // a NaN stays one
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer ends up in the lowest bits
  const float n = shifted - 12582912.0f, r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float sum = 1.98756915e-4f;
  sum = sum * r + 1.39819995e-3f;
  sum = sum * r + 8.33345205e-3f;
  sum = sum * r + 4.16657962e-2f;
  sum = sum * r + 1.66666657e-1f;
  sum = sum * r + 0.5f;
  return (sum * r * r + r + 1.0f) * from_bits((bits_of(shifted) + 127u) << 23);
}

ENGRAM_CLONES void scale(const float* __restrict x, float by, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * by;
}

ENGRAM_CLONES void multiply(const float* __restrict a, const float* __restrict b, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

ENGRAM_CLONES void add(const float* __restrict x, float* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

ENGRAM_CLONES void add_tap(const float* __restrict value, float factor, const float* __restrict weight, float* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += (value[i] * factor) * weight[i];
}

// out = opening * value + silu(sum)
ENGRAM_CLONES void finish(const float* __restrict value, float opening, const float* __restrict sum, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = value[i] * opening + sum[i] / (1.0f + exponential(-sum[i]));
}

ENGRAM_CLONES void silu_backward(const float* __restrict gradient, const float* __restrict sum, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float sigmoid = 1.0f / (1.0f + exponential(-sum[i]));
    out[i] = gradient[i] * sigmoid * (1.0f + sum[i] * (1.0f - sigmoid));
  }
}

// Through one tap: to its input, and to its weight.
ENGRAM_CLONES void tap_backward(const float* __restrict gradient, const float* __restrict weight, const float* __restrict value, float factor,
                                float* __restrict to_input, float* __restrict to_weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to_input[i] += gradient[i] * weight[i];
    to_weight[i] += (value[i] * factor) * gradient[i];
  }
}

// to_value += opening * (direct + inverse * smoothed - pull * value)
ENGRAM_CLONES void value_backward(const float* __restrict direct, const float* __restrict smoothed, const float* __restrict value,
                                  float opening, float inverse, float pull, float* __restrict to_value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to_value[i] += opening * (direct[i] + (inverse * smoothed[i] - pull * value[i]));
}

struct GateFactors {
  float across, key, query;
};

ENGRAM_CLONES void gate_backward(const float* __restrict key, const float* __restrict query, const float* __restrict weight,
                                 const GateFactors& by, float* __restrict to_key, float* __restrict to_query, float* __restrict to_weight,
                                 int64_t n) {
  const GateFactors f = by;  // a copy: the compiler cannot know that stores leave it alone
  for (int64_t i = 0; i < n; ++i) {
    const float across = f.across * weight[i];
    to_key[i] += across * query[i] - f.key * key[i];
    to_query[i] = across * key[i] - f.query * query[i];
    to_weight[i] += (f.across * key[i]) * query[i];
  }
}

uint8_t* place(const Numbers& numbers, int64_t at) { return numbers.data + at * (numbers.half ? 2 : 4); }

// Numbers as floats: where they lie, or in `scratch`.
const float* load(const Numbers& numbers, int64_t at, float* scratch, int64_t n) {
  if (!numbers.half) return reinterpret_cast<const float*>(place(numbers, at));
  load_bfloat16(reinterpret_cast<const uint16_t*>(place(numbers, at)), scratch, n);
  return scratch;
}

// Where floats may be written that `store` then puts in place.
float* room(const Numbers& numbers, int64_t at, float* scratch) {
  return numbers.half || !numbers.data ? scratch : reinterpret_cast<float*>(place(numbers, at));
}

void store(const Numbers& numbers, int64_t at, const float* from, int64_t n) {
  if (numbers.half && numbers.data) store_bfloat16(from, reinterpret_cast<uint16_t*>(place(numbers, at)), n);
}

// The part of a task that its positions share.
class Shape {
 public:
  explicit Shape(const Gated& task) : task(task), dim(task.dim), width((1 + task.keys) * task.dim) {
    reach = task.taps ? (task.kernel - 1) * task.dilation : 0;
    chunks = (task.length + kChunk - 1) / kChunk;
    units = task.batch * chunks;
    parts = std::min(units, kParts);
    gate_weights.resize(task.keys * dim);
    for (int64_t key = 0; key < task.keys; ++key)
      multiply(task.norms[key], task.norms[task.keys + key], gate_weights.data() + key * dim, dim);
    if (!task.taps) return;
    taps.resize(task.branches * task.kernel * dim);
    for (int64_t m = 0; m < task.branches; ++m)
      for (int64_t tap = 0; tap < task.kernel; ++tap)
        for (int64_t i = 0; i < dim; ++i)
          taps[(m * task.kernel + tap) * dim + i] = task.taps[(m * dim + i) * task.kernel + tap] * conv_norm(m)[i];
  }

  const float* conv_norm(int64_t m) const { return task.norms[2 * task.keys + m]; }
  const float* tap(int64_t m, int64_t tap) const { return taps.data() + (m * task.kernel + tap) * dim; }
  int64_t key_of(int64_t m) const { return task.keys > 1 ? m : 0; }
  float mask(int64_t position) const { return task.mask ? task.mask[position] : 1.0f; }
  // How many positions before (or after) position `at` of a sequence a tap reads.
  int64_t back(int64_t tap) const { return (task.kernel - 1 - tap) * task.dilation; }
  int64_t threads(int64_t wanted) const {
    return std::max<int64_t>(1, std::min(wanted, task.batch * task.length * task.branches * dim / kGrain));
  }
  // Calls fn(sequence, first position, end) for the units of parts [begin, end) and says which part they belong to.
  template <class Fn>
  void each_unit(int64_t begin, int64_t end, const Fn& fn) const {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
        const int64_t first = unit % chunks * kChunk;
        fn(part, unit / chunks, first, std::min(first + kChunk, task.length));
      }
  }

  const Gated& task;
  int64_t dim, width, reach, chunks, units, parts;
  std::vector<float> gate_weights, taps;  // products of norm weights; weights of taps times those of their input's norm
};

// Values of one sequence as floats: the last few that were brought.
class Values {
 public:
  Values(const Shape& shape) : shape_(shape), rows_(shape.reach + 1), scratch_(shape.task.projected.half ? rows_ * shape.dim : 0) {}
  void start(int64_t sequence) { first_ = sequence * shape_.task.length; }
  void bring(int64_t at) {
    if (at >= 0 && shape_.task.projected.half) load(shape_.task.projected, (first_ + at) * shape_.width, slot(at), shape_.dim);
  }
  const float* at(int64_t at) {
    return shape_.task.projected.half ? slot(at) : reinterpret_cast<const float*>(place(shape_.task.projected, (first_ + at) * shape_.width));
  }

 private:
  float* slot(int64_t at) { return scratch_.data() + at % rows_ * shape_.dim; }
  const Shape& shape_;
  int64_t rows_, first_ = 0;
  std::vector<float> scratch_;
};

void open_gates(const Shape& shape, Kept* kept, int64_t begin, int64_t end) {
  const Gated& task = shape.task;
  const int64_t dim = shape.dim;
  std::vector<float> scratch(3 * dim);
  for (int64_t position = begin; position < end; ++position) {
    const float* value = load(task.projected, position * shape.width, scratch.data(), dim);
    const double square = task.taps ? sum_of_products(value, value, dim) : 0.0f;
    const float* key = nullptr;
    for (int64_t m = 0; m < task.branches; ++m) {
      const int64_t own = shape.key_of(m), at = position * task.branches + m;
      if (m == 0 || task.keys > 1) key = load(task.projected, position * shape.width + (1 + own) * dim, scratch.data() + dim, dim);
      const float* query = load(task.streams, at * dim, scratch.data() + 2 * dim, dim);
      const GateSums sums = gate_sums(key, query, shape.gate_weights.data() + own * dim, dim);
      Kept& now = kept[at];
      now.key = inverse_rms(sums.key, dim, task.norm_eps);
      now.query = inverse_rms(sums.query, dim, task.norm_eps);
      const double score = static_cast<double>(sums.product) * now.key * now.query / std::sqrt(static_cast<double>(dim));
      now.score = static_cast<float>(score);
      now.gate = static_cast<float>(open_gate(score, task.signed_sqrt));
      const double opening = static_cast<double>(now.gate) * shape.mask(position);
      now.conv = task.taps ? inverse_rms(opening * opening * square, dim, task.conv_eps) : 0.0f;
    }
  }
}

// What the taps make of position `at` of a sequence.
void convolve(const Shape& shape, const Kept* kept, int64_t sequence, int64_t at, int64_t m, Values& values, float* sum) {
  std::fill(sum, sum + shape.dim, 0.0f);
  for (int64_t tap = 0; tap < shape.task.kernel; ++tap) {
    const int64_t from = at - shape.back(tap), position = sequence * shape.task.length + from;
    if (from < 0) continue;
    const Kept& then = kept[position * shape.task.branches + m];
    add_tap(values.at(from), then.gate * shape.mask(position) * then.conv, shape.tap(m, tap), sum, shape.dim);
  }
}

// The sums over positions of one part: per key dim, per stream kernel * dim.
struct Sums {
  float *gate, *taps;
};

class Backward {
 public:
  Backward(const Shape& shape, const Kept* kept, const GatedGradients& gradients)
      : shape_(shape), kept_(kept), to_(gradients), values_(shape), slots_(shape.reach + 1), dim_(shape.dim),
        ring_(shape.task.taps ? shape.task.branches * slots_ * dim_ : 0), scratch_(6 * dim_ + shape.width) {}

  // A position's gradients are complete when those of the last position that reads it are known. Rows are passed in the order of memory.
  void run(int64_t sequence, int64_t first, int64_t end, Sums sums) {
    last_ = std::min(end + shape_.reach, shape_.task.length) - 1;
    values_.start(sequence);
    for (int64_t at = std::max<int64_t>(0, first - shape_.reach); at < first; ++at) values_.bring(at);
    for (int64_t at = first; at < end + shape_.reach; ++at) {
      if (at <= last_) {
        values_.bring(at);
        through_silu(sequence, at);
      }
      if (at - shape_.reach >= first) complete(sequence, at - shape_.reach, sums);
    }
  }

 private:
  void through_silu(int64_t sequence, int64_t at) {
    const Gated& task = shape_.task;
    if (!task.taps) return;
    float* sum = scratch_.data() + 4 * dim_;
    for (int64_t m = 0; m < task.branches; ++m) {
      const float* gradient = load(to_.out, ((sequence * task.length + at) * task.branches + m) * dim_, scratch_.data(), dim_);
      convolve(shape_, kept_, sequence, at, m, values_, sum);
      silu_backward(gradient, sum, ring(m, at), dim_);
    }
  }

  void complete(int64_t sequence, int64_t at, Sums sums) {
    const int64_t position = sequence * shape_.task.length + at;
    float* to_projected = room(to_.projected, position * shape_.width, scratch_.data() + 6 * dim_);
    std::fill(to_projected, to_projected + shape_.width, 0.0f);
    for (int64_t m = 0; m < shape_.task.branches; ++m) complete_stream(position, at, m, to_projected, sums);
    store(to_.projected, position * shape_.width, to_projected, shape_.width);
  }

  void complete_stream(int64_t position, int64_t at, int64_t m, float* to_projected, Sums sums) {
    const Gated& task = shape_.task;
    const int64_t row = position * task.branches + m, own = shape_.key_of(m);
    const Kept& now = kept_[row];
    float *loaded = scratch_.data(), *smoothed = loaded + 3 * dim_;  // gradient, query, its gradient, smoothed, sum, key; projected
    const float *value = values_.at(at), *gradient = load(to_.out, row * dim_, loaded, dim_);
    const float mask = shape_.mask(position), opening = now.gate * mask;
    float to_opening = sum_of_products(gradient, value, dim_), pull = 0;
    std::fill(smoothed, smoothed + dim_, 0.0f);
    if (task.taps) {
      for (int64_t tap = 0; tap < task.kernel; ++tap) {
        const int64_t later = at + shape_.back(tap);
        if (later > last_) continue;
        tap_backward(ring(m, later), shape_.tap(m, tap), value, opening * now.conv, smoothed,
                     sums.taps + (m * task.kernel + tap) * dim_, dim_);
      }
      // A norm takes away the part of a gradient that points along its input; of the gate's, all but what epsilon lets through.
      const float along = sum_of_products(smoothed, value, dim_), cubed = now.conv * now.conv * now.conv;
      to_opening += along * cubed * static_cast<float>(task.conv_eps);
      pull = opening * opening * cubed * along / static_cast<float>(dim_);
    }
    value_backward(gradient, smoothed, value, opening, now.conv, pull, to_projected, dim_);
    const float to_score = to_opening * mask * gate_slope(now.score, now.gate, task.signed_sqrt);
    const float towards = to_score * now.score / static_cast<float>(dim_);
    const GateFactors by{to_score * now.key * now.query / std::sqrt(static_cast<float>(dim_)), towards * now.key * now.key,
                         towards * now.query * now.query};
    const float* key = load(task.projected, position * shape_.width + (1 + own) * dim_, loaded + 5 * dim_, dim_);
    const float* query = load(task.streams, row * dim_, loaded + dim_, dim_);
    float* to_query = room(to_.streams, row * dim_, loaded + 2 * dim_);
    gate_backward(key, query, shape_.gate_weights.data() + own * dim_, by, to_projected + (1 + own) * dim_, to_query,
                  sums.gate + own * dim_, dim_);
    store(to_.streams, row * dim_, to_query, dim_);
  }

  // Gradients of the sums over taps at a position and those just after.
  float* ring(int64_t m, int64_t at) { return ring_.data() + (m * slots_ + at % slots_) * dim_; }

  const Shape& shape_;
  const Kept* kept_;
  const GatedGradients& to_;
  Values values_;
  int64_t slots_, dim_, last_ = 0;  // no position after the last sends gradients back
  std::vector<float> ring_, scratch_;
};

// From sums over positions to the gradients of the weights that were multiplied with each other.
void finish_weights(const Shape& shape, const GatedGradients& to, const Sums& sums) {
  const Gated& task = shape.task;
  const int64_t dim = shape.dim;
  for (int64_t key = 0; key < task.keys; ++key) {
    multiply(sums.gate + key * dim, task.norms[task.keys + key], to.norms[key], dim);
    multiply(sums.gate + key * dim, task.norms[key], to.norms[task.keys + key], dim);
  }
  if (!task.taps) return;
  for (int64_t m = 0; m < task.branches; ++m) {
    float* to_norm = to.norms[2 * task.keys + m];
    for (int64_t i = 0; i < dim; ++i) {
      float sum = 0;
      for (int64_t tap = 0; tap < task.kernel; ++tap) {
        const int64_t at = (m * dim + i) * task.kernel + tap;
        const float of_tap = sums.taps[(m * task.kernel + tap) * dim + i];
        to.taps[at] = of_tap * shape.conv_norm(m)[i];
        sum += of_tap * task.taps[at];
      }
      to_norm[i] = sum;
    }
  }
}

}  // namespace

void gated_forward(const Gated& task, Numbers out, Kept* kept, int64_t threads) {
  const Shape shape(task);
  const int64_t dim = shape.dim, most = shape.threads(threads);
  parallel_for(task.batch * task.length, 1, most, [&](int64_t begin, int64_t end) { open_gates(shape, kept, begin, end); });
  parallel_for(shape.parts, 1, most, [&](int64_t begin, int64_t end) {
    Values values(shape);
    std::vector<float> scratch(2 * dim);
    shape.each_unit(begin, end, [&](int64_t, int64_t sequence, int64_t first, int64_t stop) {
      values.start(sequence);
      for (int64_t at = std::max<int64_t>(0, first - shape.reach); at < first; ++at) values.bring(at);
      for (int64_t at = first; at < stop; ++at) {
        values.bring(at);
        for (int64_t m = 0; m < task.branches; ++m) {
          const int64_t position = sequence * task.length + at, row = position * task.branches + m;
          const float opening = kept[row].gate * shape.mask(position);
          float* to = room(out, row * dim, scratch.data());
          if (task.taps) {
            convolve(shape, kept, sequence, at, m, values, scratch.data() + dim);
            finish(values.at(at), opening, scratch.data() + dim, to, dim);
          } else {
            scale(values.at(at), opening, to, dim);
          }
          store(out, row * dim, to, dim);
        }
      }
    });
  });
}

void gated_backward(const Gated& task, const Kept* kept, const GatedGradients& gradients, int64_t threads) {
  const Shape shape(task);
  const int64_t of_gate = task.keys * shape.dim, size = of_gate + (task.taps ? task.branches * task.kernel * shape.dim : 0);
  std::vector<float> sums(std::max<int64_t>(shape.parts, 1) * size);
  const auto sums_of = [&](int64_t part) { return Sums{sums.data() + part * size, sums.data() + part * size + of_gate}; };
  parallel_for(shape.parts, 1, shape.threads(threads), [&](int64_t begin, int64_t end) {
    Backward backward(shape, kept, gradients);
    shape.each_unit(begin, end, [&](int64_t part, int64_t sequence, int64_t first, int64_t stop) {
      backward.run(sequence, first, stop, sums_of(part));
    });
  });
  for (int64_t part = 1; part < shape.parts; ++part) add(sums.data() + part * size, sums.data(), size);
  finish_weights(shape, gradients, sums_of(0));
}

}  // namespace engram
