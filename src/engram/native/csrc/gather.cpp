#include "gather.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "clones.h"
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ENGRAM_X86 1
#include <immintrin.h>
#endif

namespace engram {
namespace {

constexpr int64_t kAhead = 16;                    // rows requested before they are needed: enough loads in flight to hide memory
constexpr int64_t kGrain = 4096;                  // rows per thread at least
constexpr int64_t kStreamBytes = int64_t{4} << 20;  // outputs larger than this would push everything else out of the cache

inline int64_t scale_bytes(const Rows& rows) { return rows.format == RowFormat::kFloat8 ? (rows.dim + 31) / 32 : 4; }

inline void prefetch(const Rows& rows, int64_t row) {
  const uint8_t* data = rows.data + row * rows.row_bytes;
  for (int64_t at = 0; at < rows.row_bytes; at += 64) __builtin_prefetch(data + at, 0, 0);
  if (rows.scales) __builtin_prefetch(rows.scales + row * scale_bytes(rows), 0, 0);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// IEEE half to float by integer arithmetic, subnormals, infinities and NaNs included.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  return from_bits(sign | 0x3f800000) * static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
}

inline float power_of_two(uint8_t biased) { return biased ? from_bits(static_cast<uint32_t>(biased) << 23) : 0.0f; }

ENGRAM_CLONES void from_bfloat16(const uint16_t* __restrict row, float* __restrict out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i] = from_bits(static_cast<uint32_t>(row[i]) << 16);
}

void from_float16_plain(const uint16_t* row, float* out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i] = half_to_float(row[i]);
}

#ifdef ENGRAM_X86
__attribute__((target("avx2,f16c"))) void from_float16_f16c(const uint16_t* row, float* out, int64_t dim) {
  int64_t i = 0;
  for (; i + 8 <= dim; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
  from_float16_plain(row + i, out + i, dim - i);
}
#endif

using HalfFn = void (*)(const uint16_t*, float*, int64_t);
HalfFn choose_from_float16() {
#ifdef ENGRAM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return from_float16_f16c;
#endif
  return from_float16_plain;
}
const HalfFn from_float16 = choose_from_float16();

ENGRAM_CLONES void from_int8(const int8_t* __restrict row, float scale, float* __restrict out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(row[i]) * scale;
}

// e4m3fn: bias 7, subnormals in steps of 2^-9, no infinities, NaN where all magnitude bits are set.
void from_float8_plain(const uint8_t* row, const uint8_t* scales, float* out, int64_t dim) {
  for (int64_t block = 0; block < dim; block += 32) {
    const float scale = power_of_two(scales[block / 32]);
    const int64_t end = std::min<int64_t>(dim, block + 32);
    for (int64_t i = block; i < end; ++i) {
      const uint32_t code = row[i], magnitude = code & 0x7f;
      const float normal = from_bits((magnitude << 20) + (120u << 23));
      const float small = static_cast<float>(magnitude) * 0.001953125f;
      const float value = (magnitude < 8 ? small : magnitude == 0x7f ? from_bits(0x7fc00000) : normal) * scale;
      out[i] = code & 0x80 ? -value : value;
    }
  }
}

#ifdef ENGRAM_X86
// Shifted into the fields of a half, whose exponent bias is 8 more, the eight bits are the same number times 2^-8, subnormals included.
__attribute__((target("avx2,f16c"))) void from_float8_f16c(const uint8_t* row, const uint8_t* scales, float* out, int64_t dim) {
  const __m128i sign = _mm_set1_epi16(0x80), magnitude = _mm_set1_epi16(0x7f);
  int64_t block = 0;
  for (; block + 32 <= dim; block += 32) {
    const __m256 scale = _mm256_set1_ps(power_of_two(scales[block / 32])), shift = _mm256_set1_ps(256.0f);
    for (int64_t i = block; i < block + 32; i += 8) {
      const __m128i code = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i)));
      const __m128i bits = _mm_and_si128(code, magnitude);
      const __m128i nan = _mm_cmpeq_epi16(bits, magnitude);
      const __m128i half = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(code, sign), 8), _mm_slli_epi16(bits, 7));
      const __m128i whole = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
      _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(whole), shift), scale));
    }
  }
  from_float8_plain(row + block, scales + block / 32, out + block, dim - block);
}
#endif

using Float8Fn = void (*)(const uint8_t*, const uint8_t*, float*, int64_t);
Float8Fn choose_from_float8() {
#ifdef ENGRAM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return from_float8_f16c;
#endif
  return from_float8_plain;
}
const Float8Fn from_float8 = choose_from_float8();

ENGRAM_CLONES void from_int4(const uint8_t* __restrict row, float scale, float* __restrict out, int64_t dim) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    out[2 * i] = static_cast<float>(static_cast<int8_t>(row[i] << 4) >> 4) * scale;
    out[2 * i + 1] = static_cast<float>(static_cast<int8_t>(row[i]) >> 4) * scale;
  }
}

inline float row_scale(const Rows& rows, int64_t row) {
  float scale;
  std::memcpy(&scale, rows.scales + row * 4, 4);
  return scale;
}

