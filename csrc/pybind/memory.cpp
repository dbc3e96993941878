#include "csrc/pybind/memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>

#include "indexcache/error.h"

#if INDEXCACHE_WITH_CUDA
#include <cuda_runtime_api.h>

#include "csrc/cuda/common/device.h"
#endif

namespace indexcache::pybind {
namespace {

constexpr std::align_val_t kHostAlignment{64};

#if INDEXCACHE_WITH_CUDA
void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error("_C", std::string(what) + " failed: " + cudaGetErrorString(status));
}
#endif

/// OMP_NUM_THREADS as everywhere in numerical Python, else every core.
int64_t thread_count() {
  const char* limit = std::getenv("OMP_NUM_THREADS");
  const int64_t wanted = limit ? std::atol(limit) : 0;
  return wanted > 0 ? wanted : std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

Memory::Memory(int64_t bytes, Device device, void* stream) : device_(device), stream_(stream) {
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  if (device.type == DeviceType::cpu) {
    data_ = ::operator new(size, kHostAlignment);
    return;
  }
#if INDEXCACHE_WITH_CUDA
  const cuda::DeviceGuard guard(device.index);
  check_cuda(cudaMallocAsync(&data_, size, static_cast<cudaStream_t>(stream)), "cudaMallocAsync");
#else
  throw Error("_C", "this build has no CUDA support");
#endif
}

Memory::~Memory() {
  if (device_.type == DeviceType::cpu) {
    ::operator delete(data_, kHostAlignment);
    return;
  }
#if INDEXCACHE_WITH_CUDA
  const cuda::DeviceGuard guard(device_.index);
  cudaFreeAsync(data_, static_cast<cudaStream_t>(stream_));
#endif
}

void Memory::order_before([[maybe_unused]] void* consumer) const {
#if INDEXCACHE_WITH_CUDA
  if (device_.type == DeviceType::cpu || consumer == stream_) return;
  const cuda::DeviceGuard guard(device_.index);
  cudaEvent_t done;
  check_cuda(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventRecord(done, static_cast<cudaStream_t>(stream_)), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(consumer), done, 0), "cudaStreamWaitEvent");
  check_cuda(cudaEventDestroy(done), "cudaEventDestroy");
#endif
}

TensorView PlainContext::output(DType dtype, std::span<const int64_t> sizes, Device device) {
  TensorView view = TensorView::dense(nullptr, dtype, sizes, device);
  auto memory = std::make_shared<Memory>(view.numel() * size_of(dtype), device, stream_);
  view.data = memory->data();
  outputs_.push_back({view, std::move(memory)});
  return view;
}

void* PlainContext::scratch(int64_t bytes, Device device) {
  scratch_.push_back(std::make_unique<Memory>(bytes, device, stream_));
  return scratch_.back()->data();
}

void PlainContext::parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  static const int64_t limit = thread_count();
  const int64_t threads = std::clamp<int64_t>(n / std::max<int64_t>(1, grain), 1, limit);
  const int64_t share = (n + threads - 1) / threads;
  std::vector<std::jthread> workers;  // joined by their destructors
  for (int64_t begin = share; begin < n; begin += share) {
    workers.emplace_back([&body, begin, end = std::min(n, begin + share)] { body(begin, end); });
  }
  if (n > 0) body(0, std::min(n, share));
}

}  // namespace indexcache::pybind
