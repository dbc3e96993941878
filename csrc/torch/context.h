// torch behind the library's Context and TensorView. Conversion and allocation only: no op logic.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "indexcache/context.h"
#include "indexcache/ops.h"

namespace indexcache::torch_binding {

using torch::stable::Tensor;

TensorView view(const Tensor& tensor);
MaybeView view(const std::optional<Tensor>& tensor);

/// Allocates through torch's allocators, so that memory follows the current stream and graph pools.
class TorchContext final : public Context {
 public:
  TensorView output(DType dtype, std::span<const int64_t> sizes, Device device) override;
  void* scratch(int64_t bytes, Device device) override;
  void* stream(Device device) override;
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) override;

  /// The i-th tensor that the op allocated with output().
  const Tensor& result(size_t i) const { return outputs_.at(i); }

 private:
  std::vector<Tensor> outputs_;
  std::vector<Tensor> scratch_;
};

}  // namespace indexcache::torch_binding
