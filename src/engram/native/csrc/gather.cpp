#include "gather.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "hash.h"
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

constexpr int64_t kAhead = 32;  // rows requested, into the second-level cache, before they are needed: enough loads in flight to hide memory
constexpr int64_t kGrain = 4096;                    // rows per thread at least
constexpr int64_t kStreamBytes = int64_t{4} << 20;  // outputs larger than this would push everything else out of the cache

// A part of a call: positions [begin, end) of n.
struct Part {
  const Rows& rows;
  const int64_t* row_ids;
  int64_t begin, end, n;
  uint8_t* out;

  bool has(int64_t i) const { return static_cast<uint64_t>(row_ids[i]) < static_cast<uint64_t>(rows.rows); }
  const uint8_t* row(int64_t i) const { return rows.data + row_ids[i] * rows.row_bytes; }
};

inline int64_t scale_bytes(const Rows& rows) { return rows.format == RowFormat::kFloat8 ? (rows.dim + 31) / 32 : 4; }

__attribute__((always_inline)) inline void prefetch(const Part& part, int64_t i) {
  if (i >= part.n || !part.has(i)) return;
  const uint8_t* data = part.row(i);
  for (int64_t at = 0; at < part.rows.row_bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
  if (part.rows.scales) __builtin_prefetch(part.rows.scales + part.row_ids[i] * scale_bytes(part.rows), 0, 2);
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

// e4m3fn: bias 7, subnormals in steps of 2^-9, no infinities, NaN where all magnitude bits are set.
inline float eight_bits_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  const float normal = from_bits((magnitude << 20) + (120u << 23));
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0.001953125f : magnitude == 0x7f ? from_bits(0x7fc00000) : normal;
  return code & 0x80 ? -value : value;
}

inline float power_of_two(uint8_t biased) { return biased ? from_bits(static_cast<uint32_t>(biased) << 23) : 0.0f; }

// The scale of a row, or of a block of 32 of its values.
inline float scale_of(const Rows& rows, int64_t row, int64_t block) {
  const uint8_t* scales = rows.scales + row * scale_bytes(rows);
  if (rows.format == RowFormat::kFloat8) return power_of_two(scales[block]);
  float scale;
  std::memcpy(&scale, scales, 4);
  return scale;
}

// Value i of a row. This is what the formats mean; the loops below do the same to eight values at a time.
inline float value_at(const Rows& rows, const uint8_t* data, int64_t row, int64_t i) {
  uint16_t half;
  switch (rows.format) {
    case RowFormat::kBfloat16: std::memcpy(&half, data + 2 * i, 2); return from_bits(static_cast<uint32_t>(half) << 16);
    case RowFormat::kFloat16: std::memcpy(&half, data + 2 * i, 2); return half_to_float(half);
    case RowFormat::kInt8: return static_cast<float>(static_cast<int8_t>(data[i])) * scale_of(rows, row, 0);
    case RowFormat::kFloat8: return eight_bits_to_float(data[i]) * scale_of(rows, row, i / 32);
    case RowFormat::kInt4: {
      const int8_t low_or_high = static_cast<int8_t>(i % 2 ? data[i / 2] : data[i / 2] << 4);
      return static_cast<float>(low_or_high >> 4) * scale_of(rows, row, 0);
    }
    case RowFormat::kCopy: break;
  }
  return 0.0f;
}

// The values of position i from `done` on; what is copied counts as float32. Never inlined: it would take the loops' registers.
__attribute__((noinline)) void convert_rest(const Part& part, int64_t i, int64_t done) {
  const Rows& rows = part.rows;
  const uint8_t* data = part.row(i);
  if (rows.format == RowFormat::kCopy) {
    std::memcpy(part.out + i * rows.row_bytes + 4 * done, data + 4 * done, rows.row_bytes - 4 * done);
    return;
  }
  float* to = reinterpret_cast<float*>(part.out) + i * rows.dim;
  for (int64_t value = done; value < rows.dim; ++value) to[value] = value_at(rows, data, part.row_ids[i], value);
}

// Every loop returns -1, or the first position whose row number is out of range.
int64_t gather_plain(const Part& part) {
  for (int64_t i = part.begin; i < part.end; ++i) {
    prefetch(part, i + kAhead);
    if (!part.has(i)) return i;
    convert_rest(part, i, 0);
  }
  return -1;
}

#ifdef ENGRAM_X86

// Values that are handled at a time, and the bytes they take up; what is copied counts as float32, whatever it is.
constexpr int64_t kGroup = 16;
constexpr int64_t bytes_of(RowFormat format, int64_t values) {
  return format == RowFormat::kCopy ? 4 * values
         : format == RowFormat::kBfloat16 || format == RowFormat::kFloat16 ? 2 * values
         : format == RowFormat::kInt4 ? values / 2
                                      : values;
}

// Values per chunk that rows consist of: loops of a known length, which the compiler unrolls, take half the time.
int64_t chunk_of(int64_t values) { return values % 64 == 0 ? 64 : values % 32 == 0 ? 32 : kGroup; }

// Asks for the lines of a row that consists of so many chunks of kBytes, or of something else.
template <int64_t kBytes>
__attribute__((always_inline)) inline void prefetch_row(const uint8_t* row, int64_t row_bytes, int64_t chunks) {
  if (kBytes % 64 != 0 || chunks * kBytes != row_bytes) {
    for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
    return;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, row += kBytes)
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

template <RowFormat kFormat>
inline float scale_at(const uint8_t* scales, int64_t value) {
  if (kFormat == RowFormat::kFloat8) return power_of_two(scales[value / 32]);
  float scale = 1.0f;
  if (kFormat == RowFormat::kInt8 || kFormat == RowFormat::kInt4) std::memcpy(&scale, scales, 4);
  return scale;
}

// Every namespace has `convert_group`: kGroup values of one scale, written past the cache if kStream, to a place that is a multiple of 64
// then. Few wide loads and stores of whole lines are worth more here than few instructions: all of it waits for memory.
//
// e4m3fn codes, shifted into the fields of a half, whose exponent bias is 8 more, are the same number times 2^-8, subnormals included; where
// all bits of the magnitude are set it is a NaN.

namespace avx2 {

#define ENGRAM_TARGET __attribute__((target("avx2,f16c")))
#define ENGRAM_INLINE __attribute__((always_inline)) ENGRAM_TARGET inline

ENGRAM_INLINE __m128i load8(const uint8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }
ENGRAM_INLINE __m128i load16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

// int4: sixteen values as 16-bit integers.
ENGRAM_INLINE __m256i from_four_bits(__m128i codes) {
  const __m128i pairs = _mm_cvtepu8_epi16(codes);
  const __m128i low = _mm_srai_epi16(_mm_slli_epi16(pairs, 12), 12), high = _mm_srai_epi16(_mm_slli_epi16(pairs, 8), 12);
  return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
}

// Sixteen codes as halves, times 2^-8.
ENGRAM_INLINE __m256i halves_of(__m128i codes) {
  const __m256i code = _mm256_cvtepu8_epi16(codes), magnitude = _mm256_set1_epi16(0x7f);
  const __m256i bits = _mm256_and_si256(code, magnitude), nan = _mm256_cmpeq_epi16(bits, magnitude);
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8), _mm256_slli_epi16(bits, 7));
  return _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}

ENGRAM_INLINE __m256 from_eight_bits(__m128i halves) { return _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f)); }

