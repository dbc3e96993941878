// Scores as integers that sort the same way.
#pragma once

#include "csrc/common/numeric.h"

namespace indexcache::cuda {

/// The key of NaN and -inf, below every other.
inline constexpr uint32_t kNeverSelected = 0;

/// Larger score, larger key; -0 and +0 share one.
INDEXCACHE_HOST_DEVICE inline uint32_t ordered_key(float score) {
  if (!(score > -__builtin_inff())) return kNeverSelected;
  const uint32_t bits = score == 0.0f ? 0u : float_bits(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace indexcache::cuda
