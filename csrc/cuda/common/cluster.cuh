// Blocks of a cluster: their barrier, and each other's shared memory.
//
// Addresses of other blocks never become pointers: some compilers lose accesses through a pointer that may mean either.
#pragma once

#include <cstdint>

#include "csrc/cuda/common/mbarrier.cuh"

namespace indexcache::cuda {

/// All threads of all blocks; what they wrote before is visible after it. A block alone needs no cluster barrier.
template <int kCluster>
__device__ inline void cluster_sync() {
  if constexpr (kCluster > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}

/// The same in two halves, of which nothing written before need be visible: only that all blocks have come so far.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

/// The address at which `rank`'s block has what this block has at `local`.
__device__ inline uint32_t address_in(int rank, const void* local) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  return address;
}

__device__ inline uint32_t load_from(int rank, const uint32_t* local) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address_in(rank, local)) : "memory");
  return value;
}

__device__ inline void store_to(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
/// Eight aligned bytes.
__device__ inline void store_to(uint32_t address, uint32_t low, uint32_t high) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high) : "memory");
}

// Barriers in another block's memory, and stores there whose bytes they count. Once all bytes have arrived, they are
// visible to whoever waits: no fence is needed, which would take longer than everything else here.

__device__ inline void arrive_expecting_at(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void store_counted(uint32_t address, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(barrier)
               : "memory");
}
/// Eight or sixteen aligned bytes.
__device__ inline void store_counted(uint32_t address, uint32_t low, uint32_t high, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(low), "r"(high), "r"(barrier)
               : "memory");
}
__device__ inline void store_counted(uint32_t address, uint4 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
}

}  // namespace indexcache::cuda
