// From sums to the output: normalise, sink, lse; the blocks of a cluster combine their splits.
#pragma once

#include "csrc/cuda/common/cluster.cuh"
#include "csrc/cuda/sm90/sparse_mla/math.cuh"

namespace indexcache::sm90::attention {

/// Which part of the call a block of the grid has.
struct Work {
  int64_t token;
  int first_head, heads;  // that exist
  int tile_heads;         // a power of two if there are splits
  int split, splits;      // rank in the cluster, and its size
  int union_keys = -1;    // of a group with a union; its rows are the heads of all its tokens
};

/// What a row of the output comes to, and what it is to be multiplied by.
struct Total {
  float lse;
  float factor;
};

/// Of a row whose values are relative to `max`.
inline __device__ Total normalise(float max, float sum, const SparseMlaParams& p, const Work& work, int row) {
  constexpr float kLn2 = 0.693147180559945f;
  if (sum == 0) return {-__builtin_inff(), 0};
  const float lse = (max + log2f(sum)) * kLn2;
  const bool sinks = p.sink != nullptr && row < work.heads;
  const float kept = sinks ? 1.0f / (1.0f + expf(p.sink[(work.first_head + row) % p.heads] - lse)) : 1.0f;
  return {lse, kept / sum};
}

/// Eight values of a row.
inline __device__ void store_unit(const SparseMlaParams& p, const Work& work, int row, int unit, uint4 x) {
  constexpr int kUnits = kValueDims / 8;
  static_cast<uint4*>(p.out)[(work.token * p.heads + work.first_head + row) * kUnits + unit] = x;
}

/// The output of a split as bf16 [64][512], in the place of the queries; 16-byte units are swizzled over 128 bytes, so
/// that eight neighbouring ones of a row or of a column are in different banks.
template <class T>
__device__ uint16_t* output(Shared<T>& shared, int row, int column) {
  return shared.queries + row * kValueDims + (column ^ row % 8 * 8);
}

/// The dims of a value, in units of eight, that a block of a cluster combines.
struct Units {
  static constexpr int kDims = 8, kAll = kValueDims / kDims;
  int begin, end;
  /// `inverse`: of inverse_of(splits).
  __device__ Units(int rank, uint32_t inverse) : begin(first(rank, inverse)), end(first(rank + 1, inverse)) {}
  __device__ int count() const { return end - begin; }
  /// kAll * rank / splits, as an exact product.
  __device__ static int first(int rank, uint32_t inverse) { return static_cast<int>(kAll * rank * inverse >> 16); }
  __device__ static uint32_t inverse_of(int splits) { return ((1u << 16) + splits - 1) / splits; }
  __device__ static int owner(int unit, int splits) { return (splits * (unit + 1) - 1) / kAll; }
};

/// A unit or rank, and a row of the tile, of a flat index over both.
struct Place {
  int major, row;
  __device__ static Place of(int i, const Work& work) {
    return {i >> (31 - __clz(work.tile_heads)), i & (work.tile_heads - 1)};
  }
};

// Each block of a cluster sends all that it has: to every block its row states, and its sums of the units that the
// other combines, as bf16 relative to its own maxima. The inbox takes the place of the keys, so nothing is sent before
// all blocks have done their products.

template <class T>
__device__ RowState* inbox_state(Shared<T>& shared, int rank, int row) {
  return reinterpret_cast<RowState*>(shared.keys) + rank * kTileHeads + row;
}
template <class T>
__device__ uint4* inbox(Shared<T>& shared, const Work& work, int rank, const Units& units, int unit, int row) {
  constexpr int kStates = kMaxSplits * kTileHeads * sizeof(RowState) / sizeof(uint4);
  constexpr int kLargest = Units::kAll + kMaxSplits;  // units of all ranks: as many as there are, rounded up
  static_assert(sizeof shared.keys >= sizeof(uint4) * (kStates + kLargest * kTileHeads));
  const int place = rank * units.count() + unit - units.begin;
  return reinterpret_cast<uint4*>(shared.keys) + kStates + place * work.tile_heads + row;
}

/// One thread, before any block sends.
template <class T>
__device__ void expect_splits(Shared<T>& shared, const Work& work) {
  const Units units(work.split, Units::inverse_of(work.splits));
  const int row_bytes = units.count() * int{sizeof(uint4)} + int{sizeof(RowState)};
  cuda::arrive_expecting(&shared.splits_full, work.splits * work.tile_heads * row_bytes);
}

template <class T>
__device__ void send_splits(Shared<T>& shared, const Work& work) {
  const uint32_t inverse = Units::inverse_of(work.splits);
  for (int i = threadIdx.x; i < Units::kAll * work.tile_heads; i += kMathThreads) {
    const auto [unit, row] = Place::of(i, work);
    const int to = Units::owner(unit, work.splits);
    const auto* const from = reinterpret_cast<const uint4*>(output(shared, row, unit * Units::kDims));
    const auto* const local = inbox(shared, work, work.split, Units(to, inverse), unit, row);
    cuda::store_counted(cuda::address_in(to, local), *from, cuda::address_in(to, &shared.splits_full));
  }
  for (int i = threadIdx.x; i < work.splits * work.tile_heads; i += kMathThreads) {
    const auto [to, row] = Place::of(i, work);
    const RowState state = shared.state[row];
    cuda::store_counted(cuda::address_in(to, inbox_state(shared, work.split, row)), __float_as_uint(state.max),
                        __float_as_uint(state.sum), cuda::address_in(to, &shared.splits_full));
  }
}

/// This block's units of the output: the splits in the order of their ranks.
template <class T>
__device__ void combine(Shared<T>& shared, const SparseMlaParams& p, const Work& work) {
  const Units units(work.split, Units::inverse_of(work.splits));
  for (int i = threadIdx.x; i < units.count() * work.tile_heads; i += kMathThreads) {
    const auto [place, row] = Place::of(i, work);
    if (row >= work.heads) continue;
    const int unit = units.begin + place;
    float max = -__builtin_inff(), sum = 0, x[Units::kDims] = {};
    for (int rank = 0; rank < work.splits; ++rank) max = fmaxf(max, inbox_state(shared, rank, row)->max);
#pragma unroll 4
    for (int rank = 0; rank < work.splits; ++rank) {
      const RowState state = *inbox_state(shared, rank, row);
      const float weight = fast_exp2(state.max - finite_base(max));
      sum += state.sum * weight;
      const uint4 part = *inbox(shared, work, rank, units, unit, row);
      const uint32_t words[] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int j = 0; j < Units::kDims; ++j) {
        x[j] += weight * __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u);
      }
    }
    const Total total = normalise(max, sum, p, work, row);
#pragma unroll
    for (float& value : x) value *= total.factor;
    if (unit == 0) p.lse[work.token * p.heads + work.first_head + row] = total.lse;
    store_unit(p, work, row, unit, cuda::bf16_chunk(x));
  }
}

