// Compress, mix and reduce: the n-gram hash of engram/hashing/reference.py for all layers, positions and heads.
#pragma once
#include <cstdint>

namespace engram {

struct HashPlan {
  const int64_t* lookup;       // [vocab] raw id -> canonical id
  int64_t vocab;
  const int64_t* multipliers;  // [layers, orders + 1]
  const int64_t* primes;       // [layers, orders * heads]
  const double* inverses;      // (1 - 2^-51) / primes: quotients made of them are never too large
  const int64_t* offsets;      // [layers, orders * heads], added to every index; may be null
  int64_t layers, orders, heads;  // heads per order
  int64_t raw_pad;             // raw id that stands before the start and at masked positions
  int64_t smallest, largest;   // of the primes
};

// A plan with its smallest and largest prime.
HashPlan finished(HashPlan plan);

struct HashInput {
  const int64_t* ids;      // [batch, length]
  const uint8_t* mask;     // [batch, length], zero at padding; may be null
  const int64_t* history;  // [batch, history_length], may be null
  int64_t batch, length, history_length;
};

// What came of a call: all is well and `value` means something, or `value` is a raw id that is not in the vocabulary.
struct Outcome {
  bool ok;
  int64_t value;
};

// Indices int64 [layers, batch, length, orders * heads] and, unless null, tags int32 of the same shape.
Outcome hash_ngrams(const HashPlan& plan, const HashInput& input, int64_t* out, int32_t* tags, int64_t threads);

// The rows of a table with verified rows, to be found by row number and tag.
struct VerifiedIndex {
  const int64_t* row_ids;     // [stored]
  const int64_t* buckets;     // [bucket_mask + 1], open addressing: tag << 32 | slot, or -1
  int64_t bucket_mask;        // a power of two minus one, at least `stored`
  const uint8_t* order_used;  // [orders], whether any row of the order is stored
};

void build_buckets(const int64_t* row_ids, const int32_t* tags, int64_t stored, int64_t* buckets, int64_t bucket_mask);

// Slots int64 [batch, length, orders * heads] that positions read in one layer of the plan, -1 where none is theirs; with `longest_only`
// those of the longest n-gram found. `slots` is written only where something is found: fill it with -1 before. The outcome's value is
// the number of positions that read something.
Outcome find_verified(const HashPlan& plan, int64_t layer, const HashInput& input, const VerifiedIndex& index, bool longest_only,
                      int64_t* slots, int64_t threads);

// The instruction set in use: "avx512", "avx2" or "portable". `limit` (same names, or empty) chooses a smaller one, for tests.
const char* instruction_set();
bool limit_instruction_set(const char* name);

}  // namespace engram
