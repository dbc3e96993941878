#include "csrc/cuda/common/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <string>

#include "indexcache/error.h"

namespace indexcache::cuda {

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check("device", cudaGetDevice(&current));
  if (current == device) return;
  check("device", cudaSetDevice(device));
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

namespace {

using PerDevice = std::array<std::atomic<int>, 64>;  // 0: not asked yet; two threads that ask get the same answer

template <class Ask>
int ask_once(PerDevice& known, int device, Ask ask) {
  const bool cached = device >= 0 && static_cast<size_t>(device) < known.size();
  if (cached && known[device] != 0) return known[device];
  const int answer = ask();
  if (cached) known[device] = answer;
  return answer;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check("device", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

int compute_capability(int device) {
  static PerDevice known{};
  return ask_once(known, device, [=] {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

int current_device() {
  int device = 0;
  check("device", cudaGetDevice(&device));
  return device;
}

int sm_count() {
  static PerDevice known{};
  const int device = current_device();
  return ask_once(known, device, [=] { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

void check(const char* op, int status) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  cudaGetLastError();  // an error that is reported here must not surface again in an unrelated call
  throw Error(op, std::string("CUDA error ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

void check_launch(const char* op) { check(op, cudaGetLastError()); }

}  // namespace indexcache::cuda
