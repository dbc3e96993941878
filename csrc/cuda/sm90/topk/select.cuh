// What both kernels share: radix select over keys that the threads of a block hold, and the list of what is selected.
#pragma once

#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/topk/row.cuh"

namespace indexcache::sm90::radix_topk {

/// A thread's bins; thread 0 has the best.
inline constexpr int kOwnBins = kBins / kThreads;
struct alignas(16) OwnBins {
  uint32_t counts[kOwnBins];
};
__device__ inline OwnBins& own_bins(Histogram& histogram) {
  return reinterpret_cast<OwnBins*>(histogram.counts)[kThreads - 1 - threadIdx.x];
}

/// Zeroes the bins; the caller synchronises.
__device__ inline void clear(Histogram& histogram) { own_bins(histogram) = {}; }

/// Exclusive sum over the threads and their total; less than 2^16. `turn` alternates from call to call:
/// then each costs one barrier.
__device__ inline cuda::BlockSum block_sum(SelectShared& s, int turn, uint32_t value) {
  uint32_t* const totals = s.warp_totals[turn & 1];
  const uint32_t before = cuda::warp_exclusive_sum(value);
  if (lane_id() == kWarpSize - 1) totals[warp_id()] = before + value;
  __syncthreads();
  const uint32_t total = lane_id() < kWarps ? totals[lane_id()] : 0;
  // Two sums in one: shuffles and reductions of sixteen warps get in each other's way.
  const uint32_t both = __reduce_add_sync(kFullMask, total + (lane_id() < warp_id() ? total << 16 : 0));
  return {(both >> 16) + before, both & 0xffffu};
}

/// Narrows `parent` to the bin of it that holds rank `rank`, from 1 and from the top; bin i has 2^shift keys from low +
/// i * 2^shift on, the last bin all the rest. `inside` 0: there are fewer. Called by all threads; synchronises before it
/// reads and before it returns, and leaves the bins at zero.
__device__ inline Bin narrow(SelectShared& s, Histogram& histogram, const Bin& parent, uint32_t shift, uint32_t rank) {
  __syncthreads();
  const OwnBins own = own_bins(histogram);
  clear(histogram);
  uint32_t sums[kOwnBins];
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) sums[i] = own.counts[kOwnBins - 1 - i] + (i > 0 ? sums[i - 1] : 0);
  uint32_t before = cuda::warp_exclusive_sum(sums[kOwnBins - 1]);
  if (lane_id() == kWarpSize - 1) s.warp_totals[0][warp_id()] = before + sums[kOwnBins - 1];
  __syncthreads();
  const uint32_t total = lane_id() < warp_id() ? s.warp_totals[0][lane_id() % kWarps] : 0;
  before += parent.above + __reduce_add_sync(kFullMask, total);
  const uint32_t through = before + sums[kOwnBins - 1];
  if (threadIdx.x < kFew) s.few_keys[threadIdx.x] = kNoKey;
  if (threadIdx.x == kThreads - 1) {
    s.few = 0;
    if (through < rank) s.found = {parent.low, 0, through, 0};
  }
  if (before < rank && rank <= through) {
    // The sums through bin 0, 1, … rise past the rank. No chain of selections: each looks at one bin.
    uint32_t bin = kBins - 1 - threadIdx.x * kOwnBins, above = before, next = through;
#pragma unroll
    for (int i = 0; i < kOwnBins - 1; ++i) {
      const uint32_t sum = before + sums[i];
      bin -= sum < rank;
      above = max(above, sum < rank ? sum : 0);
      next = min(next, sum < rank ? ~0u : sum);
    }
    const uint32_t first = bin << shift, rest = parent.last - first;
    s.found = {parent.low + first, bin == kBins - 1 ? rest : min(rest, (1u << shift) - 1), above, next - above};
  }
  __syncthreads();
  return s.found;
}

/// All keys: those of scores, and below them those of what can never be selected.
constexpr Bin kAllKeys = {0, kHighestKey, 0, ~0u};

/// The shift at which the bins cover keys up to low + last.
__device__ inline uint32_t shift_of(uint32_t last) {
  return max(kWarpSize - __clz(static_cast<int>(last)), kDigitBits) - kDigitBits;
}

__device__ inline void increment(uint32_t bins, uint32_t index) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(bins + index * 4) : "memory");
}

