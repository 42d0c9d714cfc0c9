// Work shared between threads. Small inputs stay on the caller's thread.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace engram {

// The first exception of several threads, thrown again where they have met: one that left its own thread would end the process.
class FirstError {
 public:
  template <class Fn>
  void guard(const Fn& fn) noexcept {
    try {
      fn();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Calls fn(begin, end) on parts of [0, count), each at least `grain` long, on at most `threads` threads of its own: for work that waits (for
// a disk), where there may be more threads than cores.
template <class Fn>
void parallel_wait(int64_t count, int64_t grain, int64_t threads, const Fn& fn) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(grain, 1)));
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  FirstError first;
  const auto run = [&](int64_t begin, int64_t end) { first.guard([&] { fn(begin, end); }); };
  int64_t begin = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t end = count * (part + 1) / parts;
    if (part + 1 == parts) {
      run(begin, end);
    } else {
      try {
        others.emplace_back(run, begin, end);
      } catch (...) {  // the system gives no more threads
        run(begin, end);
      }
    }
    begin = end;
  }
  for (auto& other : others) other.join();
  first.rethrow();
}

// The entry of the OpenMP library that PyTorch has loaded for everybody, or null. Its threads spin for a while after each of PyTorch's
// operations: a thread of our own would fight them for the core, whereas one of theirs begins at once.
//
// A forked child has the pool's memory, but not its threads, and would wait for them. It is told so even if no kernel ran before the fork:
// the first to need threads may have been PyTorch.
#if defined(__linux__)
inline std::atomic<bool> is_forked{false};
inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });  // when the core is loaded
#endif
using OpenMpEntry = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline OpenMpEntry shared_pool() {
#if defined(__linux__)
  static const OpenMpEntry found = reinterpret_cast<OpenMpEntry>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : found;
#else
  return nullptr;
#endif
}

// As parallel_wait, for work that computes: on PyTorch's own threads where they can be had.
template <class Fn>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Fn& fn) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(grain, 1)));
  if (parts == 1) {
    fn(int64_t{0}, count);
    return;
  }
  const OpenMpEntry pool = shared_pool();
  if (!pool) {
    parallel_wait(count, grain, threads, fn);
    return;
  }
  struct Shared {
    const Fn& fn;
    int64_t count, parts;
    std::atomic<int64_t> next;
    FirstError first;
  } shared{fn, count, parts, {0}, {}};
  pool(
      [](void* data) {
        Shared& work = *static_cast<Shared*>(data);
        // However many threads have come: nested calls, for one, get a single one.
        for (int64_t part; (part = work.next.fetch_add(1)) < work.parts;)
          work.first.guard([&] { work.fn(work.count * part / work.parts, work.count * (part + 1) / work.parts); });
      },
      &shared, static_cast<unsigned>(parts), 0);
  shared.first.rethrow();
}

}  // namespace engram
