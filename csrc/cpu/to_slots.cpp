// Positions inside a request -> slots of the paged cache.
#include <cstdint>

#include "csrc/common/paged.h"
#include "csrc/cpu/cpu.h"

namespace indexcache::cpu {

void to_slots(const ToSlotsParams& p, Context& ctx) {
  constexpr int64_t kEntriesPerTask = 16384;
  const int64_t grain = p.k > 0 ? (kEntriesPerTask + p.k - 1) / p.k : 1;
  ctx.parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.k; i < end * p.k; ++i) p.slots[i] = slot_of(p.table, i / p.k, p.indices[i]);
  });
}

}  // namespace indexcache::cpu
