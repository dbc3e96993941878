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

struct WarpSums {
  uint32_t before;  // over the lanes before this one
  uint32_t total;   // of warp `lane`; 0 in a lane that is no warp's
};

/// The sums of which those over a block are made. `turn` alternates from call to call: then each costs one barrier.
__device__ inline WarpSums warp_sums(SelectShared& s, int turn, uint32_t value) {
  uint32_t* const totals = s.warp_totals[turn & 1];
  const uint32_t before = cuda::warp_exclusive_sum(value);
  if (lane_id() == kWarpSize - 1) totals[warp_id()] = before + value;
  __syncthreads();
  return {before, lane_id() < kWarps ? totals[lane_id()] : 0};
}

/// Exclusive sum over the threads and their total; less than 2^16.
__device__ inline cuda::BlockSum block_sum(SelectShared& s, int turn, uint32_t value) {
  const auto [before, total] = warp_sums(s, turn, value);
  // Two sums in one: shuffles and reductions of sixteen warps get in each other's way.
  const uint32_t both = __reduce_add_sync(kFullMask, total + (lane_id() < warp_id() ? total << 16 : 0));
  return {(both >> 16) + before, both & 0xffffu};
}

/// Two sums in one.
__device__ inline void block_sums(SelectShared& s, int turn, const uint32_t (&values)[2], cuda::BlockSum (&sums)[2]) {
  const auto [before, total] = warp_sums(s, turn, values[0] | values[1] << 16);
  const uint32_t all = __reduce_add_sync(kFullMask, total);
  const uint32_t earlier = before + __reduce_add_sync(kFullMask, lane_id() < warp_id() ? total : 0);
  sums[0] = {earlier & 0xffffu, all & 0xffffu};
  sums[1] = {earlier >> 16, all >> 16};
}

/// Narrows `parent` to the bin of it that holds rank `rank`, from 1 and from the top; bin i has 2^shift keys from low +
/// i * 2^shift on, the last bin all the rest. `inside` 0: there are fewer. Called by all threads; synchronises before
/// it reads and before it returns, and leaves the bins at zero.
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

/// Narrows `bin` round by round until one key is left or `done(bin)`, at first with bins of 2^shift keys. `for_each(f)`
/// calls f(i, key) for every key of the set that the threads hold, a thread's i-th; keys outside the bin do not count.
/// The bins are zero before and after.
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

/// The cut at the wanted-th best of the `count` keys of which bits of `mine` name this thread's: the i-th is key_at(i).
/// Called by all threads; s.few and s.few_keys are zero before.
template <class KeyAt>
__device__ inline Cut cut_few(SelectShared& s, uint32_t mine, uint32_t count, uint32_t wanted, KeyAt key_at) {
  if (mine != 0) {
    uint32_t* to = s.few_keys + atomicAdd(&s.few, __popc(mine));
    for (; mine != 0; mine &= mine - 1) *to++ = key_at(__ffs(mine) - 1);
  }
  __syncthreads();
  static_assert(kFew == 2 * kWarpSize && kFew % kWarps == 0);
  const uint32_t one = s.few_keys[lane_id()], other = s.few_keys[lane_id() + kWarpSize];
  uint32_t keys[kFew / kWarps];
#pragma unroll
  for (int j = 0; j < kFew / kWarps; ++j) keys[j] = s.few_keys[warp_id() + j * kWarps];
#pragma unroll
  for (int j = 0; j < kFew / kWarps; ++j) {
    const uint32_t key = keys[j];
    if (warp_id() + j * kWarps >= count) break;
    // How many are better, and how many not worse, in one sum.
    const uint32_t better = (one > key) + (other > key), not_worse = (one >= key) + (other >= key);
    const uint32_t ranks = __reduce_add_sync(kFullMask, better + (not_worse << 16));
    const uint32_t first = ranks & 0xffffu, last = ranks >> 16;
    if (first < wanted && wanted <= last) s.cut = wanted == last ? Cut{key - 1, 0} : Cut{key, wanted - first};
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
  uint32_t mine = 0;
  for_each([&](int i, uint32_t key) { mine |= static_cast<uint32_t>(key - bin.low <= bin.last) << i; });
  return cut_few(s, mine, bin.inside, wanted, key_at);
}

/// The lowest `n` set bits.
__device__ inline uint32_t lowest_bits(uint32_t bits, uint32_t n) {
  uint32_t rest = bits;
  for (; n > 0 && rest != 0; --n) rest &= rest - 1;
  return bits ^ rest;
}

/// Which of a thread's keys, one per bit, are selected, and which are on the cut, where the first of all threads count.
struct Chosen {
  uint32_t above = 0, equal = 0;

  Chosen() = default;
  /// Of the first `count` keys.
  template <int kKeys>
  __device__ Chosen(const uint32_t (&keys)[kKeys], int count, const Cut& cut) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i >= count) break;
      above |= static_cast<uint32_t>(keys[i] > cut.key) << i;
    }
    if (cut.ties == 0) return;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i >= count) break;
      equal |= static_cast<uint32_t>(keys[i] == cut.key) << i;
    }
  }
};

/// Lists in `listed[0 … k)` the columns of what is chosen of the keys of all threads, those of lower threads first, and
/// then -1. A thread has up to `count` keys; `column_of(i)` is the i-th's. Synchronises before it writes, and before it
/// returns.
template <int kKeys, class ColumnOf>
__device__ inline void list_chosen(SelectShared& s, const Chosen& chosen, uint32_t ties, int count, uint32_t k,
                                   int32_t* listed, ColumnOf column_of) {
  static_assert(kKeys <= 32);
  const cuda::BlockSum above = block_sum(s, 0, __popc(chosen.above));
  uint32_t selected = chosen.above, before = above.before, total = above.total;
  if (ties > 0) {
    const uint32_t ties_before = min(block_sum(s, 1, __popc(chosen.equal)).before, ties);
    selected |= lowest_bits(chosen.equal, ties - ties_before);
    before += ties_before, total += ties;
  }
  uint32_t to = cuda::shared_address(listed) + before * 4;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (i >= count) break;
    append_if(selected & 1u << i, to, column_of(i));
  }
  for (uint32_t i = total + threadIdx.x; i < k; i += kThreads) listed[i] = -1;
  __syncthreads();
}

}  // namespace indexcache::sm90::radix_topk