ENGRAM_INLINE __m256 from_integers(__m256i values, __m256 scale) { return _mm256_mul_ps(_mm256_cvtepi32_ps(values), scale); }

// Sixteen values. All of them before anything is stored: after a store, what was loaded would be loaded again.
struct Sixteen {
  __m256 low, high;
};

template <RowFormat kFormat>
ENGRAM_INLINE Sixteen convert_sixteen(const uint8_t* from, __m256 scale) {
  const uint8_t* upper = from + bytes_of(kFormat, 8);
  switch (kFormat) {
    case RowFormat::kBfloat16:
      return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from)), 16)),
              _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(upper)), 16))};
    case RowFormat::kFloat16: return {_mm256_cvtph_ps(load16(from)), _mm256_cvtph_ps(load16(upper))};
    case RowFormat::kInt8:
      return {from_integers(_mm256_cvtepi8_epi32(load8(from)), scale), from_integers(_mm256_cvtepi8_epi32(load8(upper)), scale)};
    case RowFormat::kFloat8: {
      const __m256i halves = halves_of(load16(from));
      return {_mm256_mul_ps(from_eight_bits(_mm256_castsi256_si128(halves)), scale),
              _mm256_mul_ps(from_eight_bits(_mm256_extracti128_si256(halves, 1)), scale)};
    }
    case RowFormat::kInt4: {
      const __m256i values = from_four_bits(load8(from));
      return {from_integers(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(values)), scale),
              from_integers(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(values, 1)), scale)};
    }
    case RowFormat::kCopy: break;
  }
  return {_mm256_loadu_ps(reinterpret_cast<const float*>(from)), _mm256_loadu_ps(reinterpret_cast<const float*>(upper))};
}

