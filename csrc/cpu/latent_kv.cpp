// Writing and reading rows of the paged latent cache.
#include <algorithm>

#include "csrc/common/numeric.h"
#include "csrc/common/paged.h"
#include "csrc/cpu/cpu.h"
#include "csrc/cpu/latent_row.h"

namespace indexcache::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

}  // namespace

void store_latent_kv(const StoreLatentKvParams& p, Context& ctx) {
  ctx.parallel_for(p.tokens, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = p.slots[token];
      if (!holds(p.cache, slot)) continue;
      float values[kLatentRow];
      load_floats(p.kv, p.dtype, token * p.row_stride, kLatentRow, values);
      encode_latent_row(values, row_of(p.cache, slot, kLatentBytes));
    }
  });
}

void gather_latent_kv(const GatherLatentKvParams& p, Context& ctx) {
  ctx.parallel_for(p.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = p.slots[row];
      uint16_t* out = p.kv + row * kLatentRow;
      if (holds(p.cache, slot)) {
        decode_latent_row(row_of(p.cache, slot, kLatentBytes), out);
      } else {
        std::fill_n(out, kLatentRow, uint16_t{0});
      }
    }
  });
}

}  // namespace indexcache::cpu
