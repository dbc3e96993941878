// Positions inside a request -> slots of the paged cache.
#include <cstdint>
#include <limits>

#include "csrc/cpu/cpu.h"

namespace indexcache::cpu {
namespace {

int32_t slot_of(const int32_t* pages, int64_t table_pages, int64_t page_size, int64_t position) {
  if (position < 0 || position / page_size >= table_pages) return -1;
  const int64_t page = pages[position / page_size];
  if (page < 0) return -1;
  // page < 2^31, but a page size is any int64: the bound is checked before the product is formed.
  constexpr int64_t kLast = std::numeric_limits<int32_t>::max();
  const int64_t offset = position % page_size;
  if (page != 0 && page_size > (kLast - offset) / page) return -1;
  return static_cast<int32_t>(page * page_size + offset);
}

}  // namespace

void to_slots(const ToSlotsParams& p, Context& ctx) {
  constexpr int64_t kEntriesPerTask = 16384;
  const int64_t grain = p.k > 0 ? (kEntriesPerTask + p.k - 1) / p.k : 1;
  ctx.parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t request = p.request[token];
      const bool known = request >= 0 && request < p.requests;
      const int32_t* pages = p.block_table + (known ? request * p.table_pages : 0);
      const int32_t* indices = p.indices + token * p.k;
      int32_t* slots = p.slots + token * p.k;
      for (int64_t i = 0; i < p.k; ++i) {
        slots[i] = known ? slot_of(pages, p.table_pages, p.page_size, indices[i]) : -1;
      }
    }
  });
}

}  // namespace indexcache::cpu