template <RowFormat kFormat, bool kStream>
ENGRAM_INLINE void convert_group(const uint8_t* from, float scale, float* to) {
  const Sixteen values = convert_sixteen<kFormat>(from, _mm256_set1_ps(scale));
  if (kStream) {
    _mm256_stream_ps(to, values.low);
    _mm256_stream_ps(to + 8, values.high);
  } else {
    _mm256_storeu_ps(to, values.low);
    _mm256_storeu_ps(to + 8, values.high);
  }
}

#include "gather_loops.inc"
#undef ENGRAM_TARGET
#undef ENGRAM_INLINE

}  // namespace avx2

namespace avx512 {

#define ENGRAM_TARGET __attribute__((target("avx2,f16c,avx512f,avx512dq,avx512vl,avx512bw")))
#define ENGRAM_INLINE __attribute__((always_inline)) ENGRAM_TARGET inline

ENGRAM_INLINE __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

ENGRAM_INLINE __m512 from_eight_bits(__m128i codes) {
  return _mm512_mul_ps(_mm512_cvtph_ps(avx2::halves_of(codes)), _mm512_set1_ps(256.0f));
}

template <RowFormat kFormat>
ENGRAM_INLINE __m512 convert_sixteen(const uint8_t* from, __m512 scale) {
  switch (kFormat) {
    case RowFormat::kBfloat16: return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(from)), 16));
    case RowFormat::kFloat16: return _mm512_cvtph_ps(load32(from));
    case RowFormat::kInt8: return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(avx2::load16(from))), scale);
    case RowFormat::kFloat8: return _mm512_mul_ps(from_eight_bits(avx2::load16(from)), scale);
    case RowFormat::kInt4: return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(avx2::from_four_bits(avx2::load8(from)))), scale);
    case RowFormat::kCopy: break;
  }
  return _mm512_loadu_ps(from);
}

template <RowFormat kFormat, bool kStream>
ENGRAM_INLINE void convert_group(const uint8_t* from, float scale, float* to) {
  const __m512 values = convert_sixteen<kFormat>(from, _mm512_set1_ps(scale));
  if (kStream) _mm512_stream_ps(to, values);
  else _mm512_storeu_ps(to, values);
}

#include "gather_loops.inc"
#undef ENGRAM_TARGET
#undef ENGRAM_INLINE

}  // namespace avx512

