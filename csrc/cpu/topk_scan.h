// The order of logits, and the streaming pass of topk.
#pragma once

#include <cstdint>

#include "csrc/cpu/isa.h"

namespace indexcache::cpu {

/// Keys order like floats, with -0 equal to +0: the magnitude with the sign of the float. NaN and -inf fall outside
/// [kLowestKey, kHighestKey]. Integers, so that nothing depends on the denormal mode of the thread.
/// (Internal linkage: isa.h says why.)
inline constexpr int32_t kHighestKey = 0x7f800000;   // +inf
inline constexpr int32_t kLowestKey = -0x7f7fffff;  // the lowest finite float

static inline int32_t key_of(float logit) {
  const auto bits = __builtin_bit_cast(int32_t, logit);
  const int32_t magnitude = bits & 0x7fffffff;
  return bits < 0 ? -magnitude : magnitude;
}

struct Candidates {
  int32_t* keys;
  int32_t* columns;
  int64_t capacity;
};

/// Appends the key and the position of every logit with key >= threshold, in order. Returns their number, or -1 if they
/// might not fit.
INDEXCACHE_ISA_FUNCTION(int64_t, collect, const float* logits, int64_t n, int32_t threshold, const Candidates& out)

}  // namespace indexcache::cpu
