// The streaming pass of topk, see csrc/cpu/topk_scan.h.
#include <cstdint>
#include <cstring>

#include "csrc/cpu/simd.h"
#include "csrc/cpu/topk_scan.h"

namespace indexcache::cpu::INDEXCACHE_ISA {
namespace {

constexpr int kBlock = 64;  // logits whose comparisons make one mask

/// The keys of a block, compared: bit i is set where low <= key_of(logits[i]) <= kHighestKey.
uint64_t block_mask(const float* logits, Ints low) {
  const Ints high = broadcast(kHighestKey);
  uint64_t mask = 0;
  for (int i = 0; i < kBlock; i += kLanes) {
    const Ints bits = load<Ints>(logits + i);
    const Ints sign = bits >> 31;
    const Ints key = ((bits & 0x7fffffff) ^ sign) - sign;
    mask |= static_cast<uint64_t>(lanes_between(key, low, high)) << i;
  }
  return mask;
}

}  // namespace

int64_t collect(const float* logits, int64_t n, int32_t threshold, const Candidates& out) {
  const Ints low = broadcast(threshold);
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    if (count > out.capacity - kBlock) return -1;
    const float* block = logits + first;
    float padded[kBlock];
    if (n - first < kBlock) {
      for (int i = 0; i < kBlock; ++i) padded[i] = first + i < n ? block[i] : -__builtin_inff();
      block = padded;
    }
    for (uint64_t mask = block_mask(block, low); mask != 0; mask &= mask - 1) {
      const int i = __builtin_ctzll(mask);
      out.keys[count] = key_of(block[i]);
      out.columns[count] = static_cast<int32_t>(first + i);
      ++count;
    }
  }
  return count;
}

}  // namespace indexcache::cpu::INDEXCACHE_ISA
