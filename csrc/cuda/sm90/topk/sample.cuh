// The threshold that a little more than k scores of a long row should reach: from a sample, or exact.
#pragma once

#include "csrc/cuda/sm90/topk/select.cuh"

namespace indexcache::sm90::radix_topk {

/// What a score must reach to become a candidate.
struct Threshold {
  uint32_t key = kLowestKey;
  bool past_plateau = false;  // the key below is that of so many scores that they must not all become candidates
  uint32_t shift = 32 - kDigitBits;  // at which bins from the key on hold a few candidates each
  int rounds = 0;                    // in which the row was read to find it
  uint32_t lower = 0;                // if not 0: a key to try should too few scores reach the first
};

/// The rank in a sample at which the threshold is taken: so far below the k-th best that the row has more than k scores
/// above it but for `kDeviations` standard deviations (the number of samples above a score is near Poisson), or, where
/// that would be too many for the list, half-way. `expected` and `most`: samples among k, and among as many as the list
/// holds.
__device__ inline uint32_t sample_rank(float expected, float most) {
  constexpr float kDeviations = 4.5f;
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(kDeviations * kDeviations / 4 + expected));
  const float safe = (kDeviations / 2 + root) * (kDeviations / 2 + root);
  return static_cast<uint32_t>(min(safe, (expected + most) / 2)) + 1;
}

/// Scores from random places, one in each of many equal parts of the window: neither a trend nor a period of the row
/// can hide. Places depend on the part alone, and every block of a cluster has the same sample.
template <class T>
class Sample {
 public:
  __device__ explicit Sample(const Row<T>& row) : length_(row.length()) {
    const int log_units = log_sample_units(row.length()), log_parts = kLogPairs + log_units;
    const int log_pairs = max(-log_units, 0);  // of which one has a unit
    const uint32_t pair = threadIdx.x / 2;
    const bool samples = row.length() > kWholeRow && pair % (1 << log_pairs) == 0;  // a short row needs no threshold
    units_ = samples ? 1 << max(log_units, 0) : 0;
    // Columns are counted from an aligned address.
    const auto misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row.scores) / sizeof(T) % kSampleUnit);
    const uint32_t first = row.begin + misaligned, last_unit = (first + length_) / kSampleUnit - 1;
    const T* const share = row.scores - misaligned + threadIdx.x % 2 * kSampleShare;
#pragma unroll
    for (int u = 0; u < kMaxUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) loaded_[u][j] = {};
      if (u >= units_) continue;
      const uint32_t part = u * (kThreads / 2) + (pair >> log_pairs);
      const auto start_of = [&](uint32_t i) { return first + static_cast<uint32_t>(uint64_t{length_} * i >> log_parts); };
      // The part's units that are aligned to their size; a part that is too short for one has the next one.
      const uint32_t unit = (start_of(part) + kSampleUnit - 1) / kSampleUnit;
      const auto room = max(static_cast<int>(start_of(part + 1) / kSampleUnit - unit), 0);
      uint32_t hash = part * 0x9e3779b9u;
      hash = (hash ^ hash >> 15) * 0x85ebca6bu;
      hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
      const T* const scores = share + int64_t{min(unit + __umulhi(hash, room), last_unit)} * kSampleUnit;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) load_unit(scores + j * Unit<T>::kSize, loaded_[u][j]);
    }
  }

  /// `list_size`: the most candidates that can be kept.
  __device__ SamplePlan plan(uint32_t k, int list_size) const {
    const float part = __fdividef(static_cast<float>(sample_size(length_)), static_cast<float>(length_));
    return {sample_rank(static_cast<float>(k) * part, static_cast<float>(list_size) * part), part};
  }

  /// The bins are zero before and after.
  __device__ Threshold threshold(SelectShared& s, Histogram& bins, const SamplePlan& plan, int list_size) const {
    const uint32_t rank = plan.rank;
    constexpr uint32_t kFirst = (1u << (32 - kDigitBits)) - 1;  // of a bin of the first round
    // A NaN has any key, and a threshold that is off by it costs time, no more.
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int u = 0; u < kMaxUnits; ++u) {
        if (u >= units_) break;
#pragma unroll
        for (int i = 0; i < kSampleShare; ++i) {
          f(i, key_of_canonical(loaded_[u][i / Unit<T>::kSize][i % Unit<T>::kSize]));
        }
      }
    };
    uint32_t near = 0;  // samples in the first round's bin
    const auto done = [&](const Bin& b) {
      if (b.last != kFirst) return b.above + b.inside <= rank + rank / 8;
      near = b.inside;
      return b.inside <= rank;
    };
    const Bin bin = descend(s, bins, kAllKeys, shift_of(kAllKeys.last), rank, for_each, done);
    if (bin.low < kLowestKey) return {};
    // How dense samples are about the threshold: a bin of the first round is a quarter of an octave, where keys are
    // spread evenly unless the data is strange; then they are denser in the last round's, where one is because the rank
    // is.
    const float width = small_to_float(bin.last + 1);
    const float density =
        max(small_to_float(near) * (1.0f / (kFirst + 1)), __fdividef(small_to_float(bin.inside - 1), width));
    constexpr float kEach = 2;  // candidates in a bin; fewer where the tail of a distribution thins out
    const uint32_t shift = min((float_bits(__fdividef(kEach * plan.part, density) + 1.0f) >> 23) - 127, 31u);
    if (bin.last == kFirst) {
      const float below = 1.0f - __fdividef(small_to_float(rank - bin.above), small_to_float(bin.inside));
      return {bin.low + float_to_small(max(below, 0.0f) * width), false, shift, 0, bin.low};
    }
    const bool plateau = small_to_float(bin.above + bin.inside) > static_cast<float>(list_size) * plan.part;
    return {bin.low + plateau, plateau, shift};  // many in one bin: it is a single key
  }

 private:
  static constexpr int kLoads = kSampleShare / Unit<T>::kSize;
  static constexpr int kLogPairs = kLogThreads - 1;

  uint32_t length_;
  int units_;
  Unit<T> loaded_[kMaxUnits][kLoads];
};

/// From the whole row, with exact counts: cannot miss. The row has at least k scores, or all become candidates. The
/// bins are zero before and after.
template <class T>
__device__ inline Threshold exact_threshold(SelectShared& s, Histogram& bins, const Row<T>& row, uint32_t k,
                                            uint32_t list_size) {
  int rounds = 0;
  const Bin bin = descend(
      s, bins, kAllKeys, shift_of(kAllKeys.last), k,
      [&](auto f) {
        ++rounds;
#pragma unroll 4
        for (int column = row.begin + static_cast<int>(threadIdx.x); column < row.end; column += kThreads) {
          f(0, key_of(row.score(column)));
        }
      },
      [&](const Bin& b) { return b.above + b.inside <= list_size; });
  const bool plateau = bin.above + bin.inside > list_size;  // then the bin is a single key
  Threshold exact;
  exact.rounds = rounds;
  if (bin.low >= kLowestKey) exact.key = bin.low + plateau, exact.past_plateau = plateau;
  return exact;
}

}  // namespace indexcache::sm90::radix_topk
