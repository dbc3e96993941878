// Exact top-k of a row in one read: sample, compare, keep, verify.
//
// 1. A sample of the row gives a threshold that about 2 k scores should pass.
// 2. The row is read once, and what passes goes to shared memory as (key, column).
// 3. Their count is exact, so it proves whether the k best are among them. If not, the row is read again with a better
//    threshold: past a plateau, or the exact one.
// 4. A radix descent over the few candidates finds the cut, and a bucket sort lists the columns in ascending order.
//
// A cluster of blocks may share a row: each reads the same sample and its own slice, and hands what passed to block 0.
// The result is a function of the row alone, so neither the spread nor a second read can change a bit of it.
#pragma once

#include <cooperative_groups.h>

#include "csrc/cuda/sm90/topk/descent.cuh"

namespace indexcache::sm90::radix_topk {

// --- Reading the row ---------------------------------------------------------------------------------------------------

/// The row in aligned groups of four scores. A group that reaches out of the window gives NaN there, which never passes.
struct Groups {
  const float* base;  // 16-byte aligned; group g is base[4 g .. 4 g + 3]
  int lead;           // columns before column 0 that base[0 .. 3] reaches
  int begin, end;     // groups that touch the window
  Row row;

  __device__ explicit Groups(const Row& r) : row(r) {
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(r.scores) / sizeof(float) % 4);
    base = r.scores - lead;
    begin = (r.begin + lead) / 4;
    end = r.length() > 0 ? (r.end + lead + 3) / 4 : begin;
  }
  __device__ int column(int group) const { return 4 * group - lead; }
  __device__ bool inside(int group) const { return column(group) >= row.begin && column(group) + 4 <= row.end; }
  __device__ float4 load(int group) const { return __ldg(reinterpret_cast<const float4*>(base) + group); }
  __device__ float4 load_edge(int group) const {
    const auto score = [&](int c) { return c >= row.begin && c < row.end ? __ldg(row.scores + c) : quiet_nan(); };
    const int first = column(group);
    return {score(first), score(first + 1), score(first + 2), score(first + 3)};
  }
};

/// Calls f(scores, g) for groups g, g + kThreads, … of this thread, kLoads at a time, covering [first, last). A group past
/// the end is NaN. All threads of a warp take the same number of steps.
template <class F>
__device__ void for_each_group(const Groups& groups, int first, int last, F f) {
  for (int base = first; base < last; base += kThreads * kLoads) {
    const int mine = base + static_cast<int>(threadIdx.x);
    float4 scores[kLoads];
    // Plain loads wherever the whole step lies inside the window: nothing then keeps them from being in flight together.
    if (base + kThreads * kLoads <= last && groups.inside(base) && groups.inside(base + kThreads * kLoads - 1)) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) scores[j] = groups.load(mine + j * kThreads);
    } else {
      const float nan = quiet_nan();
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int group = mine + j * kThreads;
        scores[j] = group >= last ? float4{nan, nan, nan, nan} : groups.inside(group) ? groups.load(group) : groups.load_edge(group);
      }
    }
    f(scores, mine);
  }
}

/// What a score must reach to become a candidate.
struct Threshold {
  uint32_t key;
  __device__ float score() const { return key_to_score(key); }
  __device__ bool lowest() const { return key <= kLowestKey; }
};

/// The lower edge of the bin of a descent over key << 32.
__device__ inline Threshold threshold_of(const Bin& bin) {
  if (bin.inside == 0) return {kLowestKey};
  return {max(static_cast<uint32_t>(bin.low >> 32), kLowestKey)};
}

