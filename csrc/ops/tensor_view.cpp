#include "indexcache/tensor_view.h"

namespace indexcache {

const char* name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float8_e4m3fn", "uint8",  "int32",
                                    "int64",   "float64",  "float16",       "int8",   "int16",
                                    "uint16",  "uint32",   "uint64",        "bool",   "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

int64_t size_of(DType dtype) {
  constexpr int64_t kSizes[] = {4, 2, 1, 1, 4, 8, 8, 2, 1, 2, 2, 4, 8, 1, 0};
  return kSizes[static_cast<int>(dtype)];
}

std::string to_string(Device device) {
  switch (device.type) {
    case DeviceType::cpu: return "cpu";
    case DeviceType::cuda: return "cuda:" + std::to_string(device.index);
    default: return "another device";
  }
}

int64_t TensorView::numel() const {
  int64_t count = 1;
  for (int dim = 0; dim < rank; ++dim) count *= sizes[dim];
  return count;
}

bool TensorView::contiguous(int first) const {
  int64_t expected = 1;
  for (int dim = rank - 1; dim >= first; --dim) {
    if (sizes[dim] == 0) return true;
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

TensorView TensorView::dense(void* data, DType dtype, std::span<const int64_t> sizes, Device device) {
  TensorView view{data, dtype, device, static_cast<int>(sizes.size()), {}, {}};
  int64_t stride = 1;
  for (int dim = view.rank - 1; dim >= 0; --dim) {
    view.sizes[dim] = sizes[dim];
    view.strides[dim] = stride;
    stride *= sizes[dim];
  }
  return view;
}

static std::string list(const std::array<int64_t, kMaxRank>& values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string to_string(const TensorView& view) {
  std::string text = std::string(name(view.dtype)) + " " + list(view.sizes, view.rank);
  if (!view.contiguous()) text += " with strides " + list(view.strides, view.rank);
  return text + " on " + to_string(view.device);
}

}  // namespace indexcache
