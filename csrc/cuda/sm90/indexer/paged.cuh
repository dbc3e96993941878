// Paged calls: the queries of a request, four at most at a time, against the pages of its keys. The blocks share the
// pages of all requests evenly, whatever the lengths are: each block finds its run of them in context_lens.
#pragma once

#include <climits>

#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/indexer/math.cuh"

namespace indexcache::sm90::indexer {

struct PagedCall {
  IndexerLogitsPagedParams p;
  CUtensorMap queries;  // e4m3 [requests * queries_per_request * heads, dim] in tiles of kColumns rows
  CUtensorMap keys;     // e4m3 [pages, kTileKeys, dim] in tiles of a page
  int groups_per_request;  // of up to kQueries queries; groups are numbered through
};

/// Queries of one request that share a tile.
struct Group {
  int64_t request, row;  // row: the first query's, of the logits
  int queries;
};

template <class T>
__device__ Group group_of(const PagedCall& call, int64_t index) {
  const int64_t request = index / call.groups_per_request;
  const int64_t query = index % call.groups_per_request * T::kQueries;
  return {request, request * call.p.queries_per_request + query,
          static_cast<int>(min(int64_t{T::kQueries}, call.p.queries_per_request - query))};
}

/// Columns that a query may see: those that are asked for and have an entry in the block table.
__device__ inline int visible_keys(const PagedCall& call, int64_t row) {
  const int64_t columns = min(call.p.columns, call.p.table_pages * kTileKeys);
  return max(0, static_cast<int>(min(columns, int64_t{call.p.context_lens[row]})));
}

/// Pages that any query of a group sees.
template <class T>
__device__ int visible_pages(const PagedCall& call, const Group& group) {
  int keys = 0;
  for (int i = 0; i < group.queries; ++i) keys = max(keys, visible_keys(call, group.row + i));
  return static_cast<int>((int64_t{keys} + kTileKeys - 1) / kTileKeys);
}

__device__ inline int64_t warp_inclusive_sum(int64_t value) {
#pragma unroll
  for (int offset = 1; offset < cuda::kWarpSize; offset *= 2) {
    const int64_t left = __shfl_up_sync(cuda::kFullMask, value, offset);
    if (cuda::lane_id() >= offset) value += left;
  }
  return value;
}

/// A run of pages in the list of all groups' pages.
struct Run {
  int64_t group, skip;  // it starts `skip` pages after the first page of `group`, perhaps in a later group
  int64_t pages;
};

/// The share of this block. Each lane counts a strip of groups, so that all lengths are read once.
template <class T>
__device__ Run share_of_block(const PagedCall& call, int64_t groups) {
  const int64_t strip = ceil_div(groups, cuda::kWarpSize);
  const int64_t begin = min(groups, strip * cuda::lane_id()), end = min(groups, begin + strip);
  int64_t own = 0;
#pragma unroll 4
  for (int64_t g = begin; g < end; ++g) own += visible_pages<T>(call, group_of<T>(call, g));
  const int64_t through = warp_inclusive_sum(own);
  const int64_t all = __shfl_sync(cuda::kFullMask, through, cuda::kWarpSize - 1);
  const int64_t first = all * blockIdx.x / gridDim.x, last = all * (blockIdx.x + 1) / gridDim.x;
  const unsigned after = __ballot_sync(cuda::kFullMask, through > first);
  if (first == last) return {};  // then `after` may be empty
  const int lane = __ffs(static_cast<int>(after)) - 1;
  const int64_t skip = first - __shfl_sync(cuda::kFullMask, through - own, lane);
  return {.group = __shfl_sync(cuda::kFullMask, begin, lane), .skip = skip, .pages = last - first};
}

/// The copies of `tiles` pages from `page` on. An entry that names no page leaves a hole: no copy, and -inf.
template <class T>
__device__ void produce_pages(Shared<T>& shared, const PagedCall& call, int64_t request, int64_t page, int tiles,
                              Ring<T::kStages>& keys) {
  const PagedCache& cache = call.p.cache;
  const int32_t* table = call.p.block_table + request * call.p.table_pages + page;
  const int lane = cuda::lane_id();
  int next = lane < tiles ? table[lane] : -1;
  for (int tile = 0; tile < tiles; tile += cuda::kWarpSize) {
    const int entries = next;
    const int ahead = tile + cuda::kWarpSize + lane;
    next = ahead < tiles ? table[ahead] : -1;
    for (int i = 0; i < min(cuda::kWarpSize, tiles - tile); ++i, ++keys.count) {
      const int entry = __shfl_sync(cuda::kFullMask, entries, i);
      const int stage = keys.stage();
      cuda::wait(&shared.key_empty[stage], keys.parity() ^ 1);
      if (lane != 0) continue;
      const bool hole = entry < 0 || entry >= cache.pages;
      shared.hole[stage] = hole;
      if (hole) {
        cuda::arrive(&shared.key_full[stage]);
        continue;
      }
      cuda::arrive_expecting(&shared.key_full[stage], T::kKeyBytes + T::kScaleBytes);
      cuda::copy_tile(shared.keys[stage], &call.keys, 0, 0, entry, &shared.key_full[stage]);
      cuda::copy_bulk(shared.scales[stage], cache.data + entry * cache.page_stride + T::kKeyBytes, T::kScaleBytes,
                      &shared.key_full[stage]);
    }
  }
}

/// Fills a unit's stage but for its keys. All lanes of a warp.
template <class T>
__device__ void produce_unit(Shared<T>& shared, const PagedCall& call, const Group& group, int page, int tiles,
                             const Ring<T::kUnitStages>& units) {
  const int stage = units.stage(), lane = cuda::lane_id();
  const int keys = lane < group.queries ? visible_keys(call, group.row + lane) : 0;
  const int deciding = Share<T>::kOneQuery ? group.queries : T::kQueries;
  const int clear_end = __reduce_min_sync(cuda::kFullMask, lane < deciding ? keys : INT_MAX);
  cuda::wait(&shared.unit_empty[stage], units.parity() ^ 1);
  Unit<T>& unit = shared.units[stage];
  if (lane < T::kQueries) unit.windows[lane] = {0, keys};
  __syncwarp();
  if (lane != 0) return;
  unit.row = group.row;
  unit.queries = group.queries;
  unit.first_key = page * kTileKeys;
  unit.tiles = tiles;
  unit.clear_begin = 0;
  unit.clear_end = clear_end;
  const int weight_bytes = group.queries * T::kHeads * 4;
  cuda::arrive_expecting(&shared.unit_full[stage], T::kQueryBytes + weight_bytes);
  cuda::copy_tile(shared.queries[stage], &call.queries, 0, static_cast<int>(group.row * T::kHeads),
                  &shared.unit_full[stage]);
  cuda::copy_bulk(shared.weights[stage], call.p.weights + group.row * T::kHeads, weight_bytes,
                  &shared.unit_full[stage]);
}

/// One warp; its first lane copies.
template <class T>
__device__ void produce_paged(Shared<T>& shared, const PagedCall& call) {
  const int64_t groups = call.p.requests * call.groups_per_request;
  Run run = share_of_block<T>(call, groups);
  Ring<T::kUnitStages> units;
  Ring<T::kStages> keys;
  for (int64_t base = run.group; run.pages > 0; base += cuda::kWarpSize) {  // groups without pages cost little
    const int64_t own = base + cuda::lane_id();
    const int own_pages = own < groups ? visible_pages<T>(call, group_of<T>(call, own)) : 0;
    unsigned left = __ballot_sync(cuda::kFullMask, own_pages > 0);
    for (; left != 0 && run.pages > 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int pages = __shfl_sync(cuda::kFullMask, own_pages, lane);
      if (run.skip >= pages) {
        run.skip -= pages;
        continue;
      }
      const Group group = group_of<T>(call, base + lane);
      const int page = static_cast<int>(run.skip);
      const int tiles = static_cast<int>(min(int64_t{pages} - page, run.pages));
      produce_unit(shared, call, group, page, tiles, units);
      produce_pages(shared, call, group.request, page, tiles, keys);
      __syncwarp();
      ++units.count;
      run.skip = 0;
      run.pages -= tiles;
    }
  }
  cuda::wait(&shared.unit_empty[units.stage()], units.parity() ^ 1);
  if (cuda::lane_id() == 0) {
    shared.units[units.stage()].tiles = 0;
    cuda::arrive(&shared.unit_full[units.stage()]);
  }
}

/// -inf in the pages that no query of a group sees, by warp `warp` of kFillWarps of this block.
template <class T>
__device__ void fill_paged(const PagedCall& call, int warp) {
  const auto& p = call.p;
  const int64_t slices = ceil_div(p.columns, kFillColumns);
  const int64_t items = p.requests * p.queries_per_request * slices;
  for (int64_t i = blockIdx.x + int64_t{gridDim.x} * warp; i < items; i += int64_t{gridDim.x} * kFillWarps) {
    const int64_t row = i / slices, begin = i % slices * kFillColumns;
    const int64_t request = row / p.queries_per_request, query = row % p.queries_per_request / T::kQueries;
    const Group group = group_of<T>(call, request * call.groups_per_request + query);
    const int64_t covered = int64_t{visible_pages<T>(call, group)} * kTileKeys;
    fill(p.logits + row * p.logits_stride, max(begin, covered), min(begin + kFillColumns, p.columns));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) paged_kernel(const __grid_constant__ PagedCall call) {
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
      produce_paged(shared, call);
    } else {
      fill_paged<T>(call, warp - 1);
    }
  } else {
    cuda::take_registers<kMathRegisters>();
    run_math(shared, {call.p.logits, call.p.logits_stride, static_cast<int>(call.p.columns)}, warpgroup - 1);
  }
}

}  // namespace indexcache::sm90::indexer