// Reads the rows of a part and makes a number of them.
template <int64_t kBytes>
__attribute__((target("avx2"))) int64_t scan_avx2(const Part& part) {
  const uint8_t* data = part.rows.data;
  const int64_t rows = part.rows.rows, row_bytes = part.rows.row_bytes, n = part.n, end = part.end, *row_ids = part.row_ids;
  const int64_t chunks = row_bytes / kBytes;
  __m256i sums = _mm256_setzero_si256();
  int64_t rest = 0;
  for (int64_t i = part.begin; i < end; ++i) {
    if (i + kAhead < n && static_cast<uint64_t>(row_ids[i + kAhead]) < static_cast<uint64_t>(rows))
      prefetch_row<kBytes>(data + row_ids[i + kAhead] * row_bytes, row_bytes, chunks);
    if (static_cast<uint64_t>(row_ids[i]) >= static_cast<uint64_t>(rows)) continue;
    const uint8_t* row = data + row_ids[i] * row_bytes;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, row += kBytes)
      for (int64_t at = 0; at < kBytes; at += 32)
        sums = _mm256_xor_si256(sums, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at)));
    for (int64_t at = chunks * kBytes; at < row_bytes; ++at, ++row) rest ^= static_cast<int64_t>(*row) << at % 8 * 8;
  }
  alignas(32) int64_t parts[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sums);
  return parts[0] ^ parts[1] ^ parts[2] ^ parts[3] ^ rest;
}

int64_t scan_x86(const Part& part) {
  if (part.rows.row_bytes % 256 == 0) return scan_avx2<256>(part);
  if (part.rows.row_bytes % 128 == 0) return scan_avx2<128>(part);
  return part.rows.row_bytes % 64 == 0 ? scan_avx2<64>(part) : scan_avx2<32>(part);
}

bool has_avx2() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return found && std::strcmp(instruction_set(), "portable") != 0;
}
#endif

int64_t scan_plain(const Part& part) {
  int64_t sum = 0;
  for (int64_t i = part.begin; i < part.end; ++i) {
    if (!part.has(i)) continue;
    const uint8_t* row = part.row(i);
    for (int64_t at = 0; at < part.rows.row_bytes; ++at) sum ^= static_cast<int64_t>(row[at]) << at % 8 * 8;
  }
  return sum;
}

constexpr int64_t kPage = 4096, kSampled = 64;

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

}  // namespace

int64_t gather_rows(const Rows& rows, const int64_t* row_ids, int64_t n, uint8_t* out, int64_t threads) {
  using Loop = int64_t (*)(const Part&);
  Loop loop = gather_plain;
#ifdef ENGRAM_X86
  const int64_t out_bytes = rows.format == RowFormat::kCopy ? rows.row_bytes : rows.dim * 4;
  const bool streaming = n * out_bytes >= kStreamBytes && out_bytes % (4 * kGroup) == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (has_avx2()) loop = streaming ? avx2::gather<true> : avx2::gather<false>;
  if (!std::strcmp(instruction_set(), "avx512")) loop = streaming ? avx512::gather<true> : avx512::gather<false>;
#endif
  std::atomic<int64_t> bad{-1};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    const int64_t wrong = loop({rows, row_ids, begin, end, n, out});
    if (wrong != -1) bad = wrong;
  });
  return bad;
}

int64_t scan_rows(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n, int64_t threads) {
  const Rows all{data, nullptr, rows, row_bytes, row_bytes, RowFormat::kCopy};
  std::atomic<int64_t> total{0};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    const Part part{all, row_ids, begin, end, n, nullptr};
#ifdef ENGRAM_X86
    total ^= has_avx2() ? scan_x86(part) : scan_plain(part);
#else
    total ^= scan_plain(part);
#endif
  });
  return total;
}

int64_t touch_rows(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n, int64_t threads, bool count) {
  if (!count && looks_resident(data, rows, row_bytes, row_ids, n)) return n;
  std::atomic<int64_t> warm{0};
  parallel_wait(n, 64, threads, [&](int64_t begin, int64_t end) {
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
