#include "csrc/torch/context.h"

#include <utility>

#include "indexcache/error.h"

// Only CUDA builds of torch define it. A weak reference lets the same library load under CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace indexcache::torch_binding {
namespace {

using torch::headeronly::ScalarType;

constexpr std::pair<ScalarType, DType> kDTypes[] = {
    {ScalarType::Float, DType::f32},   {ScalarType::BFloat16, DType::bf16}, {ScalarType::Float8_e4m3fn, DType::e4m3},
    {ScalarType::Byte, DType::u8},     {ScalarType::Int, DType::i32},       {ScalarType::Long, DType::i64},
    {ScalarType::Double, DType::f64},  {ScalarType::Half, DType::f16},      {ScalarType::Char, DType::i8},
    {ScalarType::Short, DType::i16},   {ScalarType::UInt16, DType::u16},    {ScalarType::UInt32, DType::u32},
    {ScalarType::UInt64, DType::u64},  {ScalarType::Bool, DType::boolean}};

DType dtype_of(const Tensor& tensor) {
  for (const auto& [theirs, ours] : kDTypes) {
    if (theirs == tensor.scalar_type()) return ours;
  }
  return DType::other;
}

ScalarType scalar_type(DType dtype) {
  for (const auto& [theirs, ours] : kDTypes) {
    if (ours == dtype) return theirs;
  }
  throw Error("torch", std::string("no torch dtype for ") + name(dtype));
}

torch::stable::Device torch_device(Device device) {
  using torch::headeronly::DeviceType;
  return device.type == indexcache::DeviceType::cuda ? torch::stable::Device(DeviceType::CUDA, device.index)
                                                     : torch::stable::Device(DeviceType::CPU);
}

Tensor empty(DType dtype, std::span<const int64_t> sizes, Device device) {
  return torch::stable::empty({sizes.data(), sizes.size()}, scalar_type(dtype), std::nullopt, torch_device(device));
}

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView result;
  result.rank = static_cast<int>(tensor.dim());
  if (result.rank > kMaxRank) {
    throw Error("torch", "expected tensors of at most 8 dimensions, got " + std::to_string(result.rank));
  }
  result.data = tensor.data_ptr();
  result.dtype = dtype_of(tensor);
  result.device.type = tensor.is_cpu()    ? DeviceType::cpu
                       : tensor.is_cuda() ? DeviceType::cuda
                                          : DeviceType::other;
  result.device.index = result.device.type == DeviceType::cuda ? tensor.get_device_index() : 0;
  for (int dim = 0; dim < result.rank; ++dim) {
    result.sizes[dim] = tensor.size(dim);
    result.strides[dim] = tensor.stride(dim);
  }
  return result;
}

MaybeView view(const std::optional<Tensor>& tensor) { return tensor ? MaybeView(view(*tensor)) : std::nullopt; }

TensorView TorchContext::output(DType dtype, std::span<const int64_t> sizes, Device device) {
  outputs_.push_back(empty(dtype, sizes, device));
  return view(outputs_.back());
}

void* TorchContext::scratch(int64_t bytes, Device device) {
  scratch_.push_back(empty(DType::u8, {{bytes}}, device));
  return scratch_.back().data_ptr();
}

void* TorchContext::stream(Device device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw Error("torch", "expected a CUDA build of torch for a tensor on " + to_string(device) + ", got a CPU-only build");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return stream;
}

void TorchContext::parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace indexcache::torch_binding
