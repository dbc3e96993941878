// A row of scores as the kernels see it, scores as integers that sort the same way, and where selected columns go.
#pragma once

#include "csrc/cuda/common/ordered_key.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/topk/shared.cuh"

namespace indexcache::sm90::radix_topk {

using cuda::kFullMask;
using cuda::kWarpSize;
using cuda::lane_id;
using cuda::warp_id;

constexpr float kWorst = -__builtin_inff();   // never selected
constexpr uint32_t kLowestKey = 0x00800000u;  // of -FLT_MAX, the worst score that can be selected
constexpr uint32_t kHighestKey = 0xff800000u;  // of +inf
constexpr uint32_t kNoKey = 0;                // of no score

/// -0 equals +0, NaN equals -inf.
__device__ inline float canonical(float score) { return fmaxf(score, kWorst) + 0.0f; }

/// Larger score, larger key. That of -inf is kLowestKey - 1.
__device__ inline uint32_t key_of_canonical(float score) {
  const auto bits = static_cast<int32_t>(float_bits(score));
  return static_cast<uint32_t>(bits ^ (bits >> 31 | static_cast<int32_t>(0x80000000u)));
}
__device__ inline uint32_t key_of(float score) { return key_of_canonical(canonical(score)); }
__device__ inline float key_to_score(uint32_t key) {
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
/// The score that exactly those above it share or pass `key`: a score that has one, so that -0 passes where 0 does.
__device__ inline float score_below(uint32_t key) {
  constexpr uint32_t kZero = 0x80000000u;  // the key of both; the one below it is of none
  return key_to_score(key - 1 - (key == kZero));
}

/// 16 aligned bytes of scores, which are f32, or bf16 as its bits.
template <class T>
struct Unit {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];

  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return bits_float(words[i]);
    return bits_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }
};

/// From aligned global memory. Overwrites registers that have a value, so that loads behind a branch stay in flight
/// together.
template <class T>
__device__ inline void load_unit(const T* p, Unit<T>& unit) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "+r"(unit.words[0]), "+r"(unit.words[1]), "+r"(unit.words[2]), "+r"(unit.words[3])
               : "l"(p));
}

// Shared memory by 32-bit addresses: the compiler would compute them anew inside every branch.
template <class T>
__device__ inline Unit<T> load_shared_unit(uint32_t address) {
  Unit<T> unit;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.words[0]), "=r"(unit.words[1]), "=r"(unit.words[2]), "=r"(unit.words[3])
               : "r"(address)
               : "memory");
  return unit;
}
template <class T>
__device__ inline float load_shared(uint32_t address) {
  if constexpr (sizeof(T) == 4) {
    float score;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(score) : "r"(address) : "memory");
    return score;
  } else {
    uint16_t score;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(score) : "r"(address) : "memory");
    return bf16_to_float(score);
  }
}
__device__ inline void store_shared(uint32_t address, float score) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(score) : "memory");
}
__device__ inline void store_shared(uint32_t address, uint16_t score) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(score) : "memory");
}
__device__ inline void store_shared(uint32_t address, uint32_t low, uint32_t high) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high) : "memory");
}

/// Overwrites registers that have a value: loads behind branches would make the compiler write the values again and
/// again.
__device__ inline void load_shared(uint32_t address, uint32_t& low, uint32_t& high) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "+r"(low), "+r"(high) : "r"(address) : "memory");
}
/// Stores `value` at `to`, which goes on to the next word, or does nothing if `wanted` is 0. Without a branch.
__device__ inline void append_if(uint32_t wanted, uint32_t& to, uint32_t value) {
  asm volatile(
      "{\n  .reg .pred p;\n"
      "  setp.ne.u32 p, %1, 0;\n"
      "  @p st.shared.u32 [%0], %2;\n"
      "  @p add.u32 %0, %0, 4;\n}"
      : "+r"(to)
      : "r"(wanted), "r"(value)
      : "memory");
}

