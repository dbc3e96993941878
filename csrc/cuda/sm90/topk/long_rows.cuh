// Exact top-k of long rows, each read once: sample, compare, keep, verify.
//
// 1. A sample of the row gives a threshold that a little more than k scores should reach.
// 2. The row streams past it, and what reaches it is listed in column order, so that nothing needs sorting later.
// 3. The count is exact: it proves that the k best are in the list. If not, an exact threshold replaces the sampled one.
// 4. Radix select over the list finds the cut, and what lies above it is the result as it stands.
//
// A cluster of blocks may share a row: all find the same threshold, and hand their lists to the first. The result is a
// function of the row alone, so neither the spread nor another read can change a bit of it.
#pragma once

#include "csrc/cuda/common/cluster.cuh"
#include "csrc/cuda/sm90/topk/reader.cuh"
#include "csrc/cuda/sm90/topk/sample.cuh"

namespace indexcache::sm90::radix_topk {

/// Reads this block's part of the row once and lists what reaches the threshold in its list, if that has room. Returns
/// the number, which is exact in any case. Barriers separate the uses of the ring and the list before and after. The
/// threads work out the places of kBatch rounds together, 1 or 2.
template <int kBatch, class Shared, class Reader>
__device__ inline uint32_t collect(Shared& s, const Reader& reader, const Threshold& threshold, uint32_t room) {
  const float below = score_below(threshold.key);
  const uint32_t list = cuda::shared_address(s.list);
  uint32_t count = 0;
#pragma unroll 1
  for (int first = 0; first < reader.rounds(); first += kBatch) {
    uint32_t masks[kBatch], hits[kBatch];
    cuda::BlockSum sums[kBatch];
    reader.wait(first);
    masks[0] = reader.above(first, below);
    hits[0] = __popc(masks[0]);
    if constexpr (kBatch == 1) {
      sums[0] = block_sum(s.shared, first, hits[0]);
    } else {
      static_assert(kBatch == 2);
      reader.template wait<1>(first);
      masks[1] = reader.above(first + 1, below);
      hits[1] = __popc(masks[1]);
      block_sums(s.shared, first / kBatch, hits, sums);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      uint32_t mask = masks[i];
      if (count + sums[i].total <= room) {
        uint32_t to = list + (count + sums[i].before + hits[i]) * sizeof(Candidate);
        const int column = reader.column(first + i);
#pragma unroll 1
        while (mask != 0) {  // from the last
          const uint32_t entry = highest_bit(mask);
          mask ^= 1u << entry;
          to -= sizeof(Candidate);
          store_shared(to, column + entry, float_bits(reader.entry(first + i, entry)));
        }
      }
      count += sums[i].total;
      reader.release(first + i);
    }
  }
  __syncthreads();
  return count;
}

/// The candidates of the row, and the most of any block.
struct Totals {
  uint32_t all, most;
};

/// Copies this block's list, of `listed` candidates, to part `rank` of block 0's list, and `count` to its counts. Block
/// 0 waits until all have done so, and returns the totals.
template <int kCluster, class Shared>
__device__ inline Totals gather(Shared& s, uint32_t listed, uint32_t count, int rank) {
  if constexpr (kCluster == 1) return {count, count};
  if (rank > 0) {
    // Two candidates at once; behind an odd number comes one more, which counts for nothing.
    constexpr uint32_t kPart = Shared::kListSize / kCluster * sizeof(Candidate);
    static_assert(kPart % 16 == 0);
    const uint32_t to = cuda::address_in(0, s.list) + rank * kPart, pairs = (listed + 1) / 2;
    const uint32_t gathered = cuda::address_in(0, &s.gathered);
    if (threadIdx.x == 0) {
      cuda::arrive_expecting_at(gathered, pairs * 16 + sizeof(count));
      cuda::store_counted(cuda::address_in(0, &s.counts[rank]), count, gathered);
    }
    for (uint32_t i = threadIdx.x; i < pairs; i += kThreads) {
      cuda::store_counted(to + i * 16, reinterpret_cast<const uint4*>(s.list)[i], gathered);
    }
    return {};
  }
  if (threadIdx.x == 0) {
    s.counts[0] = count;
    cuda::arrive(&s.gathered);
  }
  cuda::wait(&s.gathered, 0);
  const uint32_t own = lane_id() < kCluster ? s.counts[lane_id()] : 0;
  return {__reduce_add_sync(kFullMask, own), __reduce_max_sync(kFullMask, own)};
}

/// Tells the other blocks of the cluster what block 0 has found. No fence: the time is that of one store.
template <int kCluster, class Shared>
__device__ inline void share_verdict(Shared& s, bool& retry, uint32_t& all, int rank) {
  if constexpr (kCluster == 1) return;
  if (rank == 0) {
    if (0 < threadIdx.x && threadIdx.x < kCluster) {
      const int to = static_cast<int>(threadIdx.x);
      cuda::store_counted(cuda::address_in(to, &s.verdict), retry, all, cuda::address_in(to, &s.told));
    }
    return;
  }
  if (threadIdx.x == 0) cuda::arrive_expecting(&s.told, sizeof(s.verdict));
  cuda::wait(&s.told, 0);
  retry = s.verdict.x != 0;
  all = s.verdict.y;
}

/// Lists in `ties` the `wanted` first columns with this key, or as many as `row` has. Returns their number. Barriers
/// separate the uses of the ring before and after.
template <class Reader>
__device__ inline uint32_t find_ties(SelectShared& s, int32_t* ties, const Reader& row, uint32_t key, uint32_t wanted) {
  const float score = key_to_score(key);
  uint32_t found = 0;
  row.start();
  for (int round = 0; round < row.rounds() && found < wanted; ++round) {
    row.wait(round);
    uint32_t mask = row.equal(round, score);
    const cuda::BlockSum sum = block_sum(s, round, __popc(mask));
    uint32_t position = found + sum.before;
    for (; mask != 0 && position < wanted; mask &= mask - 1, ++position) {
      ties[position] = row.column(round) + __ffs(mask) - 1;
    }
    found += sum.total;
    row.release(round);
  }
  row.settle();
  __syncthreads();
  return min(found, wanted);
}

/// Entries of the ascending array `columns(0)` … `columns(n - 1)` below `column`.
template <class Columns>
__device__ inline uint32_t count_below(int column, uint32_t n, Columns columns) {
  uint32_t low = 0;
  while (low < n) {
    const uint32_t middle = (low + n) / 2;
    if (columns(middle) < column) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

/// Lists the candidates together with the ties, in column order.
template <class Shared>
__device__ inline void list_with_ties(Shared& s, uint32_t count, uint32_t ties) {
  const auto candidate = [&](uint32_t i) { return s.list[i].column; };
  const auto tie = [&](uint32_t i) { return s.ties[i]; };
  int32_t* const result = s.result;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) result[i + count_below(candidate(i), ties, tie)] = candidate(i);
  for (uint32_t i = threadIdx.x; i < ties; i += kThreads) result[i + count_below(tie(i), count, candidate)] = tie(i);
  __syncthreads();
}

/// Lists the k best of the `all` candidates, all of which reach key `low`. They lie in the 2^log_parts equal parts of
/// the list, in the i-th s.counts[i] of them; or, if that is one part, side by side.
template <int kListed, class Shared>
__device__ inline void list_best(Shared& s, uint32_t all, int log_parts, uint32_t low, uint32_t shift, uint32_t k) {
  static_assert(kListed % 2 == 1);
  // A part belongs to so many threads, and these go through it in runs, one of each.
  const uint32_t threads = kThreads >> log_parts, part = threadIdx.x >> (kLogThreads - log_parts);
  const uint32_t count = log_parts == 0 ? all : s.counts[part];
  const uint32_t each = (count + threads - 1) >> (kLogThreads - log_parts) | 1;  // odd: neighbours meet no bank twice
  const uint32_t first = (threadIdx.x & (threads - 1)) * each;
  const uint32_t own = cuda::shared_address(s.list + part * (Shared::kListSize >> log_parts) + first);
  // All loads, then all uses, so that the loads are in flight together. Behind the last candidate is more of the list.
  uint32_t keys[kListed] = {}, columns[kListed] = {};
#pragma unroll
  for (int i = 0; i < kListed; ++i) {
    if (i >= each) break;
    load_shared(own + i * sizeof(Candidate), columns[i], keys[i]);
  }
#pragma unroll
  for (int i = 0; i < kListed; ++i) {
    if (i >= each) break;
    keys[i] = first + i < count ? key_of_canonical(bits_float(keys[i]) + 0.0f) : kNoKey;  // no candidate is NaN
  }
  Cut cut = kAll;
  if (all > k) {
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kListed; ++i) {
        if (i >= each) break;
        f(i, keys[i]);
      }
    };
    const auto key_at = [&](int i) { return key_of(load_shared<float>(own + i * sizeof(Candidate) + 4)); };
    cut = find_cut(s.shared, s.bins(), {low, kHighestKey - low, 0, all}, shift, k, for_each, key_at);
  }
  list_chosen<kListed>(s.shared, Chosen(keys, each, cut), cut.ties, each, k, s.result, [&](int i) { return columns[i]; });
}

