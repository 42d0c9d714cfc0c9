// Rows of a table by number, copied or turned into float32 on the way.
#pragma once
#include <cstdint>

namespace engram {

enum class RowFormat : int64_t {
  kCopy = 0,      // bytes as they are
  kBfloat16 = 1,  // bfloat16 -> float32
  kFloat16 = 2,   // float16 -> float32
  kInt8 = 3,      // int8, one float32 scale per row -> float32
  kFloat8 = 4,    // float8 e4m3fn, one power of two (biased exponent, a byte) per 32 values -> float32
  kInt4 = 5,      // two values per byte (low half first), -8..7, one float32 scale per row -> float32
};

struct Rows {
  const uint8_t* data;    // [rows, row_bytes]
  const uint8_t* scales;  // per row: 4 bytes, or dim / 32 bytes; null where the format has none
  int64_t rows, dim, row_bytes;
  RowFormat format;
};

// Writes rows [n, dim] (float32, or bytes as they are). Returns -1, or the position of the first row number that is out of range.
int64_t gather_rows(const Rows& rows, const int64_t* row_ids, int64_t n, uint8_t* out, int64_t threads);

// Reads a byte of every page of the rows (row numbers out of range are passed over), so that those of a mapped file come in together; does
// nothing if a sample of them is in memory already. With `count`, asks for each row and returns how many were in memory before.
int64_t touch_rows(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n, int64_t threads, bool count);

// Reads every byte of the rows (row numbers out of range are passed over) and writes nothing: what a gather could reach at best. The
// result is made of all of them, so that no read can be left out.
int64_t scan_rows(const uint8_t* data, int64_t rows, int64_t row_bytes, const int64_t* row_ids, int64_t n, int64_t threads);

}  // namespace engram
