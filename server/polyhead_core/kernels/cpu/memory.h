// Memory on huge pages, which large sequential reads need to reach the machine's bandwidth (a third more on a Zen 3), and
// memory that is used again.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <cstdint>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace polyhead {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Asks for huge pages under the whole ones of this range; a wish, which the system may not grant.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A run of memory that small tensors share, so that they lie on huge pages one behind the other.
class Chunk {
 public:
  explicit Chunk(int64_t bytes)
      : bytes_(bytes), data_(static_cast<char*>(std::aligned_alloc(HUGE_PAGE, bytes)), &std::free) {
    TORCH_CHECK(data_ != nullptr, "no memory for ", bytes, " bytes of packed weights");
    advise_huge_pages(data_.get(), bytes);
  }

  // nullptr where it is full.
  char* take(int64_t bytes) {
    const int64_t begin = used_;
    if (begin + bytes > bytes_) return nullptr;
    used_ = (begin + bytes + 63) / 64 * 64;
    return data_.get() + begin;
  }

 private:
  int64_t bytes_, used_ = 0;
  std::unique_ptr<char, void (*)(void*)> data_;
};

// An uninitialised int8 tensor; freed with the last tensor of its chunk.
inline at::Tensor empty_on_huge_pages(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> current;
  constexpr int64_t CHUNK = 8 * HUGE_PAGE;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Chunk> chunk = current.lock();
  char* data = chunk ? chunk->take(bytes) : nullptr;
  if (!data) {
    chunk = std::make_shared<Chunk>(std::max(CHUNK, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE));
    data = chunk->take(bytes);
    if (bytes < CHUNK) current = chunk;
  }
  return at::from_blob(data, {bytes}, [chunk](void*) {}, at::TensorOptions().dtype(at::kChar));
}

// A float result whose memory is used again once nobody holds the last one: what malloc gives back to the system comes
// again as new pages, which the system fills with zeros first.
class ReusedResult {
 public:
  at::Tensor empty(int64_t rows, int64_t width) {
    constexpr int64_t MOST_BYTES = 64 << 20;  // larger ones are rare, and too much to keep
    const c10::InferenceMode outside(false);  // a tensor made in inference mode could not be used outside of it
    if (rows * width * static_cast<int64_t>(sizeof(float)) > MOST_BYTES) return at::empty({rows, width});
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool is_free = memory_.defined() && memory_.storage().use_count() == 1;
    if (!is_free || memory_.numel() < rows * width) memory_ = at::empty({rows * width});
    return memory_.narrow(0, 0, rows * width).view({rows, width});
  }

 private:
  std::mutex mutex_;
  at::Tensor memory_;
};

}  // namespace polyhead
