// sparse_mla: splits the work into (query, head block) tasks, lists the valid rows of a query, runs the best kernel.
#include "csrc/cpu/sparse_mla.h"

#include <algorithm>
#include <memory>
#include <new>

#include "csrc/cpu/cpu.h"

namespace indexcache::cpu {
namespace {

constexpr int kMaxHeadBlock = 64;  // a block's queries, tile and output fit the L2 cache
constexpr int kMinHeadBlock = 16;  // one AVX-512 vector
constexpr int64_t kEnoughTasks = 32;

/// Every block gathers the rows again, so blocks are small only where there are few queries. A head's result does not
/// depend on its block.
int head_block(const SparseMlaParams& p) {
  int block = kMaxHeadBlock;
  while (block > kMinHeadBlock && p.tokens * ((p.heads + block - 1) / block) < kEnoughTasks) block /= 2;
  return block;
}

/// The valid rows of a query in the order given; returns how many.
int64_t list_rows(const SparseMlaParams& p, int64_t token, int32_t* rows) {
  const int32_t* indices = p.indices + token * p.k;
  const int64_t length = p.lengths == nullptr ? p.k : std::clamp<int64_t>(p.lengths[token], 0, p.k);
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) {
    rows[count] = indices[i];
    count += indices[i] >= 0 && indices[i] < p.keys;
  }
  return count;
}

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

}  // namespace

void sparse_mla(const SparseMlaParams& p, Context& ctx) {
  const int block = head_block(p);
  const int64_t blocks = (p.heads + block - 1) / block;
  const int64_t bytes = INDEXCACHE_ISA_CALL(sparse_mla_workspace, p, block);
  ctx.parallel_for(p.tokens * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, FreeAligned> workspace(::operator new(bytes, std::align_val_t{64}));
    const auto rows = std::make_unique<int32_t[]>(p.k);
    int64_t listed = -1, count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / blocks;
      if (token != listed) count = list_rows(p, listed = token, rows.get());
      const int first = static_cast<int>(i % blocks) * block;
      const SparseMlaTask task{token, first, std::min(block, p.heads - first), rows.get(), count, workspace.get()};
      INDEXCACHE_ISA_CALL(sparse_mla_task, p, task);
    }
  });
}

}  // namespace indexcache::cpu
