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

int compute_capability(int device) {
  static std::array<std::atomic<int>, 64> known{};  // 0: not asked yet; two threads that ask get the same answer
  const bool cached = device >= 0 && static_cast<size_t>(device) < known.size();
  if (cached && known[device] != 0) return known[device];
  int major = 0, minor = 0;
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const int capability = 10 * major + minor;
  if (cached) known[device] = capability;
  return capability;
}

void check(const char* op, int status) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  cudaGetLastError();  // an error that is reported here must not surface again in an unrelated call
  throw Error(op, std::string("CUDA error ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

void check_launch(const char* op) { check(op, cudaGetLastError()); }

}  // namespace indexcache::cuda