/// Samples one unit of neighbouring scores at a random place in each of many equal parts: neither a trend nor a period
/// of the row can hide. Places depend on the part alone, and every block of a cluster finds the same threshold.
__device__ __noinline__ inline Threshold sampled_threshold(Shared& s, const Row& row, int k) {
  const int64_t length = row.length();
  const int parts = sample_parts(length);
  const int64_t samples = int64_t{parts} * kSampleUnit;
  const auto lead = static_cast<int>(reinterpret_cast<uintptr_t>(row.scores) / sizeof(float) % kSampleUnit);
  const float* const aligned = row.scores - lead;
  const int64_t first = row.begin + lead;  // of the window, in scores behind `aligned`
  const auto for_each = [&](auto f) {
    for (int part = threadIdx.x; part < parts; part += kThreads) {
      // The part's units that are aligned to their size: parts are at least twice as long, so there is one.
      const int64_t start = first + length * part / parts, stop = first + length * (part + 1) / parts;
      const int64_t unit = (start + kSampleUnit - 1) / kSampleUnit;
      const auto room = static_cast<uint32_t>(stop / kSampleUnit - unit);
      uint32_t hash = part * 0x9e3779b9u;
      hash = (hash ^ hash >> 15) * 0x85ebca6bu;
      hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
      const auto* scores = reinterpret_cast<const float4*>(aligned) + (unit + __umulhi(hash, room)) * 2;
      const float4 low = __ldg(scores), high = __ldg(scores + 1);
      const uint32_t keys[kSampleUnit] = {ordered_key(low.x),  ordered_key(low.y),  ordered_key(low.z),
                                          ordered_key(low.w),  ordered_key(high.x), ordered_key(high.y),
                                          ordered_key(high.z), ordered_key(high.w)};
#pragma unroll
      for (int i = 0; i < kSampleUnit; ++i) {
        if (keys[i] != kNeverSelected) f(uint64_t{keys[i]} << 32);
      }
    }
  };
  const uint32_t rank = max(static_cast<uint32_t>((samples * aim(k) + length - 1) / length), kLeastRank);
  return threshold_of(descend(s, 0, 64, 32, rank, for_each, [&](const Bin& bin) {
    return int64_t{bin.above + bin.inside} * length <= samples * acceptable(k);
  }));
}

/// The same search over every score of the row, with exact counts: cannot miss.
__device__ __noinline__ inline Threshold exact_threshold(Shared& s, const Row& row, int k) {
  const auto for_each = [&](auto f) {
#pragma unroll 4
    for (int column = row.begin + static_cast<int>(threadIdx.x); column < row.end; column += kThreads) {
      const uint32_t key = ordered_key(__ldg(row.scores + column));
      if (key != kNeverSelected) f(uint64_t{key} << 32);
    }
  };
  return threshold_of(descend(s, 0, 64, 32, k, for_each,
                              [](const Bin& bin) { return bin.above + bin.inside <= kCandidates; }));
}

/// Reads the groups [first, last) once and keeps what reaches the threshold.
__device__ inline void collect(Shared& s, const Groups& groups, int first, int last, Threshold threshold) {
  const float limit = threshold.score();
  float* const staged = s.staged[warp_id()];
  float best = -__builtin_inff();
  for_each_group(groups, first, last, [&](const float4(&scores)[kLoads], int group) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      mask |= (scores[j].x >= limit) << (4 * j) | (scores[j].y >= limit) << (4 * j + 1) |
              (scores[j].z >= limit) << (4 * j + 2) | (scores[j].w >= limit) << (4 * j + 3);
    }
    if (!__any_sync(kFullMask, mask)) return;
    // A bit number cannot index registers: the lane's scores go to shared memory, 16 bytes apart from its neighbours'.
#pragma unroll
    for (int j = 0; j < kLoads; ++j) reinterpret_cast<float4*>(staged)[j * kWarpSize + lane_id()] = scores[j];
    uint32_t total;
    const uint32_t before = warp_exclusive_sum(__popc(mask), total);
    uint32_t base = 0;
    if (lane_id() == 0) base = atomicAdd(&s.count, total);
    uint32_t position = __shfl_sync(kFullMask, base, 0) + before;
    if (position >= kCandidates) return;  // counted, not kept: the caller reads the row again
    const int column = groups.column(group);
    for (; mask != 0; mask &= mask - 1, ++position) {
      const uint32_t bit = __ffs(mask) - 1, j = bit / 4, i = bit % 4;
      const float score = staged[(j * kWarpSize + lane_id()) * 4 + i];
      best = fmaxf(best, score);
      if (position < kCandidates) {
        s.candidates[position] = composite(key_of_passing(score), column + j * kThreads * 4 + i);
      }
    }
  });
  const uint32_t best_key = __reduce_max_sync(kFullMask, ordered_key(best));
  if (lane_id() == 0) atomicMax(&s.best_key, best_key);
}

