// Sizes of the sm90 top-k, and how a call is spread over the GPU. Measured on an H200 (132 SMs, 4.2 TB/s).
#pragma once

#include <cstdint>

#include "indexcache/params.h"

namespace indexcache::sm90::radix_topk {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kFastK = 2048;  // longer selections go to the generic kernel

inline constexpr int kOwn = 16;  // neighbouring columns that a thread looks at together

INDEXCACHE_HOST_DEVICE constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }
inline constexpr int kLogThreads = log2_of(kThreads);

// Radix select: a round narrows the key of the k-th best by up to eleven bits. Counting in shared memory costs 2.4
// cycles per warp whatever the bins are, and finding the bin is a chain of latencies (about 600 cycles) that hardly
// grows with their number up to four per thread. So few rounds with many bins are best: mostly one, after which few
// keys are left.
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;

/// So many keys are compared with each other instead of counted.
inline constexpr int kFew = 64;

/// Rows of up to this many columns stay in the registers of one block.
inline constexpr int64_t kShortRow = int64_t{kThreads} * kOwn;
inline constexpr int kShortBlocksPerSm = 2;

// --- Long rows: a cluster of blocks streams the row past a sampled threshold ----------------------------------------------

inline constexpr int kMaxCluster = 16;
inline constexpr int64_t kLeastSlice = 8192;  // columns per block below which a larger cluster does not pay
inline constexpr int64_t kWholeRow = 4096;    // up to this length every score is a candidate

// A sample is a unit of neighbouring scores, 64 bytes of f32 as DRAM gives them, at a random place of each of many
// equal parts. Two threads have half a unit each.
inline constexpr int kSampleUnit = 16;
inline constexpr int kSampleShare = 8;  // scores of a thread in a unit
inline constexpr int kMaxUnits = 4;     // of a thread

/// Sampled units per pair of threads, as a power of two: 2,048 scores of a row of up to 32,768, 4,096 of one of
/// 131,072. The larger the sample, the fewer candidates, and the later the threshold.
INDEXCACHE_HOST_DEVICE constexpr int log_sample_units(int length) {
  return length <= 32'768 ? -1 : length <= 131'072 ? 0 : length <= 1'048'576 ? 1 : 2;
}
INDEXCACHE_HOST_DEVICE constexpr int sample_size(int length) {
  return (kThreads * kSampleShare / 2) << (log_sample_units(length) + 1);
}

/// Many rows, a block each: two blocks per SM have 64 KiB each on the way, behind which the latency of DRAM hides, and
/// one reads while the other selects. Memory is scarce: the bins lie where the list or the ring is when these are not
/// in use.
struct ManyRows {
  static constexpr int kStages = 2;   // of f32 in the ring, each of kOwn columns of all threads
  static constexpr int kAhead = 2;    // of them on the way at once
  static constexpr int kListed = 11;  // candidates per thread; odd, so that neighbours meet no bank twice
  static constexpr int kBatch = 1;    // rounds whose candidates are placed together
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kApart = false;  // where the bins are
};

/// Few rows, a cluster each: a block has the SM for itself. 64 KiB on the way, as with many rows: what is asked for at
/// once arrives at once, in the end, and then there is nothing to list it behind.
struct FewRows {
  static constexpr int kStages = 4;
  static constexpr int kAhead = 2;
  static constexpr int kListed = 13;
  static constexpr int kBatch = 1;
  static constexpr int kBlocksPerSm = 1;
  static constexpr bool kApart = true;
};

/// So long that listing, not reading, takes the time.
struct FewLongestRows : FewRows {
  static constexpr int kAhead = 4;
  static constexpr int kBatch = 2;
};
inline constexpr int64_t kLongestSlice = 32'768;  // columns per block up to which reading takes the time

// --- Which kernel, and how many blocks ------------------------------------------------------------------------------------

enum class Kernel { short_rows, many_long_rows, few_long_rows, few_longest_rows };

struct Spread {
  Kernel kernel;
  int cluster;  // blocks per row
};

/// Pure: sizes decide, never the windows, which are on the device. `lead` columns at most lie between the first of a
/// row and an aligned address before it.
INDEXCACHE_HOST_DEVICE constexpr Spread spread(int64_t rows, int64_t columns, int64_t lead, int sms) {
  if (columns + lead <= kShortRow) return {Kernel::short_rows, 1};
  int cluster = 1;
  // Blocks of a cluster lie in one GPC, and the GPCs are not all of the same size: 132 SMs hold 66 pairs, but 30
  // clusters of 4, 15 of 8 and 7 of 16.
  const auto fits = [&](int size) { return rows * size <= (size > 2 ? sms * 15 / 16 : sms); };
  while (cluster < kMaxCluster && fits(cluster * 2) && columns / (cluster * 2) >= kLeastSlice) cluster *= 2;
  if (cluster == 1) return {Kernel::many_long_rows, 1};
  const bool longest = cluster == kMaxCluster && columns > kMaxCluster * kLongestSlice;
  return {longest ? Kernel::few_longest_rows : Kernel::few_long_rows, cluster};
}

}  // namespace indexcache::sm90::radix_topk