template <class T, class Rows>
using RowReader = Reader<T, Rows::kStages * 4 / sizeof(T), Rows::kAhead * 4 / sizeof(T)>;

template <class T, class Rows>
__device__ inline RowReader<T, Rows> make_reader(LongRowShared<Rows>& s, const Row<T>& row, int rank, int blocks) {
  return {row, rank, blocks, s.ring};
}

/// Whether a read past `threshold` that found and listed `all` candidates is enough.
__device__ inline bool enough(const Threshold& threshold, uint32_t all, uint32_t k) {
  return all >= k || (threshold.key == kLowestKey && !threshold.past_plateau);
}

// Reads of the row after the first. They are functions of their own, so that none has to keep the registers of another.

/// Lists in s.ties the first columns of `row` with this key, up to `wanted`. Returns their number.
template <class Rows, class T>
__device__ __noinline__ uint32_t read_ties(LongRowShared<Rows>& s, Row<T> row, uint32_t key, uint32_t wanted) {
  return find_ties(s.shared, s.ties, make_reader(s, row, 0, 1), key, wanted);
}

template <class Rows, class T>
__device__ __noinline__ Threshold read_exact_threshold(LongRowShared<Rows>& s, Row<T> row, uint32_t k) {
  clear(s.bins());
  __syncthreads();
  return exact_threshold(s.shared, s.bins(), row, k, s.kListSize);
}

