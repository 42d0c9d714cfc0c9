#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "loops.h"
#include "parallel.h"

#if !defined(__GNUC__)
#define __builtin_prefetch(...) ((void)0)
#endif

namespace engram {
namespace {

constexpr int64_t kAhead = 16;    // rows requested before they are needed
constexpr int64_t kGrain = 2048;  // rows per thread at least
constexpr int64_t kLanes = 16;    // partial sums: the compiler may not reorder a sum of floats, so the order is written down

inline int64_t value_bytes(RowType type) { return type == RowType::kFloat32 ? 4 : 2; }

// What tells one row's random bits from another's; see engram/optim/rounding.py, which makes the same ones.
inline uint32_t rounding_key(uint64_t seed, int64_t row) {
  uint64_t x = static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u + seed;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(x ^ (x >> 31));
}

ENGRAM_CLONES void store_bfloat16_by_chance(const float* __restrict from, uint16_t* __restrict to, int64_t dim, uint32_t key) {
  for (int64_t i = 0; i < dim; ++i) {
    uint32_t x = key + static_cast<uint32_t>(i) * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    const uint32_t random = (x ^ (x >> 16)) >> 16, bits = bits_of(from[i]), magnitude = bits & 0x7fffffff;
    // Beyond the largest bfloat16 a carry would make infinity of a finite value.
    const uint32_t cut = magnitude > 0x7f7f0000 ? (bits & 0x80000000) | 0x7f7f0000 : bits + random;
    to[i] = magnitude >= 0x7f800000 ? nearest_bfloat16(bits) : static_cast<uint16_t>(cut >> 16);
  }
}

ENGRAM_CLONES void scale_into(const float* __restrict from, float by, float* __restrict to, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * by;
}

ENGRAM_CLONES void add_float32(const float* __restrict from, float* __restrict to, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) to[i] += from[i];
}

ENGRAM_CLONES void add_bfloat16(const uint16_t* __restrict from, float* __restrict to, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) to[i] += from_bits(static_cast<uint32_t>(from[i]) << 16);
}

ENGRAM_CLONES float mean_square(const float* values, int64_t dim) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  for (; i < dim; ++i) lanes[i % kLanes] += values[i] * values[i];
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total / static_cast<float>(dim);
}

ENGRAM_CLONES void adam(float* __restrict row, const float* __restrict gradient, float* __restrict first, float* __restrict second,
                        int64_t dim, const StepNumbers& with) {
  const StepNumbers n = with;  // a copy: the compiler cannot know that stores to the row leave it alone
  for (int64_t i = 0; i < dim; ++i) {
    const float g = gradient[i], m = first[i] + n.rest1 * (g - first[i]), v = n.beta2 * second[i] + n.rest2 * g * g;
    first[i] = m;
    second[i] = v;
    row[i] = n.keep * row[i] - n.step_size * (m / (std::sqrt(v) + n.eps));
  }
}

ENGRAM_CLONES void rowwise_adam(float* __restrict row, const float* __restrict gradient, float* __restrict first, float root,
                                int64_t dim, const StepNumbers& with) {
  const StepNumbers n = with;
  for (int64_t i = 0; i < dim; ++i) {
    const float m = first[i] + n.rest1 * (gradient[i] - first[i]);
    first[i] = m;
    row[i] = n.keep * row[i] - n.step_size * (m / root);
  }
}

ENGRAM_CLONES void rowwise_adagrad(float* __restrict row, const float* __restrict gradient, float root, int64_t dim,
                                   const StepNumbers& with) {
  const StepNumbers n = with;
  for (int64_t i = 0; i < dim; ++i) row[i] = n.keep * row[i] - n.step_size * (gradient[i] / root);
}

// The sum of a row's gradients in float32: where it lies if there is one only, else in `sum`.
const float* summed(const RowGroups& groups, int64_t i, const uint8_t* gradients, RowType type, int64_t dim, float* sum) {
  const int64_t begin = groups.order ? groups.starts[i] : i, end = groups.order ? groups.starts[i + 1] : i + 1;
  const auto at = [&](int64_t k) { return gradients + (groups.order ? groups.order[k] : k) * dim * value_bytes(type); };
  if (type == RowType::kFloat32) {
    const float* only = reinterpret_cast<const float*>(at(begin));
    if (end == begin + 1) return only;
    std::memcpy(sum, only, dim * 4);
    for (int64_t k = begin + 1; k < end; ++k) add_float32(reinterpret_cast<const float*>(at(k)), sum, dim);
  } else {
    load_bfloat16(reinterpret_cast<const uint16_t*>(at(begin)), sum, dim);
    for (int64_t k = begin + 1; k < end; ++k) add_bfloat16(reinterpret_cast<const uint16_t*>(at(k)), sum, dim);
  }
  return sum;
}

// Changes one row, which is in float32 here, and its state.
void update(const RowStep& step, int64_t slot, const float* gradient, float* row) {
  const StepNumbers& n = step.numbers;
  float* first = step.first + slot * step.dim;
  if (step.state == RowState::kAdam) return adam(row, gradient, first, step.second + slot * step.dim, step.dim, n);
  float& of_row = step.second[slot];
  const float square = mean_square(gradient, step.dim);
  if (step.state == RowState::kRowwiseAdam) {
    of_row = n.beta2 * of_row + n.rest2 * square;
    rowwise_adam(row, gradient, first, std::sqrt(of_row) + n.eps, step.dim, n);
  } else {
    of_row += square;
    rowwise_adagrad(row, gradient, std::sqrt(of_row) + n.eps, step.dim, n);
  }
}

