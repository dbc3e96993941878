// Top-k by radix select: a block per row finds the key of the k-th best score, eight bits per pass over the row, then
// lists what lies above it, and the first of what equals it, in column order.
#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/ordered_key.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/generic/generic.h"

namespace indexcache::generic {
namespace {

using cuda::kNeverSelected;
using cuda::ordered_key;

constexpr int kThreads = 1024;
constexpr int kItems = 4;  // scores per thread and step: loads in flight
constexpr int kStep = kThreads * kItems;
static_assert(kStep < 0x10000, "two counts of a step share 32 bits");
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

/// What is selected: keys above `key`, and the first `ties` of those equal to it; `count` in all.
struct Cut {
  uint32_t key, ties, count;
};

template <class T>
__device__ uint32_t key_at(const T* scores, uint32_t length, uint32_t i) {
  return i < length ? ordered_key(cuda::to_float(scores[i])) : kNeverSelected;
}

template <class T>
__device__ Cut find_cut(const T* scores, uint32_t length, int64_t k) {
  __shared__ uint32_t histogram[kDigits];
  __shared__ uint32_t cut_digit, above_cut;
  uint32_t prefix = 0;  // the digits of the k-th best key that are known
  uint32_t wanted = 0;  // its rank, from 1, among the keys with this prefix
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
    __syncthreads();
    const bool first = shift == 32 - kDigitBits;
    for (uint32_t base = threadIdx.x; base < length; base += kStep) {
      uint32_t keys[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) keys[i] = key_at(scores, length, base + i * kThreads);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool counted = keys[i] != kNeverSelected && (first || keys[i] >> (shift + kDigitBits) == prefix);
        if (counted) atomicAdd(&histogram[(keys[i] >> shift) % kDigits], 1u);
      }
    }
    __syncthreads();
    const uint32_t digit = kDigits - 1 - threadIdx.x;  // thread 0 has the best digit; the upper threads none
    const uint32_t count = threadIdx.x < kDigits ? histogram[digit] : 0;
    const cuda::BlockSum above = cuda::block_exclusive_sum<kThreads>(count);
    if (first) {
      if (above.total <= k) {
        __syncthreads();  // for the next sum
        return {kNeverSelected, 0, above.total};
      }
      wanted = static_cast<uint32_t>(k);
    }
    if (above.before < wanted && wanted <= above.before + count) {
      cut_digit = digit;
      above_cut = above.before;
    }
    __syncthreads();
    prefix = prefix << kDigitBits | cut_digit;
    wanted -= above_cut;
  }
  return {prefix, wanted, static_cast<uint32_t>(k)};
}

/// Writes the selected columns, the first of which is `column`, in ascending order.
template <class T>
__device__ void list_selected(const T* scores, uint32_t length, int column, Cut cut, int32_t* out) {
  uint32_t above_seen = 0, ties_seen = 0;
  for (uint32_t base = 0; base < length; base += kStep) {
    if (above_seen + min(ties_seen, cut.ties) == cut.count) return;
    const uint32_t first = base + threadIdx.x * kItems;
    uint32_t keys[kItems];
    uint32_t counts = 0;  // keys above the cut in the upper half, ties in the lower: one scan serves both
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      keys[i] = key_at(scores, length, first + i);
      counts += keys[i] > cut.key ? 0x10000u : keys[i] == cut.key ? 1u : 0u;
    }
    const cuda::BlockSum sum = cuda::block_exclusive_sum<kThreads>(counts);
    uint32_t above = above_seen + (sum.before >> 16);
    uint32_t ties = ties_seen + (sum.before & 0xffffu);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool tie = keys[i] == cut.key;
      const bool selected = keys[i] > cut.key || (tie && ties < cut.ties);
      if (selected) out[above + min(ties, cut.ties)] = column + static_cast<int32_t>(first + i);
      above += keys[i] > cut.key;
      ties += tie;
    }
    above_seen += sum.total >> 16;
    ties_seen += sum.total & 0xffffu;
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) topk_kernel(const TopkParams p) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int begin = p.starts == nullptr ? 0 : max(p.starts[row], 0);
    const int64_t end = min(p.columns, int64_t{p.ends[row]});
    const uint32_t length = end > begin ? static_cast<uint32_t>(end - begin) : 0;
    const T* scores = static_cast<const T*>(p.logits) + row * p.row_stride + begin;
    int32_t* out = p.out + row * p.k;
    const Cut cut = find_cut(scores, length, p.k);
    list_selected(scores, length, begin, cut, out);
    for (int64_t i = cut.count + threadIdx.x; i < p.k; i += kThreads) out[i] = -1;
    if (p.reads != nullptr && threadIdx.x == 0) p.reads[row] = 32 / kDigitBits + 1;
  }
}

}  // namespace

void topk(const TopkParams& p, Stream stream) {
  if (p.k <= 0) return;
  const auto kernel = p.dtype == DType::f32 ? topk_kernel<float> : topk_kernel<cuda::bf16_bits>;
  cuda::launch("topk", kernel, p.rows, kThreads, 0, stream, p);
  if (p.slots.block_table == nullptr) return;
  to_slots({.indices = p.out, .tokens = p.rows, .k = p.k, .table = p.slots, .slots = p.out}, stream);
}

}  // namespace indexcache::generic