/// Lists what reaches the threshold in block 0's list, side by side, if that has room. Returns the number of the row.
template <int kCluster, class Rows, class T>
__device__ __noinline__ uint32_t read_candidates(LongRowShared<Rows>& s, Row<T> row, Threshold threshold) {
  constexpr uint32_t kListSize = LongRowShared<Rows>::kListSize;
  const int rank = blockIdx.x % kCluster;
  const auto reader = make_reader(s, row, rank, kCluster);
  reader.start();
  const uint32_t count = collect<Rows::kBatch>(s, reader, threshold, kListSize);
  if constexpr (kCluster == 1) return count;
  cuda::cluster_sync<kCluster>();  // all have read the counts of the last attempt
  if (threadIdx.x == 0) cuda::store_to(cuda::address_in(0, &s.counts[rank]), count);
  cuda::cluster_sync<kCluster>();
  const uint32_t own = lane_id() < kCluster ? cuda::load_from(0, &s.counts[lane_id()]) : 0;
  const uint32_t all = __reduce_add_sync(kFullMask, own);
  const uint32_t before = __reduce_add_sync(kFullMask, lane_id() < rank ? own : 0);
  if (rank > 0 && all <= kListSize) {
    const uint32_t to = cuda::address_in(0, s.list) + before * sizeof(Candidate);
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      cuda::store_to(to + i * sizeof(Candidate), static_cast<uint32_t>(s.list[i].column), s.list[i].score);
    }
  }
  return all;
}

