// The CUDA runtime as the op entries see it: no CUDA header, so that they compile without the toolkit's.
#pragma once

namespace indexcache::cuda {

/// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

/// 10 * major + minor, e.g. 90; asked once per device. Throws Error where there is no such device.
int compute_capability(int device);

int current_device();

/// Multiprocessors of the current device; asked once per device.
int sm_count();

/// Throws Error with the runtime's text unless `status` (a cudaError_t) is success.
void check(const char* op, int status);

/// The same for the kernel just launched.
void check_launch(const char* op);

}  // namespace indexcache::cuda
