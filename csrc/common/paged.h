// Where a slot of a paged cache lies. Static functions for the reason that numeric.h gives.
#pragma once

#include <cstdint>

#include "indexcache/params.h"

namespace indexcache {

static INDEXCACHE_HOST_DEVICE inline bool holds(const PagedCache& cache, int64_t slot) {
  return slot >= 0 && slot < cache.pages * cache.page_size;
}

/// The page of a slot that the cache holds.
static INDEXCACHE_HOST_DEVICE inline uint8_t* page_of(const PagedCache& cache, int64_t slot) {
  return cache.data + slot / cache.page_size * cache.page_stride;
}

/// The row of a slot that the cache holds, for a cache whose pages are dense rows of `row_bytes`.
static INDEXCACHE_HOST_DEVICE inline uint8_t* row_of(const PagedCache& cache, int64_t slot, int64_t row_bytes) {
  return page_of(cache, slot) + slot % cache.page_size * row_bytes;
}

}  // namespace indexcache
