// What an op needs from its caller besides tensors: memory, the stream, threads.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "indexcache/tensor_view.h"

namespace indexcache {

/// Implemented once per binding (torch, DLPack) and by any C++ program that calls the ops.
class Context {
 public:
  virtual ~Context() = default;

  /// A new dense tensor that the call returns; the caller of the op takes it over. Contents undefined.
  virtual TensorView output(DType dtype, std::span<const int64_t> sizes, Device device) = 0;

  /// Working memory, 256-byte aligned (64 on the CPU), valid until the work that this call puts on the stream is done.
  virtual void* scratch(int64_t bytes, Device device) = 0;

  /// The `cudaStream_t` that the caller works on.
  virtual void* stream(Device device) = 0;

  /// Calls `body(begin, end)` on disjoint ranges that cover [0, n), at least `grain` long where possible.
  virtual void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) = 0;
};

}  // namespace indexcache
