// A block's part of a row on its way through a ring in shared memory.
#pragma once

#include "csrc/cuda/common/async_copy.cuh"
#include "csrc/cuda/sm90/topk/row.cuh"

namespace indexcache::sm90::radix_topk {

/// What a block reads of the columns [begin, end) of a row: steps of 32 x kOwn columns, kOwn neighbouring ones per
/// lane. Its warps take 16 steps together, in a round, each its own. There is room for `kStages` rounds, and `kAhead` are
/// on the way at once: if that is fewer, another is asked for when one has arrived, and not after the last look at it.
template <class T, int kStages, int kAhead = kStages>
class Reader {
 public:
  static constexpr int kStep = kWarpSize * kOwn, kStepBytes = kStep * static_cast<int>(sizeof(T));
  static constexpr int kUnit = Unit<T>::kSize, kUnits = kOwn / kUnit;  // of a lane in a step
  static_assert(kUnits == 2 || kUnits == 4);

  /// The steps of the row are split evenly among `blocks`, of which this is block `rank`; those of a higher rank have
  /// none. `ring`: kStages rounds.
  __device__ Reader(const Row<T>& row, int rank, int blocks, void* ring) : row_(row), origin_(row.aligned(row.begin)) {
    ring_ = cuda::shared_address(ring) + warp_id() * kStages * kStepBytes;
    const uint32_t all = row.length() > 0 ? (static_cast<uint32_t>(row.end - origin_) + kStep - 1) / kStep : 0;
    last_ = all - 1;
    first_ = all * rank / blocks;  // 2^31 columns are 2^22 steps
    end_ = max(first_, min(all * (rank + 1) / blocks, all));
  }

  /// Of the block: how often its warps have a step each, or, the last time, some of them.
  __device__ int rounds() const { return static_cast<int>(end_ - first_ + kWarps - 1) / kWarps; }
  /// The column of this lane's first entry.
  __device__ int column(int round) const { return origin_ + static_cast<int>(step(round)) * kStep + lane_id() * kOwn; }

  /// Starts the copy of the first rounds.
  __device__ void start() const {
#pragma unroll 1
    for (int round = 0; round < kAhead; ++round) fetch(round);
  }
  /// Waits until `round` and `kMore` after it have arrived.
  template <int kMore = 0>
  __device__ void wait(int round) const {
    static_assert(kMore == 0 || kAhead == kStages);
    cuda::wait_for_copies<kAhead - 1 - kMore>();
    __syncwarp();
    if constexpr (kAhead < kStages) fetch(round + kAhead);
  }
  /// After this warp's last look at `round`: starts the copy that takes its place.
  __device__ void release(int round) const {
    if constexpr (kAhead < kStages) return;
    __syncwarp();
    fetch(round + kAhead);
  }
  /// Waits for what is still on the way, so that there can be another start().
  __device__ void settle() const { cuda::wait_for_copies<0>(); }

  /// Entry i of this lane.
  __device__ float entry(int round, uint32_t i) const {
    return load_shared<T>(lane_place(round) + ((i * sizeof(T)) ^ swap(lane_id())));
  }
  /// Entries j * kUnit … of this lane.
  __device__ Unit<T> unit(int round, int j) const {
    return load_shared_unit<T>(lane_place(round) + (j * 16 ^ swap(lane_id())));
  }

  /// Bit i: entry i of this lane lies in the window and above `below`.
  __device__ uint32_t above(int round, float below) const {
    // The sign of the difference: set where the score is larger, clear where either is NaN.
    return visible_bits(round, [&](float score) { return float_bits(below - score); });
  }
  /// Bit i: entry i of this lane lies in the window and equals `wanted`.
  __device__ uint32_t equal(int round, float wanted) const {
    return visible_bits(round, [&](float score) { return score == wanted ? ~0u : 0u; });
  }

 private:
  /// Bit i: the highest bit of f(entry i), in the window.
  template <class F>
  __device__ uint32_t visible_bits(int round, F f) const {
    if (step(round) >= end_) return 0;
    uint32_t halves[2] = {};  // two chains of shifts take half the time of one
#pragma unroll
    for (int j = kUnits - 1; j >= 0; --j) {
      const Unit<T> scores = unit(round, j);
      uint32_t& half = halves[j / (kUnits / 2)];
#pragma unroll
      for (int i = kUnit - 1; i >= 0; --i) half = __funnelshift_l(f(scores[i]), half, 1);
    }
    const uint32_t mask = halves[1] << (kOwn / 2) | halves[0];
    const bool edge = step(round) == 0 || step(round) == last_;
    return edge ? mask & row_.inside(column(round)) : mask;
  }

  __device__ uint32_t step(int round) const { return first_ + round * kWarps + warp_id(); }
  __device__ uint32_t stage(int round) const { return ring_ + round % kStages * kStepBytes; }
  /// Eight neighbouring lanes must meet no bank of shared memory twice when they read their j-th units: these lie at
  /// 16 * j ^ swap(lane) from the lane's place.
  __device__ static uint32_t swap(uint32_t lane) { return lane / (8 / kUnits) % kUnits * 16; }
  __device__ uint32_t lane_place(int round) const { return stage(round) + lane_id() * kUnits * 16; }

  /// Nothing outside the row is read: what stands there is not defined, and outside the window. Each round is a group
  /// of copies, also one that is empty.
  __device__ void fetch(int round) const {
    if (step(round) < end_) fetch_step(round);
    cuda::commit_copies();
  }

  __device__ void fetch_step(int round) const {
    const int first = origin_ + static_cast<int>(step(round)) * kStep, column = first + lane_id() * kUnit;
    const T* const from = row_.scores + column;
    // Lanes copy neighbouring units: those of one lane, then of the next.
    const auto to = [&](int j) {
      const uint32_t unit = j * kWarpSize + lane_id();
      return stage(round) + (unit * 16 ^ swap(unit / kUnits));
    };
    if (first >= 0 && first + kStep <= row_.columns) {
#pragma unroll
      for (int j = 0; j < kUnits; ++j) cuda::copy_16_bytes_once(to(j), from + j * kWarpSize * kUnit);
    } else {
#pragma unroll 1
      for (int j = 0; j < kUnits; ++j) {
        const int begin = column + j * kWarpSize * kUnit, left = row_.columns - begin;
        if (begin < 0) {
#pragma unroll 1
          for (int i = -begin; i < min(kUnit, row_.columns - begin); ++i) {
            store_shared(to(j) + i * sizeof(T), __ldg(row_.scores + begin + i));
          }
        } else if (left > 0) {
          cuda::copy_first_bytes(to(j), row_.scores + begin, min(left, kUnit) * sizeof(T));
        }
      }
    }
  }

  Row<T> row_;
  uint32_t ring_;
  int origin_;
  uint32_t first_, end_, last_;  // steps: of the block, and the last of the row
};

}  // namespace indexcache::sm90::radix_topk
