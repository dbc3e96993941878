// What the driver of sparse_mla asks of an instruction set.
#pragma once

#include "csrc/cpu/isa.h"
#include "indexcache/params.h"

namespace indexcache::cpu {

/// A block of heads of one query, and the rows it attends to (all of them valid).
struct SparseMlaTask {
  int64_t token;
  int first_head, heads;
  const int32_t* rows;
  int64_t count;
  void* workspace;  // aligned to 64 bytes
};

INDEXCACHE_ISA_FUNCTION(int64_t, sparse_mla_workspace, const SparseMlaParams& p, int heads)  // bytes
INDEXCACHE_ISA_FUNCTION(void, sparse_mla_task, const SparseMlaParams& p, const SparseMlaTask& task)

}  // namespace indexcache::cpu
