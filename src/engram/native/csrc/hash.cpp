#include "hash.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ENGRAM_X86 1
#include <immintrin.h>
#endif

namespace engram {
namespace {

constexpr int64_t kTagModulus = 2147483647;  // 2^31 - 1
constexpr int64_t kSmallPrime = 1 << 13;     // below, quotients do not fit a double exactly enough: divide in integers
constexpr int64_t kHalfwayPrime = 1 << 15;   // from here to 2^31, quotients to the nearest do, and remainders fit 32 bits
constexpr int64_t kGrain = 512;              // positions per thread at least, for a layer of 16 heads

// The heads of one layer.
struct Heads {
  const int64_t* primes;
  const double* inverses;
  const int64_t* offsets;  // may be null
  int64_t per_order, width;
};

// `inverse` is that of the prime, made smaller by a factor of 1 - 2^-51 (hash.h), which is more than all roundings up to the product can add:
// the quotient is never too large. It is below 2^50 for a mix (non-negative, below 2^63) and a prime from kSmallPrime to 2^53, so that it is
// too small by one at most, and one correction makes it exact.
inline int64_t divide(int64_t mix, int64_t prime, double inverse, int64_t* rest) {
  if (prime < kSmallPrime) {
    *rest = mix % prime;
    return mix / prime;
  }
  int64_t quotient = static_cast<int64_t>(static_cast<double>(mix) * inverse);
  int64_t r = mix - quotient * prime;
  if (r >= prime) {
    r -= prime;
    ++quotient;
  }
  *rest = r;
  return quotient;
}

template <bool kTags>
inline void reduce_one(int64_t mix, const Heads& heads, int64_t head, int64_t* out, int32_t* tags) {
  int64_t rest;
  const int64_t quotient = divide(mix, heads.primes[head], heads.inverses[head], &rest);
  out[head] = rest + (heads.offsets ? heads.offsets[head] : 0);
  if (kTags) tags[head] = static_cast<int32_t>(quotient % kTagModulus + 1);
}

namespace portable {

template <bool kTags>
inline void reduce_lanes(int64_t mix, const Heads& heads, int64_t head, int64_t* out, int32_t* tags) {
  reduce_one<kTags>(mix, heads, head, out, tags);
}

template <bool kTags>
inline void reduce_heads(const int64_t*, const Heads&, int64_t*, int32_t*) {}  // never needed: one lane divides every number of heads

#define ENGRAM_TARGET
#define ENGRAM_LANES 1
#include "hash_loops.inc"
#undef ENGRAM_TARGET
#undef ENGRAM_LANES

}  // namespace portable

#ifdef ENGRAM_X86

namespace avx512 {

#define ENGRAM_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw")))
#define ENGRAM_LANES 8

// Eight heads from `head` on, those in `lanes`, each with its own mix.
template <bool kTags>
ENGRAM_TARGET inline void reduce_vector(__m512i m, const Heads& heads, int64_t head, __mmask8 lanes, int64_t* out, int32_t* tags) {
  const __m512i one = _mm512_set1_epi64(1);
  const __m512i p = _mm512_mask_loadu_epi64(one, lanes, heads.primes + head);
  const __m512d product = _mm512_mul_pd(_mm512_cvtepi64_pd(m), _mm512_maskz_loadu_pd(lanes, heads.inverses + head));
  __m512i q = _mm512_cvttpd_epi64(product);
  __m512i r = _mm512_sub_epi64(m, _mm512_mullo_epi64(q, p));
  if (kTags) q = _mm512_mask_add_epi64(q, _mm512_cmpge_epi64_mask(r, p), q, one);
  r = _mm512_min_epu64(r, _mm512_sub_epi64(r, p));  // what is below zero is large as an unsigned number
  if (heads.offsets) r = _mm512_add_epi64(r, _mm512_maskz_loadu_epi64(lanes, heads.offsets + head));
  _mm512_mask_storeu_epi64(out + head, lanes, r);
  if (kTags) {
    const __m512i t = _mm512_set1_epi64(kTagModulus);  // modulo 2^31 - 1 by folding: q is below 2^50
    q = _mm512_add_epi64(_mm512_and_si512(q, t), _mm512_maskz_srli_epi64(0xff, q, 31));
    q = _mm512_mask_sub_epi64(q, _mm512_cmpge_epi64_mask(q, t), q, t);
    _mm512_mask_cvtepi64_storeu_epi32(tags + head, lanes, _mm512_add_epi64(q, one));
  }
}

template <bool kTags>
ENGRAM_TARGET inline void reduce_lanes(int64_t mix, const Heads& heads, int64_t head, int64_t* out, int32_t* tags) {
  reduce_vector<kTags>(_mm512_set1_epi64(mix), heads, head, 0xff, out, tags);
}

template <bool kTags>
ENGRAM_TARGET inline void reduce_heads(const int64_t* mixes, const Heads& heads, int64_t* out, int32_t* tags) {
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const double step = 1.0 / static_cast<double>(heads.per_order);
  for (int64_t head = 0, order = 0, inside = 0; head < heads.width; head += 8) {
    const __mmask8 lanes = heads.width - head >= 8 ? 0xff : static_cast<__mmask8>((1u << (heads.width - head)) - 1);
    // Lane l belongs to the order (inside + l) / per_order after this one; a half keeps the product away from whole numbers.
    const __m512d place = _mm512_add_pd(_mm512_cvtepi64_pd(_mm512_add_epi64(lane, _mm512_set1_epi64(inside))), _mm512_set1_pd(0.5));
    const __m512i which = _mm512_cvttpd_epi64(_mm512_mul_pd(place, _mm512_set1_pd(step)));
    const __m512i m = _mm512_permutexvar_epi64(which, _mm512_loadu_si512(mixes + order));
    reduce_vector<kTags>(m, heads, head, lanes, out, tags);
    inside += 8;
    order += inside / heads.per_order;
    inside %= heads.per_order;
  }
}

#include "hash_loops.inc"
#undef ENGRAM_TARGET
#undef ENGRAM_LANES

}  // namespace avx512

namespace avx2 {

#define ENGRAM_TARGET __attribute__((target("avx2,fma")))
#define ENGRAM_LANES 4

ENGRAM_TARGET inline __m256i load(const int64_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

ENGRAM_TARGET inline void store_rest(__m256i rest, const Heads& heads, int64_t head, int64_t* out) {
  if (heads.offsets) rest = _mm256_add_epi64(rest, load(heads.offsets + head));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + head), rest);
}

// The quotients modulo 2^31 - 1 by folding, as they are below 2^50; plus one.
ENGRAM_TARGET inline void store_tags(__m256i quotients, int32_t* tags) {
  const __m256i t = _mm256_set1_epi64x(kTagModulus);
  __m256i q = _mm256_add_epi64(_mm256_and_si256(quotients, t), _mm256_srli_epi64(quotients, 31));
  q = _mm256_sub_epi64(q, _mm256_andnot_si256(_mm256_cmpgt_epi64(t, q), t));
  q = _mm256_permutevar8x32_epi32(_mm256_add_epi64(q, _mm256_set1_epi64x(1)), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(tags), _mm256_castsi256_si128(q));
}

template <bool kTags>
ENGRAM_TARGET inline void reduce_heads(const int64_t* mixes, const Heads& heads, int64_t* out, int32_t* tags) {
  for (int64_t head = 0; head < heads.width; head += heads.per_order, ++mixes)
    for (int64_t i = 0; i < heads.per_order; ++i) reduce_one<kTags>(*mixes, heads, head + i, out, tags);
}

// Primes from kSmallPrime on.
namespace any {

ENGRAM_TARGET inline __m256i low_product(__m256i a, __m256i b) {
  const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b), _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
  return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(cross, 32));
}

template <bool kTags>
ENGRAM_TARGET inline void reduce_lanes(int64_t mix, const Heads& heads, int64_t head, int64_t* out, int32_t* tags) {
  const __m256d shift = _mm256_set1_pd(4503599627370496.0);  // 2^52: its mantissa receives the integer
  const __m256i p = load(heads.primes + head);
  const __m256d product = _mm256_mul_pd(_mm256_set1_pd(static_cast<double>(mix)), _mm256_loadu_pd(heads.inverses + head));
  const __m256d whole = _mm256_add_pd(_mm256_floor_pd(product), shift);
  const __m256i q = _mm256_xor_si256(_mm256_castpd_si256(whole), _mm256_castpd_si256(shift));
  const __m256i r = _mm256_sub_epi64(_mm256_set1_epi64x(mix), low_product(q, p));
  const __m256i right = _mm256_cmpgt_epi64(p, r);
  store_rest(_mm256_sub_epi64(r, _mm256_andnot_si256(right, p)), heads, head, out);
  if (kTags) store_tags(_mm256_add_epi64(q, _mm256_add_epi64(right, _mm256_set1_epi64x(1))), tags + head);  // the mask is -1
}

#include "hash_loops.inc"

}  // namespace any

