// Memory and threads for callers that bring neither: what torch does for the other binding.
#pragma once

#include <memory>
#include <vector>

#include "indexcache/context.h"

namespace indexcache::pybind {

/// One allocation, freed with its last owner: host memory, or stream-ordered CUDA memory.
class Memory {
 public:
  Memory(int64_t bytes, Device device, void* stream);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }
  Device device() const { return device_; }
  /// Work that `consumer` does from here on sees what was written on the stream of the allocation.
  void order_before(void* consumer) const;

 private:
  void* data_ = nullptr;
  Device device_;
  void* stream_;
};

struct OwnedTensor {
  TensorView view;
  std::shared_ptr<Memory> memory;
};

/// A Context on plain memory, the caller's stream and std::thread.
class PlainContext final : public Context {
 public:
  explicit PlainContext(uint64_t stream) : stream_(reinterpret_cast<void*>(stream)) {}

  TensorView output(DType dtype, std::span<const int64_t> sizes, Device device) override;
  void* scratch(int64_t bytes, Device device) override;
  void* stream(Device) override { return stream_; }
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) override;

  const std::vector<OwnedTensor>& outputs() const { return outputs_; }

 private:
  void* stream_;
  std::vector<OwnedTensor> outputs_;
  std::vector<std::unique_ptr<Memory>> scratch_;
};

}  // namespace indexcache::pybind
