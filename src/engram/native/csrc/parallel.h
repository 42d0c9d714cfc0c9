// Work shared between a few short-lived threads. Small inputs stay on the caller's thread: starting a thread costs tens of microseconds,
// and a pool kept alive would not survive fork().
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace engram {

// Calls fn(begin, end) on parts of [0, count), each at least `grain` long, on at most `threads` threads.
template <class Fn>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Fn& fn) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(grain, 1)));
  if (parts == 1) {
    fn(int64_t{0}, count);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  int64_t begin = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t end = count * (part + 1) / parts;
    if (part + 1 == parts) {
      fn(begin, end);
    } else {
      try {
        others.emplace_back(fn, begin, end);
      } catch (...) {  // the system gives no more threads
        fn(begin, end);
      }
    }
    begin = end;
  }
  for (auto& other : others) other.join();
}

}  // namespace engram