// Primes from kHalfwayPrime to 2^31, which most tables have: half of the work. The quotient is rounded to the nearest, not down. The mix is off
// by 2^-53, the inverse by 2 * 2^-53 (rounded twice) and by the 2^-51 that it lacks; the product is not rounded by itself. In a quotient below
// 2^63 / prime that makes less than 7 * 2^10 / prime: 7/32 at most. So the remainder lies within 23/32 of the prime around zero: 32 bits with
// a sign hold it, no higher bit need be multiplied, and one correction makes it exact.
namespace halfway {

template <bool kTags>
ENGRAM_TARGET inline void reduce_lanes(int64_t mix, const Heads& heads, int64_t head, int64_t* out, int32_t* tags) {
  const __m256d shift = _mm256_set1_pd(4503599627370496.0);  // 2^52: adding it rounds to an integer, which its mantissa receives
  const __m256i zero = _mm256_setzero_si256(), p = load(heads.primes + head);
  const __m256d whole = _mm256_fmadd_pd(_mm256_set1_pd(static_cast<double>(mix)), _mm256_loadu_pd(heads.inverses + head), shift);
  const __m256i q = _mm256_castpd_si256(whole);
  const __m256i low = _mm256_sub_epi32(_mm256_set1_epi64x(mix), _mm256_mul_epu32(q, p));
  const __m256i r = _mm256_min_epu32(low, _mm256_add_epi32(low, p));  // what is below zero is large as an unsigned number
  store_rest(_mm256_blend_epi32(r, zero, 0xaa), heads, head, out);    // the low halves
  if (kTags) {
    const __m256i below = _mm256_srli_epi64(_mm256_slli_epi64(low, 32), 63);  // one where the quotient was rounded up
    store_tags(_mm256_sub_epi64(_mm256_xor_si256(q, _mm256_castpd_si256(shift)), below), tags + head);
  }
}

#include "hash_loops.inc"

}  // namespace halfway