/// The part of finish() that concerns the other warps of a block in a cluster.
inline __device__ void attend_finish() {
  __syncwarp();
  cuda::cluster_arrive();
  cuda::cluster_wait();
}

/// The math warpgroups of a block in a cluster.
template <class T, class Values>
__device__ void finish(Math<T>& math, const SparseMlaParams& p, const Work& work, const Values& values) {
  Shared<T>& shared = math.shared;
  const int first = first_row();
  math.share_sums();
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);  // and no products read queries or keys any more
  cuda::cluster_arrive();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first + 8 * r;
    if (math.warpgroup == 0 && cuda::lane_id() % 4 == 0) {
      shared.state[row] = {math.max[r], shared.sums[0][row] + shared.sums[1][row]};
    }
#pragma unroll
    for (int j = 0; j < kHalfDims / 8; ++j) {
      const int i = 4 * j + 2 * r, column = math.warpgroup * kHalfDims + 8 * j + first_column();
      *reinterpret_cast<uint32_t*>(output(shared, row, column)) = cuda::pack_bf16x2(values(i), values(i + 1));
    }
  }
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);
  cuda::cluster_wait();
  send_splits(shared, work);
  cuda::wait(&shared.splits_full, 0);
  combine(shared, p, work);
}

}  // namespace indexcache::sm90::attention
