// Paged calls: the queries of a request, four at most at a time, against the pages of its keys. The blocks share the
// pages of all requests evenly, whatever the lengths are: each block finds its run of them in context_lens.
//
// Small calls are bound by what happens before the first page arrives: lengths, block table and page are three reads of
// memory, one after the other, and code that is not in the cache is read too. So this file avoids 64-bit divisions.
#pragma once

#include <climits>

#include "csrc/cuda/common/dependent_launch.cuh"
#include "csrc/cuda/common/l2_policy.cuh"
#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/indexer/math.cuh"

namespace indexcache::sm90::indexer {

struct PagedCall {
  IndexerLogitsPagedParams p;
  CUtensorMap queries;  // of queries_map()
  CUtensorMap keys;     // bytes [pages, kPageRows, dim] in tiles of a page: keys and their scales
  int groups;           // of up to kQueries queries of one request, groups_per_request for each
  int groups_per_request;
  int most_keys;  // of a request: the logits and the block table have room for them
  double share;   // of a block: 1 / blocks
};

/// Queries of one request that share a tile.
struct Group {
  int request, row;  // row: the first query's, of the logits
  int queries;
};

template <class T>
__device__ Group group_of(const PagedCall& call, int index) {
  const int queries = static_cast<int>(call.p.queries_per_request);
  const int request = call.groups_per_request == 1 ? index : static_cast<unsigned>(index) / call.groups_per_request;
  const int query = (index - request * call.groups_per_request) * T::kQueries;
  return {request, request * queries + query, min(T::kQueries, queries - query)};
}

/// Columns that a query may see: those that are asked for and have an entry in the block table.
__device__ inline int visible_keys(const PagedCall& call, int row) {
  return max(0, min(call.most_keys, call.p.context_lens[row]));
}

/// Pages that any query of a group sees.
template <class T>
__device__ int visible_pages(const PagedCall& call, const Group& group) {
  int keys = 0;
#pragma unroll
  for (int i = 0; i < T::kQueries; ++i) {
    if (i < group.queries) keys = max(keys, visible_keys(call, group.row + i));
  }
  return keys / kTileKeys + (keys % kTileKeys != 0);
}

/// A run of pages in the list of all groups' pages.
struct Run {
  int group;      // it starts `skip` pages after the first page of this group, perhaps in a later group
  int64_t skip;
  int64_t pages;
  bool once;      // the L2 cache does not hold all groups' pages
};

/// The share of this block, found by one warp. Each lane counts a strip of groups, so that all lengths are read once.
template <class T>
__device__ Run share_of_block(const PagedCall& call) {
  const int strip = (call.groups + cuda::kWarpSize - 1) / cuda::kWarpSize;
  const int begin = min(call.groups, strip * cuda::lane_id()), end = min(call.groups, begin + strip);
  int64_t own = 0;
#pragma unroll 1
  for (int g = begin; g < end; ++g) own += visible_pages<T>(call, group_of<T>(call, g));
  int64_t through = own;
#pragma unroll
  for (int offset = 1; offset < cuda::kWarpSize; offset *= 2) {
    const int64_t left = __shfl_up_sync(cuda::kFullMask, through, offset);
    if (cuda::lane_id() >= offset) through += left;
  }
  const int64_t all = __shfl_sync(cuda::kFullMask, through, cuda::kWarpSize - 1);
  // Any rounding will do that is the same in the block next door.
  const auto start = [&](unsigned block) {
    return block == gridDim.x ? all : static_cast<int64_t>(static_cast<double>(all) * (block * call.share));
  };
  const int64_t first = start(blockIdx.x), last = start(blockIdx.x + 1);
  const unsigned after = __ballot_sync(cuda::kFullMask, through > first);
  if (first >= last) return {};  // then `after` may be empty
  const int lane = __ffs(static_cast<int>(after)) - 1;
  const int64_t skip = first - __shfl_sync(cuda::kFullMask, through - own, lane);
  return {.group = __shfl_sync(cuda::kFullMask, begin, lane),
          .skip = skip,
          .pages = last - first,
          .once = all * T::kPageBytes > kCachedBytes};
}

/// Brings the block table to the L2 cache while the lengths are read, a line per lane of one warp of each block; of
/// long tables only what lies first.
__device__ inline void prefetch_table(const PagedCall& call) {
  constexpr int64_t kLine = 128;
  const int64_t line = (int64_t{blockIdx.x} * cuda::kWarpSize + cuda::lane_id()) * kLine;
  if (line >= call.p.requests * call.p.table_pages * 4) return;
  cuda::prefetch_l2(reinterpret_cast<const char*>(call.p.block_table) + line);
}

/// The scales of a page follow its keys, swizzled as they are.
template <class T>
struct PagedKeys {
  struct Scale {
    float of_row[2];
    bool missing;
    __device__ bool hole() const { return missing; }
  };
  int offset[2];  // in a stage

