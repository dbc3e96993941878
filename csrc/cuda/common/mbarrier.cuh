// Barriers in shared memory that count arrivals of threads and bytes of the copy engine.
//
// A barrier runs through phases 0, 1, 2, …; a waiter names the parity of the phase whose end it waits for. The wait for
// the "phase before the first", parity 1 of a fresh barrier, returns at once: so a ring starts with all stages free.
#pragma once

#include <cstdint>

#include "csrc/cuda/common/warp.cuh"

namespace indexcache::cuda {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// A barrier of the first `kCount` threads that come, in whole warps: those that name the same id, 1 … 15.
template <int kCount>
__device__ inline void sync_threads(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kCount) : "memory");
}

/// A phase ends after `arrivals` arrivals, and the bytes that they announced.
__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// Between ordinary accesses to shared memory and those of the copy engine or the tensor cores: each writing thread
/// calls it before it arrives, or each reading thread after its wait.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Between the last init_barrier() and the first copy: makes barriers visible to the copy engine.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async_proxy();
}

/// By shared_address(), as all below that take an address: a loop may keep it where the compiler would compute it anew.
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive(uint64_t* barrier) { arrive(shared_address(barrier)); }

/// One arrival for the warp, after all its lanes' accesses. The barrier is a pointer or an address.
template <class Barrier>
__device__ void warp_arrive(Barrier barrier) {
  __syncwarp();
  if (lane_id() == 0) arrive(barrier);
}

__device__ inline void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline bool phase_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n  .reg .pred p;\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "  selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  while (!phase_ended(barrier, parity)) {
  }
}
__device__ inline void wait(uint64_t* barrier, uint32_t parity) { wait(shared_address(barrier), parity); }

}  // namespace indexcache::cuda
