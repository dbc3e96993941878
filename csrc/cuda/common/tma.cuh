// Copies from global to shared memory by the copy engine (TMA). One thread issues a copy; `barrier` counts its bytes.
// A tile of a tensor map counts whole, also where parts of it lie outside the tensor and become zeros.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "csrc/cuda/common/mbarrier.cuh"

namespace indexcache::cuda {

/// True in one lane of a warp whose lanes all call it, always the same one. The compiler knows that it is one: a copy
/// that it issues takes uniform registers as they are, where `lane == 0` costs a loop over the lanes per copy.
__device__ inline bool elect() {
  uint32_t chosen;
  asm volatile(
      "{\n  .reg .pred p;\n"
      "  elect.sync _|p, 0xffffffff;\n"
      "  selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen));
  return chosen != 0;
}

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void prefetch_l2(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

/// Both addresses and the size are multiples of 16 bytes.
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
      "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  copy_bulk(shared_address(to), from, bytes, barrier);
}

__device__ inline void copy_tile(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

/// `policy`: of l2_policy.cuh.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

}  // namespace indexcache::cuda