// Stores past the cache; `bytes` and both ends must be multiples of 32.
#ifdef ENGRAM_X86
__attribute__((target("avx2"))) void stream(const uint8_t* from, uint8_t* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
}
inline bool can_stream() { return __builtin_cpu_supports("avx2"); }
inline void finish_streams() { _mm_sfence(); }
#else
void stream(const uint8_t* from, uint8_t* to, int64_t bytes) { std::memcpy(to, from, bytes); }
inline bool can_stream() { return false; }
inline void finish_streams() {}
#endif

constexpr int64_t kPage = 4096, kSampled = 256;

// Whether all pages of a row are in memory; where the system does not say, they count as being there.
bool is_resident(const uint8_t* row, int64_t bytes) {
#ifdef __linux__
  const uintptr_t first = reinterpret_cast<uintptr_t>(row) / kPage * kPage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(row) + bytes;
  unsigned char states[16];
  for (uintptr_t at = first; at < last; at += sizeof(states) * kPage) {
    const size_t length = std::min<uintptr_t>(last - at, sizeof(states) * kPage);
    if (mincore(reinterpret_cast<void*>(at), length, states) != 0) return true;
    for (size_t page = 0; page * kPage < length; ++page)
      if (!(states[page] & 1)) return false;
  }
#else
  (void)row;
  (void)bytes;
#endif
  return true;
}

// Whether a sample of the rows is in memory: asking for each would cost more than reading it.
bool looks_resident(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n) {
  const int64_t step = std::max<int64_t>(1, n / kSampled);
  for (int64_t i = 0; i < n; i += step)
    if (static_cast<uint64_t>(row_ids[i]) < static_cast<uint64_t>(rows) && !is_resident(data + row_ids[i] * row_bytes, row_bytes))
      return false;
  return true;
}

void convert(const Rows& rows, int64_t row, float* out) {
  const uint8_t* data = rows.data + row * rows.row_bytes;
  switch (rows.format) {
    case RowFormat::kBfloat16: return from_bfloat16(reinterpret_cast<const uint16_t*>(data), out, rows.dim);
    case RowFormat::kFloat16: return from_float16(reinterpret_cast<const uint16_t*>(data), out, rows.dim);
    case RowFormat::kInt8: return from_int8(reinterpret_cast<const int8_t*>(data), row_scale(rows, row), out, rows.dim);
    case RowFormat::kFloat8: return from_float8(data, rows.scales + row * scale_bytes(rows), out, rows.dim);
    case RowFormat::kInt4: return from_int4(data, row_scale(rows, row), out, rows.dim);
    case RowFormat::kCopy: break;
  }
}

int64_t gather_part(const Rows& rows, const int64_t* row_ids, int64_t begin, int64_t end, int64_t n, uint8_t* out, bool streaming) {
  const bool copy = rows.format == RowFormat::kCopy;
  const int64_t out_bytes = copy ? rows.row_bytes : rows.dim * 4;
  alignas(64) float staged[1024];
  const bool stage = streaming && !copy && rows.dim <= 1024;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < n && static_cast<uint64_t>(row_ids[i + kAhead]) < static_cast<uint64_t>(rows.rows))
      prefetch(rows, row_ids[i + kAhead]);
    const int64_t row = row_ids[i];
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows.rows)) return i;
    uint8_t* to = out + i * out_bytes;
    if (copy) {
      const uint8_t* from = rows.data + row * rows.row_bytes;
      if (streaming) stream(from, to, out_bytes);
      else std::memcpy(to, from, out_bytes);
    } else if (stage) {
      convert(rows, row, staged);
      stream(reinterpret_cast<const uint8_t*>(staged), to, out_bytes);
    } else {
      convert(rows, row, reinterpret_cast<float*>(to));
    }
  }
  if (streaming) finish_streams();
  return -1;
}

}  // namespace

int64_t gather_rows(const Rows& rows, const int64_t* row_ids, int64_t n, uint8_t* out, int64_t threads) {
  const int64_t out_bytes = rows.format == RowFormat::kCopy ? rows.row_bytes : rows.dim * 4;
  const bool streaming =
      can_stream() && n * out_bytes >= kStreamBytes && out_bytes % 32 == 0 && reinterpret_cast<uintptr_t>(out) % 32 == 0;
  std::atomic<int64_t> bad{-1};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    const int64_t wrong = gather_part(rows, row_ids, begin, end, n, out, streaming);
    if (wrong != -1) bad = wrong;
  });
  return bad;
}

int64_t touch_rows(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n, int64_t threads, bool count) {
  if (!count && looks_resident(data, rows, row_bytes, row_ids, n)) return n;
  std::atomic<int64_t> warm{0};
  parallel_for(n, 64, threads, [&](int64_t begin, int64_t end) {
    int64_t resident = 0;
    volatile uint8_t sink = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (static_cast<uint64_t>(row_ids[i]) >= static_cast<uint64_t>(rows)) continue;
      const uint8_t* row = data + row_ids[i] * row_bytes;
      if (count) resident += is_resident(row, row_bytes);
      for (int64_t at = 0; at < row_bytes; at += kPage) sink = row[at];
      sink = row[row_bytes - 1];
    }
    (void)sink;
    warm += resident;
  });
  return warm;
}

}  // namespace engram