// Conversions of numbers below 2^23 without the unit for conversions, which takes 32 cycles for all threads of a block.
__device__ inline float small_to_float(uint32_t x) { return bits_float(x | 0x4b000000u) - 8388608.0f; }
__device__ inline uint32_t float_to_small(float x) { return float_bits(x + 8388608.0f) & 0x7fffffu; }

__device__ inline uint32_t highest_bit(uint32_t bits) {
  uint32_t index;
  asm("bfind.u32 %0, %1;" : "=r"(index) : "r"(bits));
  return index;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(uint16_t x) { return bf16_to_float(x); }
template <class T>
__device__ constexpr T worst() {
  if constexpr (sizeof(T) == 4) {
    return kWorst;
  } else {
    return 0xff80;
  }
}

template <class T>
struct Row {
  const T* scores;  // column 0
  int columns;
  int begin, end;  // of the window

  __device__ Row(const TopkParams& p, int64_t index, int begin, int end)
      : scores(static_cast<const T*>(p.logits) + index * p.row_stride),
        columns(static_cast<int>(p.columns)),
        begin(begin),
        end(end) {}
  __device__ Row(const TopkParams& p, int64_t index) : Row(p, index, 0, 0) { set_window(p, index); }

  /// The window that the call gives the row.
  __device__ void set_window(const TopkParams& p, int64_t index) {
    const int start = p.starts == nullptr ? 0 : __ldg(p.starts + index), stop = __ldg(p.ends + index);
    begin = max(start, 0);
    end = max(begin, min(columns, stop));
  }

  __device__ int length() const { return end - begin; }
  /// The column at or before `column` whose address is aligned to 16 bytes; for the first columns, one before the row.
  __device__ int aligned(int column) const {
    const auto address = reinterpret_cast<uintptr_t>(scores + column);
    return column - static_cast<int>(address / sizeof(T) % Unit<T>::kSize);
  }
  __device__ float score(int column) const { return to_float(__ldg(scores + column)); }

  /// Bit i: column + i lies in the window.
  __device__ uint32_t inside(int column) const {
    const auto up_to = [&](int bound) {
      const int count = max(bound - column, 0);
      return count >= 32 ? ~0u : (1u << count) - 1;
    };
    return up_to(end) & ~up_to(begin);
  }
};

/// Writes a result row from `columns[0 … k)` in shared memory: columns and then -1, or the slots that the call asks for
/// instead of columns. By all threads of the block.
__device__ inline void write_result(const TopkParams& p, int64_t index, const int32_t* columns) {
  const auto k = static_cast<uint32_t>(p.k);
  int32_t* const row = p.out + index * p.k;
  if (p.slots.block_table == nullptr) {
    if (k % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
      for (uint32_t i = 4 * threadIdx.x; i < k; i += 4 * kThreads) {
        *reinterpret_cast<int4*>(row + i) = *reinterpret_cast<const int4*>(columns + i);
      }
    } else {
      for (uint32_t i = threadIdx.x; i < k; i += kThreads) row[i] = columns[i];
    }
    return;
  }
  const SlotTable& table = p.slots;
  const int64_t request = table.request[index];
  const bool known = request >= 0 && request < table.requests;
  const int32_t* const pages = table.block_table + (known ? request * table.table_pages : 0);
  const auto page_size = static_cast<uint32_t>(min(table.page_size, int64_t{1} << 31));  // a larger one changes nothing
  for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
    const int column = columns[i];
    const uint32_t position = static_cast<uint32_t>(column) / page_size, offset = static_cast<uint32_t>(column) % page_size;
    const int64_t page = known && column >= 0 && position < table.table_pages ? __ldg(pages + position) : -1;
    const int64_t slot = page * page_size + offset;
    row[i] = page >= 0 && slot <= INT32_MAX ? static_cast<int>(slot) : -1;
  }
}

}  // namespace indexcache::sm90::radix_topk
