// All of torch's threads inside one parallel region, with a barrier: many short phases cost one fork and join.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace polyhead {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  // Calls idle() meanwhile, again and again; it returns whether it did anything.
  template <typename Idle>
  void wait(Idle& idle) {
    if (size_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // A thread that we wait for may have lost its core to another process. Yielding early would hand it ours as well.
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins >= SPINS) std::this_thread::yield();
      else if (!idle()) pause();
    }
  }

 private:
  static constexpr int SPINS = 1 << 16;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

struct Member {
  int64_t rank, size;
  Barrier* barrier;

  template <typename Idle>
  void wait(Idle& idle) const { barrier->wait(idle); }
  void wait() const {
    const auto nothing = [] { return false; };
    wait(nothing);
  }

  // This member's share of `items`, in whole multiples of `unit`.
  std::pair<int64_t, int64_t> share(int64_t items, int64_t unit = 1) const {
    const int64_t units = (items + unit - 1) / unit;
    return {std::min(items, units * rank / size * unit), std::min(items, units * (rank + 1) / size * unit)};
  }
};

// Numbers from 0 on, each for one of the threads that take them.
struct alignas(64) Counter {
  std::atomic<int64_t> next{0};

  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// Calls body(member) once on each thread of the team; `alone` where the work is too little to share.
template <typename Body>
void with_team(bool alone, const Body& body) {
#if defined(_OPENMP) && AT_PARALLEL_OPENMP
  if (!alone && !at::in_parallel_region() && at::get_num_threads() > 1) {
    const int threads = at::get_num_threads();
    Barrier barrier(threads);
    std::atomic<bool> whole{true};
    // The range is far larger than any team, so that each thread is called exactly once, whatever their number.
    at::parallel_for(0, int64_t{1} << 20, 1, [&](int64_t, int64_t) {
      if (omp_get_num_threads() != threads) {
        whole.store(false);
        return;
      }
      body(Member{omp_get_thread_num(), threads, &barrier});
    });
    if (whole.load()) return;
  }
#endif
  Barrier barrier(1);
  body(Member{0, 1, &barrier});
}

}  // namespace polyhead
