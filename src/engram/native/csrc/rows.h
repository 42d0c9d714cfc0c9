// One step of an optimiser on the rows of a table that have a gradient: engram/optim/row_rules.py in one pass over memory.
#pragma once
#include <cstdint>

namespace engram {

enum class RowType : int64_t { kFloat32 = 0, kBfloat16 = 1 };
enum class RowState : int64_t { kAdam = 0, kRowwiseAdam = 1, kRowwiseAdagrad = 2 };

// The gradients of each row, by position: those of `rows[i]` are order[starts[i]] to order[starts[i + 1] - 1]. Without `order` there is
// one gradient per row, in the order of the rows.
struct RowGroups {
  const int64_t* rows;    // [count], no row twice
  const int64_t* starts;  // [count + 1], or null
  const int64_t* order;   // [n], or null
  int64_t count;
};

// Groups equal row numbers: writes rows [n] ascending, starts [n + 1] and order [n], in which positions of one row keep their order, so
// that a sum over them is the same each time. Returns how many different rows there are, or -1 - p if the p-th number is out of range.
int64_t group_rows(const int64_t* row_ids, int64_t n, int64_t table_rows, int64_t* rows, int64_t* starts, int64_t* order);

// Sums the gradients [n, dim] of each row; writes float32 [groups.count, dim], whatever the type of the gradients.
void sum_rows(const RowGroups& groups, const uint8_t* gradients, RowType type, int64_t dim, float* out, int64_t threads);

// Where the state of rows is kept: slot_of_row holds 1 + slot, or 0 for a row never seen, which gets the next free slot; row_of_slot is the
// inverse, with room for `capacity` rows. Writes slots [n]; returns how many slots are in use then, or -1 - p if the p-th row number is out
// of range or finds no room.
int64_t claim_slots(const int64_t* row_ids, int64_t n, int32_t* slot_of_row, int64_t table_rows, int64_t* row_of_slot, int64_t capacity,
                    int64_t used, int64_t* slots);

struct StepNumbers {
  float step_size, beta2, eps, keep, sign;  // keep: what weight decay leaves of a row
  float rest1, rest2;                       // 1 - beta1 and 1 - beta2, taken in double: of 0.999f, a float leaves four digits only
};

struct RowStep {
  uint8_t* table;
  int64_t dim;
  RowType type;  // of table and gradients
  const uint8_t* gradients;
  RowState state;
  const int64_t* slots;  // [groups.count]
  float* first;          // exp_avg [capacity, dim]; null for kRowwiseAdagrad
  float* second;         // [capacity, dim], or [capacity] for the kinds with one number per row
  StepNumbers numbers;
  bool stochastic;  // round by chance instead of to nearest
  uint64_t seed;
};

void step_rows(const RowGroups& groups, const RowStep& step, int64_t threads);

}  // namespace engram
