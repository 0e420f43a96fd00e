// Advice to the operating system about the memory of large outputs.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks the kernel of the system for huge pages under a large output. The allocator returns memory that is not mapped
// yet, and mapping its pages of 4 KiB one by one would take most of the time of a pass. This is advice: failure does no
// harm.
void advise(const torch::stable::Tensor& out) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 4096;
  constexpr int64_t LARGE = 8 << 20;
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes < LARGE) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()), end = begin + bytes;
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), end / PAGE * PAGE - first, MADV_HUGEPAGE);
#endif
}

void advise(const std::optional<torch::stable::Tensor>& out) {
  if (out) advise(*out);
}

}  // namespace
