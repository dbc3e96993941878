// How a list of work items whose cost grows along the list (causal windows) is cut into equal shares.
#pragma once

#include <cstdint>

namespace indexcache::cpu {

/// A permutation of [0, n) that takes items from both ends in turn: 0, n-1, 1, n-2, …, so that every contiguous range
/// of it holds as many cheap items as dear ones.
inline int64_t from_both_ends(int64_t i, int64_t n) { return i % 2 == 0 ? i / 2 : n - 1 - i / 2; }

}  // namespace indexcache::cpu