__device__ inline void reset(Shared& s) {
  __syncthreads();
  if (threadIdx.x == 0) s.count = s.remote_count = s.best_key = 0;
  __syncthreads();
}

// --- Clusters ------------------------------------------------------------------------------------------------------------

/// Adds this block's candidates to block 0's, from the end of its list towards the front.
__device__ inline void hand_over(const cooperative_groups::cluster_group& cluster, Shared& s) {
  // Pointers into block 0 stay apart from pointers into this block: some compilers lose stores through a merged one.
  uint64_t* const remote_list = cluster.map_shared_rank(s.candidates, 0);
  if (threadIdx.x == 0) {
    s.member_count = atomicAdd(cluster.map_shared_rank(&s.remote_count, 0), s.count);
    atomicMax(cluster.map_shared_rank(&s.best_key, 0), s.best_key);
  }
  __syncthreads();
  const uint32_t start = s.member_count;
  for (uint32_t i = threadIdx.x; i < s.count && start + i < kCandidates; i += kThreads) {
    remote_list[kCandidates - 1 - start - i] = s.candidates[i];
  }
}

/// What block 0 holds: `local` values at the front of its list and `remote` ones at the end.
struct List {
  const uint64_t* values;
  uint32_t local, remote;
  __device__ uint32_t size() const { return local + remote; }
  template <class F>
  __device__ void for_each(F f) const {
    for (uint32_t i = threadIdx.x; i < size(); i += kThreads) f(values[i < local ? i : kCandidates - 1 - (i - local)]);
  }
};

// --- Selection and output ------------------------------------------------------------------------------------------------

/// Appends to the list the first `wanted` columns, from the left, whose score has this key; it holds `size` values.
__device__ __noinline__ inline void append_first_ties(Shared& s, const Row& row, uint32_t key, uint32_t wanted,
                                                      uint32_t size) {
  const float limit = key_to_score(key);
  uint32_t found = 0;
  __syncthreads();
  for (int base = row.begin; base < row.end && found < wanted; base += kThreads * 4) {
    const int column = base + static_cast<int>(threadIdx.x) * 4;
    uint32_t mask = 0, total;
    for (int i = 0; i < 4; ++i) mask |= (column + i < row.end && __ldg(row.scores + column + i) == limit) << i;
    uint32_t position = found + block_exclusive_sum(s, __popc(mask), total);
    for (; mask != 0; mask &= mask - 1, ++position) {
      if (position < wanted) s.candidates[size + position] = composite(key, column + __ffs(mask) - 1);
    }
    found += total;
    __syncthreads();
  }
}

/// Lists the columns of the values >= cut in ascending order, then -1: a bucket sort. At most k values may remain.
__device__ inline void emit(Shared& s, const Row& row, const List& list, uint64_t cut, int k, int32_t* out) {
  constexpr int kOwn = kBuckets / kThreads;
  uint32_t* const ends = s.output.bucket_ends;
  int32_t* const columns = s.output.columns;
  const int shift = max(0, 32 - __clz((row.length() - 1) / kBuckets));
  const auto bucket = [&](int column) { return (column - row.begin) >> shift; };
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) ends[i] = 0;
  __syncthreads();
  list.for_each([&](uint64_t value) {
    if (value >= cut) atomicAdd(&ends[bucket(column_of(value))], 1u);
  });
  __syncthreads();
  uint32_t counts[kOwn], own = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += counts[i] = ends[threadIdx.x * kOwn + i];
  uint32_t start = block_exclusive_sum(s, own, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    ends[threadIdx.x * kOwn + i] = start;  // grows to the bucket's end as its columns arrive
    start += counts[i];
  }
  __syncthreads();
  list.for_each([&](uint64_t value) {
    if (value >= cut) columns[atomicAdd(&ends[bucket(column_of(value))], 1u)] = column_of(value);
  });
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
    if (i >= total) {
      out[i] = -1;
      continue;
    }
    const int column = columns[i], b = bucket(column);
    uint32_t place = b > 0 ? ends[b - 1] : 0;
    for (uint32_t j = place; j < ends[b]; ++j) place += columns[j] < column;
    out[place] = column;
  }
}

