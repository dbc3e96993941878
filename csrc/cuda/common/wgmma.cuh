// Matrix products of a warpgroup (sm_90a): e4m3 x e4m3 -> f32, both operands in shared memory.
//
// Operands are rows of K: A is 64 rows, B is N rows, and D[m][n] = sum_k A[m][k] * B[n][k]. A row is 128 or 64 bytes
// and carries the swizzle that TMA wrote with, of the same width, in tiles aligned to 8 rows.
//
// Thread t of the warpgroup holds, in d[4 * j + 2 * i + c], row 16 * (t / 32) + 8 * i + (t % 32) / 4 and column
// 8 * j + 2 * (t % 4) + c of D.
#pragma once

#include <cstdint>

#include "csrc/cuda/common/mbarrier.cuh"

namespace indexcache::cuda {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWgmmaStep = 32;  // bytes of K per instruction

/// Moves the registers of a warpgroup: the producer gives what the math warpgroups take. Multiples of 8.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Describes a K-major operand at a shared_address(), whose rows are `kRowBytes` long and swizzled over that length.
/// PTX ISA, "Matrix Descriptor": address / 16 in bits 0-13; leading offset (unused when a row is one swizzle span) in
/// 16-29; distance of 8-row groups / 16 in 32-45; swizzle in 62-63 (1: 128 bytes, 2: 64 bytes). Step s of K adds s * 32
/// bytes.
template <int kRowBytes>
__device__ inline uint64_t operand(uint32_t tile) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kGroup = 8 * kRowBytes / 16;
  return kSwizzle << 62 | kGroup << 32 | uint64_t{1} << 16 | (tile & 0x3ffff) >> 4;
}
inline constexpr uint64_t kOperandStep = kWgmmaStep / 16;

/// Before the first product of a sequence: orders it after earlier accesses to its registers.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Ends a group of products.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `kPending` groups are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// After the wait: keeps the compiler from reading the registers earlier.
template <int kCount>
__device__ inline void wgmma_results(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define INDEXCACHE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define INDEXCACHE_D16(i) INDEXCACHE_D4(i), INDEXCACHE_D4(i + 4), INDEXCACHE_D4(i + 8), INDEXCACHE_D4(i + 12)
#define INDEXCACHE_D32(i) INDEXCACHE_D16(i), INDEXCACHE_D16(i + 16)
#define INDEXCACHE_R0_15 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define INDEXCACHE_R16_31 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define INDEXCACHE_R32_63                                                               \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/// d (+)= A * B over one step of K, for N columns.
template <int N>
struct Wgmma;

// n: columns; registers and outputs list d; a, b, add: the numbers of the operands after them.
#define INDEXCACHE_WGMMA(n, registers, a, b, add, ...)                                                           \
  template <>                                                                                                    \
  struct Wgmma<n> {                                                                                              \
    template <bool kAccumulate>                                                                                  \
    static __device__ void step(float (&d)[n / 2], uint64_t left, uint64_t right) {                              \
      asm volatile("{\n  .reg .pred p;\n  setp.ne.b32 p, " add ", 0;\n"                                          \
                   "  wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" registers "}, " a ", " b        \
                   ", p, 1, 1;\n}"                                                                               \
                   : __VA_ARGS__                                                                                 \
                   : "l"(left), "l"(right), "n"(int{kAccumulate}));                                              \
    }                                                                                                            \
  };

INDEXCACHE_WGMMA(32, INDEXCACHE_R0_15, "%16", "%17", "%18", INDEXCACHE_D16(0))
INDEXCACHE_WGMMA(64, INDEXCACHE_R0_15 "," INDEXCACHE_R16_31, "%32", "%33", "%34", INDEXCACHE_D32(0))
INDEXCACHE_WGMMA(128, INDEXCACHE_R0_15 "," INDEXCACHE_R16_31 "," INDEXCACHE_R32_63, "%64", "%65", "%66",
                 INDEXCACHE_D32(0), INDEXCACHE_D32(32))

#undef INDEXCACHE_WGMMA
#undef INDEXCACHE_R32_63
#undef INDEXCACHE_R16_31
#undef INDEXCACHE_R0_15
#undef INDEXCACHE_D32
#undef INDEXCACHE_D16
#undef INDEXCACHE_D4

}  // namespace indexcache::cuda
