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

/// The digits of all scores of a thread: those of entries i and i + kOwn / 2 in the halves of a word, so that one
/// instruction does for both.
struct Digits {
  static constexpr int kPairs = kOwn / 2;
  uint32_t pairs[kPairs];

  __device__ static uint32_t pair(float low, float high) {
    uint32_t halves;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(canonical(high)), "f"(canonical(low)));
    const uint32_t signs = halves & 0x80008000u;
    halves ^= (signs - (signs >> 15)) | 0x80008000u;  // to integers that sort the same way, as keys do
    return halves >> (16 - kDigitBits) & (kBins - 1) * 0x10001u;
  }

  /// Bit i: the digit of entry i is `digit` or more.
  __device__ uint32_t reaching(uint32_t digit) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) bits = bits >> 1 | ((pairs[i] + (0x8000 - digit) * 0x10001u) & 0x80008000u);
    static_assert(kPairs == 8);  // so the bits of the low halves are byte 1, those of the high ones byte 3
    return __byte_perm(bits, 0, 0x4431);
  }
};

constexpr uint32_t kWorstDigit = (0x7fff - 0x7c00) >> (16 - kDigitBits);  // of -inf, and of no other score

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

/// What is chosen of this thread's entries with the digit in which rank k lies: those in `inside`. `ties` tells how
/// many of the equal ones of all threads.
template <class ScoreAt>
__device__ inline Chosen choose(SelectShared& s, Histogram& bins, const Bin& found, uint32_t inside, uint32_t k,
                                uint32_t& ties, ScoreAt score_at) {
  Chosen chosen;
  const uint32_t wanted = k - found.above;
  const auto key_at = [&](int i) { return key_of(score_at(i)); };
  if (found.inside == wanted) {
    chosen.above = inside;
  } else if (found.inside <= kFew) {
    const Cut cut = cut_few(s, inside, found.inside, wanted, key_at);
    ties = cut.ties;
    for (; inside != 0; inside &= inside - 1) {
      const uint32_t key = key_at(__ffs(inside) - 1), bit = inside & -inside;
      if (key > cut.key) chosen.above |= bit;
      if (key == cut.key) chosen.equal |= bit;
    }
  } else {
    uint32_t keys[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) keys[i] = inside >> i & 1 ? key_at(i) : kNoKey;
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) f(i, keys[i]);
    };
    const Bin start = keys_of(found);
    const Cut cut = find_cut(s, bins, start, shift_of(start.last), k, for_each, key_at);
    ties = cut.ties;
    chosen = Chosen(keys, kOwn, cut);
  }
  return chosen;
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
  reader.wait(0);
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
  Digits digits;
#pragma unroll
  for (int i = 0; i < Digits::kPairs; ++i) {
    digits.pairs[i] = Digits::pair(scores[i], scores[i + Digits::kPairs]);
    increment(bins, digits.pairs[i] & 0xffffu);
    increment(bins, digits.pairs[i] >> 16);
  }
  Chosen chosen;
  uint32_t ties = 0;
  if (row.length() <= k) {
    chosen.above = digits.reaching(kWorstDigit + 1);
  } else {
    const Bin found = narrow(s.shared, s.bins, {0, kBins - 1, 0, 0}, 0, k);
    chosen.above = digits.reaching(found.low + 1);
    if (found.low > kWorstDigit) {
      const uint32_t inside = digits.reaching(found.low) ^ chosen.above;
      const Chosen rest = choose(s.shared, s.bins, found, inside, k, ties, [&](int i) { return reader.entry(0, i); });
      chosen.above |= rest.above;
      chosen.equal = rest.equal;
    }
  }
  list_chosen<kOwn>(s.shared, chosen, ties, kOwn, k, s.result, [&](int i) { return first + i; });
  write_result(p, index, s.result);
  if (p.reads != nullptr && threadIdx.x == 0) p.reads[index] = 1;
}

}  // namespace indexcache::sm90::radix_topk
