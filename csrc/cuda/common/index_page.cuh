// A page of the index-key cache: 64 * dim e4m3, then 64 f32 scales.
#pragma once

#include "csrc/common/paged.h"

namespace indexcache::cuda {

struct IndexEntry {
  uint8_t *values, *scale;  // null for a slot outside the cache
};

__device__ inline IndexEntry index_entry(const PagedCache& cache, int64_t slot, int dim) {
  if (!holds(cache, slot)) return {nullptr, nullptr};
  // The op entry bounds the number of slots by 2^31 - 1.
  const auto row = static_cast<uint32_t>(slot), offset = row % static_cast<uint32_t>(kIndexPage);
  uint8_t* page = cache.data + row / static_cast<uint32_t>(kIndexPage) * cache.page_stride;
  return {page + int64_t{offset} * dim, page + kIndexPage * dim + offset * sizeof(float)};
}

}  // namespace indexcache::cuda