  __device__ explicit PagedKeys(int row) : offset{position(row), position(row + 8)} {}
  __device__ static int position(int row) {
    const int byte = T::kKeyBytes + 4 * row;
    return byte ^ (byte >> 7 & (T::kDim / 16 - 1)) << 4;
  }
  __device__ Scale scale(const Shared<T>& shared, int stage, int) const {
    const uint8_t* const keys = shared.keys[stage];
    return {{*reinterpret_cast<const float*>(keys + offset[0]), *reinterpret_cast<const float*>(keys + offset[1])},
            shared.hole[stage] != 0};
  }
};

/// The copies of `tiles` pages, whose entries `table` holds. An entry that names no page leaves a hole: no copy, and
/// -inf. `entry` is the table's for this lane, asked for earlier.
template <class T>
__device__ void produce_pages(Shared<T>& shared, const PagedCall& call, const int32_t* table, int entry, int tiles,
                              uint64_t policy, Ring<T::kStages>& keys) {
  const int lane = cuda::lane_id();
  for (int tile = 0; tile < tiles; tile += cuda::kWarpSize) {
    const int ahead = tile + cuda::kWarpSize + lane;
    const int next = ahead < tiles ? table[ahead] : -1;
    const int count = min(cuda::kWarpSize, tiles - tile);
    for (int i = 0; i < count; ++i, ++keys.count) {
      const int page = __shfl_sync(cuda::kFullMask, entry, i), stage = keys.stage();
      const bool hole = page < 0 || page >= call.p.cache.pages;
      cuda::wait(&shared.key_empty[stage], keys.parity() ^ 1);
      if (cuda::elect()) {
        shared.hole[stage] = hole;
        cuda::arrive_expecting(&shared.key_full[stage], hole ? 0 : T::kPageBytes);
        if (!hole) cuda::copy_tile(shared.keys[stage], &call.keys, 0, 0, page, &shared.key_full[stage], policy);
      }
    }
    entry = next;
  }
}

/// Fills a unit's stage but for its keys. All lanes of a warp.
template <class T>
__device__ void produce_unit(Shared<T>& shared, const PagedCall& call, const Group& group, int page, int tiles,
                             const Ring<T::kUnitStages>& units) {
  const int stage = units.stage(), lane = cuda::lane_id();
  const int keys = lane < group.queries ? visible_keys(call, group.row + lane) : 0;
  const int deciding = Share<typename T::Own>::kOneQuery ? group.queries : T::kQueries;
  const int clear_end = __reduce_min_sync(cuda::kFullMask, lane < deciding ? keys : INT_MAX);
  cuda::wait(&shared.unit_empty[stage], units.parity() ^ 1);
  Unit<T>& unit = shared.units[stage];
  if (lane < T::kQueries) unit.windows[lane] = {0, keys};
  __syncwarp();
  if (cuda::elect()) {
    unit.row = group.row;
    unit.queries = group.queries;
    unit.first_key = page * kTileKeys;
    unit.tiles = tiles;
    unit.clear_begin = 0;
    unit.clear_end = max(0, clear_end / kTileKeys - page);
    copy_queries(shared, stage, &call.queries, call.p.weights, group.row, group.queries);
  }
}

/// One warp.
template <class T>
__device__ void produce_paged(Shared<T>& shared, const PagedCall& call, Run run) {
  Ring<T::kUnitStages> units;
  Ring<T::kStages> keys;
  const uint64_t policy = run.once ? cuda::evict_first() : cuda::evict_normal();
  for (int base = run.group; run.pages > 0; base += cuda::kWarpSize) {  // groups without pages cost little
    const int own = base + cuda::lane_id();
    const int own_pages = own < call.groups ? visible_pages<T>(call, group_of<T>(call, own)) : 0;
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
      const int tiles = static_cast<int>(min(int64_t{pages - page}, run.pages));
      const int32_t* const table = call.p.block_table + group.request * call.p.table_pages + page;
      const int entry = cuda::lane_id() < tiles ? table[cuda::lane_id()] : -1;
      produce_unit(shared, call, group, page, tiles, units);
      produce_pages(shared, call, table, entry, tiles, policy, keys);
      ++units.count;
      run.skip = 0;
      run.pages -= tiles;
    }
  }
  end_units(shared, units);
}

/// -inf in the pages that no query of a group sees, by warp `warp` of kFillWarps of this block.
template <class T>
__device__ void fill_paged(const PagedCall& call, int warp) {
  const auto& p = call.p;
  const int slices = static_cast<int>(ceil_div(p.columns, kFillColumns));
  const unsigned items = static_cast<unsigned>(p.requests * p.queries_per_request) * slices;
  for (unsigned i = blockIdx.x + gridDim.x * warp; i < items; i += gridDim.x * kFillWarps) {
    const unsigned row = i / slices, request = row / static_cast<unsigned>(p.queries_per_request);
    const unsigned query = row - request * static_cast<unsigned>(p.queries_per_request);
    const int64_t begin = int64_t{i - row * slices} * kFillColumns;
    const Group group = group_of<T>(call, request * call.groups_per_request + query / T::kQueries);
    const int64_t covered = int64_t{visible_pages<T>(call, group)} * kTileKeys;
    fill(p.logits + row * p.logits_stride, max(begin, covered), min(begin + kFillColumns, p.columns));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) paged_kernel(const __grid_constant__ PagedCall call) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  // The shuffle tells the compiler that these are the same in all lanes.
  const int warp = __shfl_sync(cuda::kFullMask, cuda::warp_id(), 0), warpgroup = warp / 4;
  if (warp == 1) {
    if (cuda::elect()) init_barriers(shared);
  } else if (warp == 2) {
    if (cuda::elect()) {
      cuda::prefetch_tensor_map(&call.keys);
      cuda::prefetch_tensor_map(&call.queries);
    }
  }
  cuda::start_next_kernel();
  cuda::wait_for_kernel_before();
  Run run{};
  if (warp == 0) {
    run = share_of_block<T>(call);
  } else if (warp == 3) {
    prefetch_table(call);
  }
  __syncthreads();
  if (warpgroup == 0) {
    cuda::give_registers<kProducerRegisters>();
    if (warp == 0) {
      produce_paged(shared, call, run);
    } else {
      fill_paged<T>(call, warp - 1);
    }
  } else {
    cuda::take_registers<kMathRegisters>();
    const Logits logits{call.p.logits, call.p.logits_stride, static_cast<int>(call.p.columns)};
    run_math(shared, logits, PagedKeys<T>(Share<typename T::Own>::first_row()), warpgroup - 1);
  }
}

}  // namespace indexcache::sm90::indexer