/// Narrows `bin` round by round until one key is left or `done(bin)`, at first with bins of 2^shift keys.
/// `for_each(f)` calls f(i, key) for every key of the set that the threads hold, a thread's i-th; keys outside the bin do
/// not count. The bins are zero before and after.
template <class ForEach, class Done>
__device__ inline Bin descend(SelectShared& s, Histogram& histogram, Bin bin, uint32_t shift, uint32_t rank,
                              ForEach for_each, Done done) {
  uint32_t bins = cuda::shared_address(histogram.counts);
  asm volatile("" : "+r"(bins));  // once, not for every key
#pragma unroll 1
  while (bin.last > 0 && !done(bin)) {
    for_each([&](int, uint32_t key) {  // no branch, which would cost more than counting the others apart
      const uint32_t offset = key - bin.low;
      increment(bins, offset <= bin.last ? min(offset >> shift, uint32_t{kBins - 1}) : uint32_t{kBins});
    });
    bin = narrow(s, histogram, bin, shift, rank);
    shift = shift_of(bin.last);
  }
  return bin;
}

/// The cut at the wanted-th best key of the few in `bin`. Called by all threads; s.few and s.few_keys are zero before.
template <class ForEach, class KeyAt>
__device__ inline Cut cut_few(SelectShared& s, const Bin& bin, uint32_t wanted, ForEach for_each, KeyAt key_at) {
  uint32_t mine = 0;
  for_each([&](int i, uint32_t key) { mine |= static_cast<uint32_t>(key - bin.low <= bin.last) << i; });
  for (; mine != 0; mine &= mine - 1) s.few_keys[atomicAdd(&s.few, 1)] = key_at(__ffs(mine) - 1);
  __syncthreads();
  static_assert(kFew == 2 * kWarpSize);
  const uint32_t one = s.few_keys[lane_id()], other = s.few_keys[lane_id() + kWarpSize];
#pragma unroll 1
  for (uint32_t i = warp_id(); i < bin.inside; i += kWarps) {
    const uint32_t key = s.few_keys[i];
    const auto count = [](bool a, bool b) {
      return __popc(__ballot_sync(kFullMask, a)) + __popc(__ballot_sync(kFullMask, b));
    };
    const uint32_t better = count(one > key, other > key), not_worse = count(one >= key, other >= key);
    if (better < wanted && wanted <= not_worse) s.cut = wanted == not_worse ? Cut{key - 1, 0} : Cut{key, wanted - better};
  }
  __syncthreads();
  return s.cut;
}

constexpr Cut kAll = {kLowestKey - 1, 0};

/// The cut at rank `rank` of the keys in `start`, at first with bins of 2^shift keys. A thread has up to 32 keys;
/// `key_at(i)` is the i-th, computed anew.
template <class ForEach, class KeyAt>
__device__ inline Cut find_cut(SelectShared& s, Histogram& histogram, const Bin& start, uint32_t shift, uint32_t rank,
                               ForEach for_each, KeyAt key_at) {
  const auto done = [&](const Bin& b) { return b.inside <= kFew || b.inside == rank - b.above; };
  const Bin bin = descend(s, histogram, start, shift, rank, for_each, done);
  if (bin.inside == 0 || bin.low < kLowestKey) return kAll;  // fewer than `rank` can be selected
  const uint32_t wanted = rank - bin.above;
  if (bin.inside == wanted) return {bin.low - 1, 0};
  if (bin.last == 0) return {bin.low, wanted};
  return cut_few(s, bin, wanted, for_each, key_at);
}

/// The lowest `n` set bits.
__device__ inline uint32_t lowest_bits(uint32_t bits, uint32_t n) {
  uint32_t rest = bits;
  for (; n > 0 && rest != 0; --n) rest &= rest - 1;
  return bits ^ rest;
}

/// Lists in `listed[0 … k)` the columns of what is selected of the keys of all threads, those of lower threads first, and
/// then -1. Synchronises before it writes, and before it returns.
template <int kKeys, class ColumnOf>
__device__ inline void list_selected(SelectShared& s, const uint32_t (&keys)[kKeys], Cut cut, uint32_t k, int32_t* listed,
                                     ColumnOf column_of) {
  static_assert(kKeys <= 32);
  uint32_t selected = 0, before, total;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) selected |= static_cast<uint32_t>(keys[i] > cut.key) << i;
  if (cut.ties == 0) {
    const cuda::BlockSum sum = block_sum(s, 0, __popc(selected));
    before = sum.before, total = sum.total;
  } else {
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) equal |= static_cast<uint32_t>(keys[i] == cut.key) << i;
    const cuda::BlockSum above = block_sum(s, 0, __popc(selected)), ties = block_sum(s, 1, __popc(equal));
    const uint32_t ties_before = min(ties.before, cut.ties);
    selected |= lowest_bits(equal, cut.ties - ties_before);
    before = above.before + ties_before, total = above.total + cut.ties;
  }
  uint32_t to = cuda::shared_address(listed) + before * 4;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) append_if(selected & 1u << i, to, column_of(i));
  for (uint32_t i = total + threadIdx.x; i < k; i += kThreads) listed[i] = -1;
  __syncthreads();
}

}  // namespace indexcache::sm90::radix_topk