inline void prefetch_bytes(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const uint8_t*>(data) + at, 1, 3);
}

void prefetch(const RowGroups& groups, const RowStep& step, int64_t i) {
  const int64_t row_bytes = step.dim * value_bytes(step.type), slot = step.slots[i];
  prefetch_bytes(step.table + groups.rows[i] * row_bytes, row_bytes);
  prefetch_bytes(step.gradients + (groups.order ? groups.order[groups.starts[i]] : i) * row_bytes, row_bytes);
  if (step.first) prefetch_bytes(step.first + slot * step.dim, step.dim * 4);
  if (step.state == RowState::kAdam) prefetch_bytes(step.second + slot * step.dim, step.dim * 4);
  else prefetch_bytes(step.second + slot, 4);
}

void step_part(const RowGroups& groups, const RowStep& step, int64_t begin, int64_t end) {
  std::vector<float> scratch(2 * step.dim);
  float *sum = scratch.data(), *current = sum + step.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch(groups, step, i + kAhead);
    const float* gradient = summed(groups, i, step.gradients, step.type, step.dim, sum);
    if (step.numbers.sign != 1) {
      scale_into(gradient, step.numbers.sign, current, step.dim);
      std::memcpy(sum, current, step.dim * 4);
      gradient = sum;
    }
    uint8_t* row = step.table + groups.rows[i] * step.dim * value_bytes(step.type);
    if (step.type == RowType::kFloat32) {
      update(step, step.slots[i], gradient, reinterpret_cast<float*>(row));
      continue;
    }
    uint16_t* stored = reinterpret_cast<uint16_t*>(row);
    load_bfloat16(stored, current, step.dim);
    update(step, step.slots[i], gradient, current);
    if (step.stochastic) store_bfloat16_by_chance(current, stored, step.dim, rounding_key(step.seed, groups.rows[i]));
    else store_bfloat16(current, stored, step.dim);
  }
}

struct Numbered {
  int64_t row, position;
};

// Sorts by row and, within a row, keeps positions in order: a radix sort of as few passes as the table's size allows.
void sort_by_row(std::vector<Numbered>& items, int64_t table_rows) {
  int64_t bits = 1;
  while (bits < 63 && (table_rows - 1) >> bits) ++bits;
  const int64_t passes = (bits + 11) / 12, width = (bits + passes - 1) / passes, mask = (int64_t{1} << width) - 1;
  std::vector<Numbered> other(items.size());
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t shift = pass * width;
    std::vector<int64_t> next(mask + 2);
    for (const Numbered& item : items) ++next[(item.row >> shift & mask) + 1];
    for (int64_t digit = 0; digit < mask; ++digit) next[digit + 1] += next[digit];
    for (const Numbered& item : items) other[next[item.row >> shift & mask]++] = item;
    items.swap(other);
  }
}

}  // namespace

int64_t group_rows(const int64_t* row_ids, int64_t n, int64_t table_rows, int64_t* rows, int64_t* starts, int64_t* order) {
  std::vector<Numbered> items(n);
  for (int64_t i = 0; i < n; ++i) {
    if (static_cast<uint64_t>(row_ids[i]) >= static_cast<uint64_t>(table_rows)) return -1 - i;
    items[i] = {row_ids[i], i};
  }
  if (n < 256) std::stable_sort(items.begin(), items.end(), [](const Numbered& a, const Numbered& b) { return a.row < b.row; });
  else sort_by_row(items, table_rows);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    order[i] = items[i].position;
    if (i && items[i].row == items[i - 1].row) continue;
    rows[count] = items[i].row;
    starts[count++] = i;
  }
  starts[count] = n;
  return count;
}

void sum_rows(const RowGroups& groups, const uint8_t* gradients, RowType type, int64_t dim, float* out, int64_t threads) {
  parallel_for(groups.count, kGrain, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(dim);
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end)
        prefetch_bytes(gradients + groups.order[groups.starts[i + kAhead]] * dim * value_bytes(type), dim * value_bytes(type));
      std::memcpy(out + i * dim, summed(groups, i, gradients, type, dim, scratch.data()), dim * sizeof(float));
    }
  });
}

int64_t claim_slots(const int64_t* row_ids, int64_t n, int32_t* slot_of_row, int64_t table_rows, int64_t* row_of_slot, int64_t capacity,
                    int64_t used, int64_t* slots) {
  const auto outside = [&](int64_t row) { return static_cast<uint64_t>(row) >= static_cast<uint64_t>(table_rows); };
  for (int64_t i = 0; i < n; ++i) {
    if (i + 4 * kAhead < n && !outside(row_ids[i + 4 * kAhead])) __builtin_prefetch(slot_of_row + row_ids[i + 4 * kAhead], 1, 1);
    const int64_t row = row_ids[i];
    if (outside(row)) return -1 - i;
    if (slot_of_row[row] == 0) {
      if (used >= capacity) return -1 - i;
      row_of_slot[used] = row;
      slot_of_row[row] = static_cast<int32_t>(++used);
    }
    slots[i] = slot_of_row[row] - 1;
  }
  return used;
}

void step_rows(const RowGroups& groups, const RowStep& step, int64_t threads) {
  parallel_for(groups.count, kGrain, threads, [&](int64_t begin, int64_t end) { step_part(groups, step, begin, end); });
}

}  // namespace engram