/// Asks L2 for the start of a slice, so that it arrives while the sample is looked at.
__device__ inline void prefetch(const Groups& groups, int first, int last) {
  constexpr int kLineGroups = 8;  // of 16 bytes
  const int group = first + static_cast<int>(threadIdx.x) * kLineGroups;
  if (group < last && groups.inside(group)) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const float4*>(groups.base) + group));
  }
}

/// Why a row is read: each reason but the first follows from an exact count, and none comes twice.
enum class Pass { sampled, past_plateau, exact };

template <int kCluster>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) topk_kernel(const TopkParams p) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& s = *reinterpret_cast<Shared*>(bytes);
  const auto cluster = cooperative_groups::this_cluster();
  const int64_t index = blockIdx.x / kCluster;
  const int rank = blockIdx.x % kCluster;
  const int begin = p.starts == nullptr ? 0 : max(p.starts[index], 0);
  const int end = static_cast<int>(min(p.columns, int64_t{p.ends[index]}));
  const Row row{p.logits + index * p.row_stride, begin, max(begin, end)};
  const auto k = static_cast<uint32_t>(p.k);
  const Groups groups(row);
  const int64_t all = groups.end - groups.begin;
  const int first = groups.begin + static_cast<int>(all * rank / kCluster);
  const int last = groups.begin + static_cast<int>(all * (rank + 1) / kCluster);
  const auto synchronise = [&] {
    if constexpr (kCluster > 1) {
      cluster.sync();
    } else {
      __syncthreads();
    }
  };

  prefetch(groups, first, last);
  reset(s);
  if constexpr (kCluster > 1) cluster.barrier_arrive();
  Threshold threshold{kLowestKey};
  if (row.length() > kWholeRow) threshold = sampled_threshold(s, row, p.k);
  if constexpr (kCluster > 1) cluster.barrier_wait();  // block 0's counters are zero

  uint32_t ties = 0;  // columns at the plateau's key that are still to be listed
  for (Pass pass = Pass::sampled;;) {
    collect(s, groups, first, last, threshold);
    __syncthreads();
    if (kCluster > 1 && rank > 0) hand_over(cluster, s);
    synchronise();
    uint32_t count = s.count + s.remote_count;
    if constexpr (kCluster > 1) {
      count = *cluster.map_shared_rank(&s.count, 0) + *cluster.map_shared_rank(&s.remote_count, 0);
    }
    const bool enough = count >= k || (threshold.lowest() && pass != Pass::past_plateau);
    if (count <= kCandidates && enough) break;
    if (pass == Pass::past_plateau && count < k) {  // the k-th best lies on the plateau
      ties = k - count;
      break;
    }
    const bool plateau = count > kCandidates && pass != Pass::past_plateau;  // perhaps: what if its own key is left out?
    if (!plateau && rank == 0) {
      const Threshold exact = exact_threshold(s, row, p.k);
      if (threadIdx.x == 0) s.threshold = exact.key;
    }
    synchronise();  // all have read the counts, and block 0 has published its threshold
    threshold.key = plateau ? threshold.key + 1 : kCluster > 1 ? *cluster.map_shared_rank(&s.threshold, 0) : s.threshold;
    pass = plateau ? Pass::past_plateau : Pass::exact;
    reset(s);
    synchronise();
  }
  if constexpr (kCluster > 1) {
    // Block 0's memory must stay while the others look at its counts: it waits for their arrival at the end.
    if (rank > 0) {
      cluster.barrier_arrive();
      return;
    }
    cluster.barrier_arrive();
  }

  List list{s.candidates, s.count, s.remote_count};
  uint64_t cut = 0;
  if (ties > 0) {
    // Fewer than k values are kept, k at most follow: they meet neither each other nor those from other blocks.
    append_first_ties(s, row, threshold.key - 1, ties, list.local);
    list.local += ties;
  } else if (list.size() > k) {
    const uint64_t low = uint64_t{threshold.key} << 32;
    const int width = 64 - __clzll(((uint64_t{s.best_key} + 1) << 32) - 1 - low);
    find_cut(s, low, width, k, [&](auto f) { list.for_each(f); });
    cut = s.cut;
  }
  __syncthreads();
  emit(s, row, list, cut, p.k, p.out + index * p.k);
  if constexpr (kCluster > 1) cluster.barrier_wait();
}

}  // namespace indexcache::sm90::radix_topk
