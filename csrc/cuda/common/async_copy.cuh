// Copies from global to shared memory, at a 32-bit address, that run while the thread goes on (cp.async), in groups
// that complete in order.
#pragma once

#include <cstdint>

#include "csrc/cuda/common/l2_policy.cuh"
#include "csrc/cuda/common/mbarrier.cuh"

namespace indexcache::cuda {

/// Both addresses are multiples of 16 bytes. For what is read once: leaves the L1 cache alone, and in L2 takes the
/// place of other such data first, so that what lies there stays, and need not be written back if it is dirty.
__device__ inline void copy_16_bytes_once(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(evict_first())
               : "memory");
}

/// The same with zeros behind the first `bytes`, the only ones that are read.
__device__ inline void copy_first_bytes(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// Ends this thread's group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Arrives at a barrier, one of the arrivals that it counts, as soon as all copies of this thread so far are complete.
__device__ inline void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Waits until all but the last `kPending` groups of this thread have arrived.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace indexcache::cuda
