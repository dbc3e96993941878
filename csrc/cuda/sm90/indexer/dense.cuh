// Dense calls: queries against contiguous keys. A unit of work is a block of queries against a chunk of tiles.
#pragma once

#include <climits>

#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/indexer/math.cuh"

namespace indexcache::sm90::indexer {

struct DenseCall {
  IndexerLogitsParams p;
  CUtensorMap queries;  // of queries_map()
  CUtensorMap keys;     // e4m3 [keys, dim] in tiles of kTileKeys rows
  int query_blocks;  // of kQueries
  int units;         // query_blocks for every chunk of keys
  int chunk_tiles;
};

/// What a block of queries sees in a chunk. All lanes of a warp agree on it, and lane i knows the window of query i.
struct Visible {
  int chunk_begin, chunk_end;  // columns
  int first_tile, end_tile;    // those of the chunk that hold a column that any query sees
  int clear_begin, clear_end;  // as in Unit, of first_tile on
  Window window;
};

/// Units that run at the same time share their keys: queries change fastest.
template <class T>
__device__ Visible visible(const DenseCall& call, int unit) {
  const auto& p = call.p;
  const int query = unit % call.query_blocks * T::kQueries + cuda::lane_id();
  const int chunk = unit / call.query_blocks * call.chunk_tiles;
  const bool exists = cuda::lane_id() < T::kQueries && query < p.queries;
  Visible v;
  v.chunk_begin = chunk * kTileKeys;
  v.chunk_end = static_cast<int>(min(p.keys, (int64_t{chunk} + call.chunk_tiles) * kTileKeys));
  v.window.begin = exists ? max(p.starts[query], 0) : 0;
  v.window.end = exists ? static_cast<int>(min(p.keys, int64_t{p.ends[query]})) : 0;
  const bool empty = v.window.begin >= v.window.end;
  const int begin = max(v.chunk_begin, __reduce_min_sync(cuda::kFullMask, empty ? INT_MAX : v.window.begin));
  const int end = min(v.chunk_end, __reduce_max_sync(cuda::kFullMask, empty ? 0 : v.window.end));
  v.first_tile = begin < end ? begin / kTileKeys : chunk;
  v.end_tile = begin < end ? static_cast<int>(ceil_div(end, kTileKeys)) : v.first_tile;
  const bool present = Share<typename T::Own>::kOneQuery ? exists : cuda::lane_id() < T::kQueries;
  const int clear_begin = __reduce_max_sync(cuda::kFullMask, present ? (empty ? INT_MAX : v.window.begin) : 0);
  const int clear_end = __reduce_min_sync(cuda::kFullMask, present ? (empty ? 0 : v.window.end) : INT_MAX);
  v.clear_begin = clear_begin / kTileKeys + (clear_begin % kTileKeys != 0) - v.first_tile;
  v.clear_end = max(v.clear_begin, clear_end / kTileKeys - v.first_tile);
  return v;
}

/// The scales of a tile come straight from global memory while it is multiplied, so that they need no alignment.
struct DenseKeys {
  struct Scale {
    float of_row[2];
    __device__ static bool hole() { return false; }
  };
  const float* scales;
  int last;  // key

  template <class T>
  __device__ Scale scale(const Shared<T>&, int, int key) const {
    return {scales[min(key, last)], scales[min(key + 8, last)]};
  }
};

/// One warp.
template <class T>
__device__ void produce_dense(Shared<T>& shared, const DenseCall& call) {
  const auto& p = call.p;
  Ring<T::kUnitStages> units;
  Ring<T::kStages> keys;
  for (int i = blockIdx.x; i < call.units; i += gridDim.x) {
    const Visible v = visible<T>(call, i);
    const int tiles = v.end_tile - v.first_tile;
    if (tiles == 0) continue;
    const int stage = units.stage();
    const int query = i % call.query_blocks * T::kQueries;
    const int queries = static_cast<int>(min(int64_t{T::kQueries}, p.queries - query));
    cuda::wait(&shared.unit_empty[stage], units.parity() ^ 1);
    Unit<T>& unit = shared.units[stage];
    if (cuda::lane_id() < T::kQueries) unit.windows[cuda::lane_id()] = v.window;
    __syncwarp();
    if (cuda::elect()) {
      unit.row = query;
      unit.queries = queries;
      unit.first_key = v.first_tile * kTileKeys;
      unit.tiles = tiles;
      unit.clear_begin = v.clear_begin;
      unit.clear_end = v.clear_end;
      copy_queries(shared, stage, &call.queries, p.weights, query, queries);
      Ring<T::kStages> slot = keys;
      for (int tile = v.first_tile; tile < v.end_tile; ++tile, ++slot.count) {
        cuda::wait(&shared.key_empty[slot.stage()], slot.parity() ^ 1);
        cuda::arrive_expecting(&shared.key_full[slot.stage()], T::kKeyBytes);
        cuda::copy_tile(shared.keys[slot.stage()], &call.keys, 0, tile * kTileKeys, &shared.key_full[slot.stage()]);
      }
    }
    __syncwarp();
    keys.count += tiles;
    ++units.count;
  }
  end_units(shared, units);
}

/// -inf in the tiles of a unit that no query sees. Warp `warp` of kFillWarps takes whole units.
template <class T>
__device__ void fill_dense(const DenseCall& call, int warp) {
  for (int i = blockIdx.x + gridDim.x * warp; i < call.units; i += gridDim.x * kFillWarps) {
    const Visible v = visible<T>(call, i);
    const int64_t query = i % call.query_blocks * T::kQueries;
    const int queries = static_cast<int>(min(int64_t{T::kQueries}, call.p.queries - query));
    for (int row = 0; row < queries; ++row) {
      float* const logits = call.p.logits + (query + row) * call.p.logits_stride;
      fill(logits, v.chunk_begin, v.first_tile * kTileKeys);
      fill(logits, int64_t{v.end_tile} * kTileKeys, v.chunk_end);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) dense_kernel(const __grid_constant__ DenseCall call) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  if (threadIdx.x == 0) {
    cuda::prefetch_tensor_map(&call.queries);
    cuda::prefetch_tensor_map(&call.keys);
    init_barriers(shared);
  }
  __syncthreads();
  // The shuffle tells the compiler that these are the same in all lanes.
  const int warp = __shfl_sync(cuda::kFullMask, cuda::warp_id(), 0), warpgroup = warp / 4;
  if (warpgroup == 0) {
    cuda::give_registers<kProducerRegisters>();
    if (warp == 0) {
      produce_dense(shared, call);
    } else {
      fill_dense<T>(call, warp - 1);
    }
  } else {
    cuda::take_registers<kMathRegisters>();
    const int keys = static_cast<int>(call.p.keys);
    run_math(shared, {call.p.logits, call.p.logits_stride, keys}, DenseKeys{call.p.k_scale, keys - 1}, warpgroup - 1);
  }
}

}  // namespace indexcache::sm90::indexer