/// After a first read, past `threshold`, that was not enough: reads past others and lists in the block's own memory,
/// until block 0's list has what it takes. The last to try is the exact threshold, which cannot fail. Leaves s.again.
template <int kCluster, class Rows, class T>
__device__ __noinline__ void read_again(LongRowShared<Rows>& s, Row<T> row, uint32_t k, Threshold threshold, uint32_t all) {
  constexpr uint32_t kListSize = LongRowShared<Rows>::kListSize;
  bool own_list = kCluster == 1;  // if not, the first read has listed in parts of block 0's memory
  uint32_t ties = 0;
  int reads = 1;
  do {
    const bool few = all < k;
    if (few && threshold.past_plateau && own_list) {  // the k-th best lies on the plateau, if that has so many
      ties = read_ties(s, row, threshold.key - 1, k - all);
      ++reads;
      if (all + ties == k) break;
      ties = 0;
    }
    // A part was too small for what would fit the whole list, or could not take ties; or there is a lower key to try.
    const bool same = !own_list && all <= kListSize && (!few || threshold.past_plateau);
    if (few && threshold.lower != 0) {
      threshold = Threshold{threshold.lower};
    } else if (!same) {
      threshold = read_exact_threshold(s, row, k);
      reads += threshold.rounds;
    }
    all = read_candidates<kCluster>(s, row, threshold);
    ++reads;
    own_list = true;
  } while (all > kListSize || !enough(threshold, all, k));
  if (threadIdx.x == 0) s.again = {all, ties, threshold.key, static_cast<uint32_t>(reads)};
  cuda::cluster_sync<kCluster>();
}

template <class T, int kCluster, class Rows>
__global__ void __launch_bounds__(kThreads, Rows::kBlocksPerSm) long_rows_kernel(const __grid_constant__ TopkParams p) {
  using Shared = LongRowShared<Rows>;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& s = *reinterpret_cast<Shared*>(bytes);
  const int64_t index = blockIdx.x / kCluster;
  const int rank = blockIdx.x % kCluster;
  const auto k = static_cast<uint32_t>(p.k);
  asm volatile("" ::"l"(p.out), "l"(p.reads));  // brings all parameters near before they are missed
  const Row<T> row(p, index);
  const int log_parts = row.length() > kWholeRow ? log2_of(kCluster) : 0;  // of the list; the first blocks have one each
  const auto reader_of_row = [&] {
    Row<T> same = row;
    asm volatile("" : "+r"(same.begin), "+r"(same.end));  // nothing of one reader is kept in registers for the next
    return make_reader<T, Rows>(s, same, rank, 1 << log_parts);
  };
  if (threadIdx.x < kFew) s.shared.few_keys[threadIdx.x] = kNoKey;
  if (threadIdx.x == 0) {
    s.shared.few = 0;
    if constexpr (kCluster > 1) {
      cuda::init_barrier(&s.gathered, kCluster);
      cuda::init_barrier(&s.told, 1);
      cuda::publish_barriers();
    }
  }
  if constexpr (kCluster > 1) cuda::cluster_arrive();
  const Sample<T> sample(row);  // asked for first: it would wait behind what follows
  if (threadIdx.x == kThreads - 1) s.plan = sample.plan(k, Shared::kListSize);
  clear(s.sample_bins());
  __syncthreads();
  reader_of_row().start();  // and goes on in another: registers are scarce while the sample is looked at
  Threshold threshold;
  if (row.length() > kWholeRow) threshold = sample.threshold(s.shared, s.sample_bins(), s.plan, s.kListSize);
  if constexpr (kCluster > 1) cuda::cluster_wait();  // all blocks are there, with their barriers

  const uint32_t room = Shared::kListSize >> log_parts;
  const uint32_t count = collect<Rows::kBatch>(s, reader_of_row(), threshold, room);
  if constexpr (!Rows::kApart) {
    clear(s.bins());
    __syncthreads();
  }
  auto [all, most] = gather<kCluster>(s, count <= room ? count : 0, count, rank);
  bool retry = most > room || !enough(threshold, all, k);
  share_verdict<kCluster>(s, retry, all, rank);
  uint4 found{all, 0, threshold.key, 1};  // as in s.again
  if (retry) [[unlikely]] {
    read_again<kCluster>(s, Row<T>(p, index), k, threshold, all);
    found = s.again;
    if constexpr (!Rows::kApart) {
      clear(s.bins());
      __syncthreads();
    }
  }
  if (rank == 0) {
    const auto [candidates, ties, low, reads] = found;
    if (ties > 0) {
      list_with_ties(s, candidates, ties);
    } else {
      constexpr uint32_t kShift = Threshold().shift;
      list_best<Rows::kListed>(s, candidates, retry ? 0 : log_parts, low, retry ? kShift : threshold.shift, k);
    }
    write_result(p, index, s.result);
    if (p.reads != nullptr && threadIdx.x == 0) p.reads[index] = reads;
  }
}

}  // namespace indexcache::sm90::radix_topk