#undef ENGRAM_TARGET
#undef ENGRAM_LANES

}  // namespace avx2

#endif  // ENGRAM_X86

using PieceFn = void (*)(const Heads&, const int64_t* multipliers, int64_t orders, const int64_t* here, int64_t count, int64_t* out,
                         int32_t* tags);

std::atomic<const char*> chosen{nullptr};

const char* best_instruction_set() {
#ifdef ENGRAM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

PieceFn choose_loops(const HashPlan& plan) {
#ifdef ENGRAM_X86
  const char* name = plan.smallest < kSmallPrime ? "portable" : instruction_set();
  if (!std::strcmp(name, "avx512")) return avx512::hash_piece_any;
  if (!std::strcmp(name, "avx2")) {
    const bool halfway = plan.smallest >= kHalfwayPrime && plan.largest < int64_t{1} << 31;
    return halfway ? avx2::halfway::hash_piece_any : avx2::any::hash_piece_any;
  }
#endif
  return portable::hash_piece_any;
}

Heads heads_of(const HashPlan& plan, int64_t layer) {
  const int64_t width = plan.orders * plan.heads, at = layer * width;
  return {plan.primes + at, plan.inverses + at, plan.offsets ? plan.offsets + at : nullptr, plan.heads, width};
}

// Canonical ids of positions [begin - orders, end) of one sequence, padding and history included.
Outcome fill_context(const HashPlan& plan, const HashInput& input, int64_t row, int64_t begin, int64_t end, int64_t* context) {
  const int64_t* ids = input.ids + row * input.length;
  const uint8_t* mask = input.mask ? input.mask + row * input.length : nullptr;
  const auto known = [&](int64_t id) { return static_cast<uint64_t>(id) < static_cast<uint64_t>(plan.vocab); };
  if (!known(plan.raw_pad)) return {false, plan.raw_pad};
  int64_t position = begin - plan.orders;
  for (; position < 0; ++position) {
    const bool past = input.history && input.history_length + position >= 0;
    const int64_t id = past ? input.history[row * input.history_length + input.history_length + position] : plan.raw_pad;
    if (!known(id)) return {false, id};
    *context++ = plan.lookup[id];
  }
  for (; position < end; ++position) {
    if (!known(ids[position])) return {false, ids[position]};
    *context++ = plan.lookup[!mask || mask[position] ? ids[position] : plan.raw_pad];
  }
  return {true, 0};
}

// Calls fn(row, begin, end, context) for pieces of all sequences, on several threads; context[orders + t - begin] is position t.
template <class Fn>
Outcome over_positions(const HashPlan& plan, const HashInput& input, int64_t threads, const Fn& fn) {
  std::atomic<bool> ok{true};
  std::atomic<int64_t> bad{0};
  const int64_t work = plan.layers * plan.orders * plan.heads;
  const int64_t grain = std::max<int64_t>(64, kGrain * 32 / std::max<int64_t>(work, 1));
  parallel_for(input.batch * input.length, grain, threads, [&](int64_t first, int64_t last) {
    constexpr int64_t kPiece = 256;
    std::vector<int64_t> context(plan.orders + kPiece);
    while (first < last) {
      const int64_t row = first / input.length, begin = first % input.length;
      const int64_t end = std::min({input.length, begin + kPiece, begin + last - first});
      const Outcome filled = fill_context(plan, input, row, begin, end, context.data());
      if (!filled.ok) {
        bad = filled.value;
        ok = false;
        return;
      }
      fn(row, begin, end, context.data());
      first += end - begin;
    }
  });
  return {ok, bad};
}

inline uint64_t bucket_of(int64_t row_id) {
  return static_cast<uint64_t>(row_id) * 0x9E3779B97F4A7C15ull >> 20;
}

}  // namespace

