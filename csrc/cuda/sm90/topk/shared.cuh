// What the blocks keep in shared memory.
#pragma once

#include "csrc/cuda/sm90/topk/config.h"

namespace indexcache::sm90::radix_topk {

/// Keys low … low + last: `inside` of a set are there, `above` are better.
struct Bin {
  uint32_t low, last, above, inside;
};

/// What is selected: keys above `key`, and the first `ties` of those equal to it.
struct Cut {
  uint32_t key, ties;
};

struct alignas(16) Histogram {
  uint32_t counts[kBins];
  uint32_t outside;  // what lies in no bin
};

struct alignas(16) SelectShared {
  Bin found;
  Cut cut;
  uint32_t few, few_keys[kFew];
  uint32_t warp_totals[2][kWarps];  // in turns, so that one barrier per use is enough
};

/// The rank in the sample at which the threshold is taken, and the part of the row that is in the sample.
struct SamplePlan {
  uint32_t rank;
  float part;
};

struct alignas(8) Candidate {
  int32_t column;
  uint32_t score;  // its bits
};

template <class Rows>
struct alignas(16) LongRowShared {
  static constexpr int kListSize = Rows::kListed * kThreads;
  union alignas(16) {
    uint8_t ring[Rows::kStages * kThreads * kOwn * 4];
    struct {  // after the row was read
      Histogram below_ring;
      int32_t result[kFastK];
    };
  };
  union alignas(16) {
    Candidate list[kListSize];  // in column order; in the end block 0 has those of all
    struct {
      Candidate above[kFastK];  // where they are fewer than k:
      int32_t ties[kFastK];     // the first columns on a plateau at the cut
    };
    Histogram below_list;
  };
  alignas(16) uint8_t apart[Rows::kApart ? sizeof(Histogram) : 16];
  SelectShared shared;
  SamplePlan plan;
  uint64_t gathered;             // block 0: the lists of all blocks are there
  uint64_t told;                 // the others: the verdict is there
  uint32_t counts[kMaxCluster];  // block 0: the candidates of each block, listed or not
  uint2 verdict;                 // of block 0, for each: whether to read again, all candidates
  uint4 again;                   // of reads past other thresholds: all candidates, ties, the key they reach, reads

  /// The bins for a sample, and those for the list.
  __device__ Histogram& sample_bins() {
    return Rows::kApart ? *reinterpret_cast<Histogram*>(apart) : below_list;
  }
  __device__ Histogram& bins() { return Rows::kApart ? *reinterpret_cast<Histogram*>(apart) : below_ring; }
};
static_assert(sizeof(LongRowShared<ManyRows>) <= (233'472 - 2 * 1024) / 2);
static_assert(sizeof(LongRowShared<FewRows>) <= 232'448);
static_assert(kWholeRow <= LongRowShared<ManyRows>::kListSize);

}  // namespace indexcache::sm90::radix_topk
