// Sizes of the sm90 top-k, and how a call is spread over the GPU. Measured on an H200 (132 SMs, 4.4 TB/s).
#pragma once

#include <cstdint>

#include "indexcache/params.h"

namespace indexcache::sm90::radix_topk {

inline constexpr int kThreads = 512;  // two blocks per SM: one selects while the other reads
inline constexpr int kBlocksPerSm = 2;
inline constexpr int kMaxCluster = 16;

inline constexpr int kFastK = 2048;           // longer selections go to the generic kernel
inline constexpr int kCandidates = 8192;      // scores that may pass the threshold
inline constexpr int kSampleUnit = 8;         // neighbouring scores per sample: one 32-byte sector
inline constexpr int kHistogramBits = 11;
inline constexpr int kBins = 1 << kHistogramBits;
inline constexpr int kResolve = 32;           // candidates that one warp ranks by itself
inline constexpr int kBuckets = 4096;         // equal ranges of columns, by which the output is sorted
inline constexpr int kLoads = 4;              // 16-byte loads in flight per thread
inline constexpr int64_t kWholeRow = kThreads * kSampleUnit;  // up to this length every score is a candidate
inline constexpr int64_t kLeastSlice = 8192;  // columns per block below which a cluster does not pay

/// Parts of a row that give one sample unit each: every part is at least two units long.
inline constexpr int sample_parts(int64_t length) {
  const int64_t rounds = length >> 18;  // one unit per thread for every 2^18 columns, up to 32
  if (length < 2 * kThreads * kSampleUnit) return kThreads / 2;
  return kThreads * static_cast<int>(rounds < 1 ? 1 : rounds < 32 ? rounds : 32);
}
/// The sample aims at 8/5 k survivors. In a row of 131,072 about 102 samples lie above that threshold, with a standard
/// deviation of 10 %, so fewer than k survivors is 4 deviations away. Short selections aim at kLeastRank samples.
inline constexpr int aim(int k) { return k + k / 5 * 3 + 1; }
inline constexpr uint32_t kLeastRank = 32;
/// A threshold that lets through more than this, by estimate, is refined: every candidate costs later.
inline constexpr int acceptable(int k) { return 2 * k + kCandidates / 16; }

/// Blocks that share a row. Pure: rows, columns and the SM count decide, never the windows, which are on the device.
inline constexpr int cluster_size(int64_t rows, int64_t columns, int sms) {
  int size = 1;
  while (size < kMaxCluster && rows * size * 2 <= sms && columns / (size * 2) >= kLeastSlice) {
    size *= 2;
  }
  return size;
}

/// Shared memory of a block.
struct Shared {
  uint64_t candidates[kCandidates];  // key << 32 | ~column: larger is better, all distinct
  union {
    float staged[kThreads / 32][32 * kLoads * 4];  // what each warp has just read, for picking single scores out of it
    struct {
      uint32_t bucket_ends[kBuckets];
      int32_t columns[kFastK];
    } output;
  };
  uint32_t histogram[kBins];
  uint64_t members[kResolve];
  uint64_t cut;  // what the selection keeps: values >= cut
  uint32_t warp_totals[kThreads / 32];
  uint32_t found_bin, found_above, found_inside, member_count;
  uint32_t count;         // scores that passed the threshold in this block, stored or not
  uint32_t remote_count;  // block 0: those of the other blocks, stored from the end of `candidates`
  uint32_t best_key;      // the largest
  uint32_t threshold;     // block 0: what the whole cluster continues with
};

}  // namespace indexcache::sm90::radix_topk
