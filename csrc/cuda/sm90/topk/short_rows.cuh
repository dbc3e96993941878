// Exact top-k of rows of up to 8,192 columns: a block holds its row in registers and selects from there.
//
// The time of a call is that of a chain of latencies, so the row is asked for before its window is known.
#pragma once

#include "csrc/cuda/sm90/topk/reader.cuh"
#include "csrc/cuda/sm90/topk/select.cuh"

namespace indexcache::sm90::radix_topk {

template <class T>
struct alignas(16) ShortRowShared {
  union alignas(16) {
    T ring[kThreads * kOwn];
    int32_t result[kFastK];
  };
  Histogram bins;
  SelectShared shared;
};

// The first round counts the first eleven bits of scores cut to half precision: 32 bins per octave where scores mostly
// are, so that it is mostly the only one.

/// The digits of two canonical scores.
struct Digits {
  uint32_t low, high;

  __device__ Digits(float score, float next) {
    uint32_t halves;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(next), "f"(score));
    const uint32_t signs = halves & 0x80008000u;
    halves ^= (signs - (signs >> 15)) | 0x80008000u;  // to integers that sort the same way, as keys do
    low = halves >> (16 - kDigitBits) & (kBins - 1);
    high = halves >> (32 - kDigitBits);
  }
};

/// The key of the least score from 0 up with this digit.
__device__ inline uint32_t least_key(uint32_t digit) {
  float score;
  const auto half = static_cast<uint16_t>((digit - kBins / 2) << (16 - kDigitBits));
  asm("cvt.f32.f16 %0, %1;" : "=f"(score) : "h"(half));
  return key_of(score);
}

/// The keys of the scores with the digit that `digits` is narrowed to.
__device__ inline Bin keys_of(const Bin& digits) {
  constexpr uint32_t kInfinite = kBins / 2 + (0x7c00 >> (16 - kDigitBits));
  const bool negative = digits.low < kBins / 2;
  const uint32_t digit = negative ? kBins - 1 - digits.low : digits.low;
  const uint32_t first = least_key(digit), last = digit < kInfinite ? least_key(digit + 1) - 1 : kHighestKey;
  return {negative ? ~last : first, last - first, digits.above, digits.inside};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kShortBlocksPerSm) short_rows_kernel(const __grid_constant__ TopkParams p) {
  extern __shared__ __align__(16) unsigned char bytes[];
  ShortRowShared<T>& s = *reinterpret_cast<ShortRowShared<T>*>(bytes);
  const int64_t index = blockIdx.x;
  const auto k = static_cast<uint32_t>(p.k);
  Row<T> row(p, index, 0, static_cast<int>(p.columns));
  const Reader<T, 1> reader(row, 0, 1, s.ring);
  reader.start();
  row.set_window(p, index);
  clear(s.bins);
  reader.wait();
  __syncthreads();

  const int first = reader.column(0);
  const uint32_t visible = row.inside(first) & ((1u << kOwn) - 1), bins = cuda::shared_address(s.bins.counts);
  float scores[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) scores[i] = reader.unit(0, i / reader.kUnit)[i % reader.kUnit];
  if (visible != (1u << kOwn) - 1) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) scores[i] = visible >> i & 1 ? scores[i] : kWorst;
  }
  uint32_t keys[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 2) {
    const Digits digits(canonical(scores[i]), canonical(scores[i + 1]));
    increment(bins, digits.low);
    increment(bins, digits.high);
    keys[i] = key_of(scores[i]), keys[i + 1] = key_of(scores[i + 1]);
  }
  Cut cut = kAll;
  if (row.length() > k) {
    const Bin found = narrow(s.shared, s.bins, {0, kBins - 1, 0, 0}, 0, k), start = keys_of(found);
    if (found.inside > 0) {
      const auto for_each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) f(i, keys[i]);
      };
      const auto key_at = [&](int i) { return key_of(reader.entry(0, i)); };
      cut = find_cut(s.shared, s.bins, start, shift_of(start.last), k, for_each, key_at);
    }
  }
  list_selected(s.shared, keys, cut, k, s.result, [&](int i) { return first + i; });
  write_result(p, index, s.result);
  if (p.reads != nullptr && threadIdx.x == 0) p.reads[index] = 1;
}

}  // namespace indexcache::sm90::radix_topk
