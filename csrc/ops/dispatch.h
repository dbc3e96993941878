// From a checked call to a kernel: the backend is chosen here and nowhere else.
#pragma once

#include <type_traits>

#include "csrc/cpu/cpu.h"
#include "csrc/ops/check.h"
#include "indexcache/backend.h"

#if INDEXCACHE_WITH_CUDA
#include "csrc/cuda/common/device.h"
#include "csrc/cuda/generic/generic.h"
#include "csrc/cuda/sm90/sm90.h"
#define INDEXCACHE_GENERIC(function) &generic::function
#define INDEXCACHE_SM90(function) &sm90::function
#else
namespace indexcache::generic {
using Stream = struct CUstream_st*;
}
#define INDEXCACHE_GENERIC(function) nullptr
#define INDEXCACHE_SM90(function) nullptr
#endif

namespace indexcache::ops {

/// The implementations of one kernel family. INDEXCACHE_KERNELS(topk) names those that every family has.
template <class Params>
struct Kernels {
  void (*cpu)(const Params&, Context&);
  void (*generic)(const Params&, generic::Stream);
  void (*sm90)(const Params&, generic::Stream) = nullptr;
  /// Bytes that `sm90` wants at params.scratch; null: none.
  int64_t (*sm90_scratch)(const Params&) = nullptr;
};

#define INDEXCACHE_KERNELS(function) {&cpu::function, INDEXCACHE_GENERIC(function)}
#define INDEXCACHE_SM90_KERNELS(function) {&cpu::function, INDEXCACHE_GENERIC(function), INDEXCACHE_SM90(function)}
#define INDEXCACHE_SM90_SCRATCH_KERNELS(function) \
  {&cpu::function, INDEXCACHE_GENERIC(function), INDEXCACHE_SM90(function), INDEXCACHE_SM90(function##_scratch)}

/// Runs `kernels` on `params` with the backend that serves `check.op()`.
template <class Params>
void launch(const Check& check, Context& ctx, const CallShape& shape, const Params& params,
            std::type_identity_t<Kernels<Params>> kernels) {
  const Device device = check.device();
  const Backend backend = choose_backend(check.op(), device, shape);
  if (backend == Backend::cpu) return kernels.cpu(params, ctx);
#if INDEXCACHE_WITH_CUDA
  const cuda::DeviceGuard guard(device.index);
  const auto stream = static_cast<generic::Stream>(ctx.stream(device));
  if (backend != Backend::sm90) return kernels.generic(params, stream);
  if constexpr (requires { params.scratch; }) {
    Params with_scratch = params;
    const int64_t bytes = kernels.sm90_scratch(params);
    if (bytes > 0) with_scratch.scratch = ctx.scratch(bytes, device);
    kernels.sm90(with_scratch, stream);
  } else {
    kernels.sm90(params, stream);
  }
#endif
}

}  // namespace indexcache::ops
