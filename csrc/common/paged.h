// Where a slot of a paged cache lies. Static functions for the reason that numeric.h gives.
#pragma once

#include <cstdint>

#include "indexcache/params.h"

namespace indexcache {

static INDEXCACHE_HOST_DEVICE inline bool holds(const PagedCache& cache, int64_t slot) {
  return slot >= 0 && slot < cache.pages * cache.page_size;
}

/// Where a slot that the cache holds lies. The op entries bound the number of slots by 2^31 - 1, and a division of 64
/// bits is a call on a GPU.
static INDEXCACHE_HOST_DEVICE inline int64_t page_number(const PagedCache& cache, int64_t slot) {
  return static_cast<uint32_t>(slot) / static_cast<uint32_t>(cache.page_size);
}
static INDEXCACHE_HOST_DEVICE inline int64_t page_offset(const PagedCache& cache, int64_t slot) {
  return static_cast<uint32_t>(slot) % static_cast<uint32_t>(cache.page_size);
}

/// The page of a slot that the cache holds.
static INDEXCACHE_HOST_DEVICE inline uint8_t* page_of(const PagedCache& cache, int64_t slot) {
  return cache.data + page_number(cache, slot) * cache.page_stride;
}

/// The row of a slot that the cache holds, for a cache whose pages are dense rows of `row_bytes`.
static INDEXCACHE_HOST_DEVICE inline uint8_t* row_of(const PagedCache& cache, int64_t slot, int64_t row_bytes) {
  return page_of(cache, slot) + page_offset(cache, slot) * row_bytes;
}

/// The slot of `position` in the request of row `row`, or -1 where the table names none that an int32 holds.
static INDEXCACHE_HOST_DEVICE inline int32_t slot_of(const SlotTable& table, int64_t row, int64_t position) {
  const int64_t request = table.request[row];
  if (position < 0 || position / table.page_size >= table.table_pages) return -1;
  if (request < 0 || request >= table.requests) return -1;
  const int64_t page = table.block_table[request * table.table_pages + position / table.page_size];
  const int64_t offset = position % table.page_size;
  // A page size is any int64: the bound is checked before the product is formed.
  if (page < 0 || page > (INT32_MAX - offset) / table.page_size) return -1;
  return static_cast<int32_t>(page * table.page_size + offset);
}

}  // namespace indexcache