HashPlan finished(HashPlan plan) {
  const int64_t count = plan.layers * plan.orders * plan.heads;
  if (count == 0) return plan;
  const auto ends = std::minmax_element(plan.primes, plan.primes + count);
  plan.smallest = *ends.first;
  plan.largest = *ends.second;
  return plan;
}

const char* instruction_set() {
  const char* name = chosen.load(std::memory_order_relaxed);
  if (!name) chosen = name = best_instruction_set();
  return name;
}

bool limit_instruction_set(const char* name) {
  static const char* const kNames[] = {"portable", "avx2", "avx512"};
  const char* best = best_instruction_set();
  if (!*name) {
    chosen = best;
    return true;
  }
  for (const char* known : kNames) {
    if (!std::strcmp(name, known)) {
      chosen = known;
      return true;
    }
    if (!std::strcmp(best, known)) break;  // names beyond are not supported here
  }
  return false;
}

Outcome hash_ngrams(const HashPlan& plan, const HashInput& input, int64_t* out, int32_t* tags, int64_t threads) {
  const PieceFn hash_piece = choose_loops(plan);
  const int64_t positions = input.batch * input.length;
  return over_positions(plan, input, threads, [&](int64_t row, int64_t begin, int64_t end, const int64_t* context) {
    for (int64_t layer = 0; layer < plan.layers; ++layer) {
      const Heads heads = heads_of(plan, layer);
      const int64_t to = (layer * positions + row * input.length + begin) * heads.width;
      hash_piece(heads, plan.multipliers + layer * (plan.orders + 1), plan.orders, context + plan.orders, end - begin, out + to,
                 tags ? tags + to : nullptr);
    }
  });
}

void build_buckets(const int64_t* row_ids, const int32_t* tags, int64_t stored, int64_t* buckets, int64_t bucket_mask) {
  std::fill(buckets, buckets + bucket_mask + 1, int64_t{-1});
  for (int64_t slot = 0; slot < stored; ++slot) {
    uint64_t at = bucket_of(row_ids[slot]) & bucket_mask;
    while (buckets[at] != -1) at = (at + 1) & bucket_mask;
    buckets[at] = static_cast<int64_t>(tags[slot]) << 32 | slot;
  }
}

Outcome find_verified(const HashPlan& plan, int64_t layer, const HashInput& input, const VerifiedIndex& index, bool longest_only,
                      int64_t* slots, int64_t threads) {
  const PieceFn hash_piece = choose_loops(plan);
  const Heads heads = heads_of(plan, layer);
  const int64_t* multipliers = plan.multipliers + layer * (plan.orders + 1);
  std::atomic<int64_t> found{0};
  const auto find = [&](int64_t row_id, int32_t tag) -> int64_t {
    uint64_t bucket = bucket_of(row_id) & index.bucket_mask;
    for (int64_t entry; (entry = index.buckets[bucket]) != -1; bucket = (bucket + 1) & index.bucket_mask) {
      const int64_t slot = entry & 0xffffffff;
      if (entry >> 32 == tag && index.row_ids[slot] == row_id) return slot;
    }
    return -1;
  };
  const Outcome walked = over_positions(plan, input, threads, [&](int64_t row, int64_t begin, int64_t end, const int64_t* context) {
    std::vector<int64_t> rows(heads.width);
    std::vector<int32_t> tags(heads.width);
    int64_t hits = 0;
    for (int64_t position = begin; position < end; ++position) {
      if (input.mask && !input.mask[row * input.length + position]) continue;
      hash_piece(heads, multipliers, plan.orders, context + plan.orders + position - begin, 1, rows.data(), tags.data());
      for (int64_t order = 0; order < plan.orders; ++order)
        if (index.order_used[order])
          for (int64_t h = order * plan.heads; h < (order + 1) * plan.heads; ++h)
            __builtin_prefetch(index.buckets + (bucket_of(rows[h]) & index.bucket_mask));
      bool any = false;
      int64_t* to = slots + (row * input.length + position) * heads.width;
      for (int64_t order = plan.orders - 1; order >= 0 && !(any && longest_only); --order) {
        if (!index.order_used[order]) continue;
        for (int64_t h = order * plan.heads; h < (order + 1) * plan.heads; ++h) {
          const int64_t slot = find(rows[h], tags[h]);
          if (slot != -1) {
            to[h] = slot;
            any = true;
          }
        }
      }
      hits += any;
    }
    found += hits;
  });
  return walked.ok ? Outcome{true, found.load()} : walked;
}

}  // namespace engram
