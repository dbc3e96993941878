// The unions of neighbouring tokens' lists, as the attention reads them from scratch memory.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/config.h"

namespace indexcache::sm90::attention {

/// What a block does at a time: a group by its union, or one token by its own list.
struct alignas(8) Item {
  int32_t token;  // the (first) one
  int32_t keys;   // of the union, -1: of a single token
};

struct Unions {
  int group;   // tokens
  int blocks;  // key blocks that a union may have
  uint32_t* counts;   // of groups and of singles
  Item* groups;       // [groups] that have a union; in no order
  Item* singles;      // [tokens] of the others
  uint32_t* members;  // [groups][blocks][group][kTileKeys / 32], a bit per key: the token lists it
  int32_t* keys;      // [groups][blocks * kTileKeys], ascending, each once

  INDEXCACHE_HOST_DEVICE int member_words() const { return group * (kTileKeys / 32); }  // of a block
  INDEXCACHE_HOST_DEVICE int64_t first_block(int64_t token) const { return token / group * blocks; }
};

/// Tokens of a call, or of a chunk of it, and the memory of their unions.
struct UnionSize {
  int64_t tokens = 0, groups = 0, blocks = 0, items_at = 0, members_at = 0, keys_at = 0, bytes = 0;
};
constexpr UnionSize union_size(int64_t tokens, int64_t k, int group) {
  constexpr int64_t kAlignment = 256;
  const auto aligned = [](int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
  UnionSize size{.tokens = tokens, .groups = (tokens + group - 1) / group};
  size.blocks = std::max<int64_t>(1, (most_union_keys(group * k) + kTileKeys - 1) / kTileKeys);
  size.items_at = kAlignment;
  size.members_at = size.items_at + aligned((size.groups + tokens) * static_cast<int64_t>(sizeof(Item)));
  size.keys_at = size.members_at + aligned(size.groups * size.blocks * group * (kTileKeys / 8));
  size.bytes = size.keys_at + size.groups * size.blocks * kTileKeys * 4;
  return size;
}

/// Of the largest chunk: whole groups.
constexpr UnionSize union_chunk(int64_t tokens, int64_t k, int group) {
  const UnionSize one = union_size(group, k, group);
  return union_size(std::min(tokens, std::max<int64_t>(1, kMaxUnionBytes / one.bytes) * group), k, group);
}

inline Unions unions_at(void* scratch, const UnionSize& size, int group) {
  auto* const at = static_cast<uint8_t*>(scratch);
  return {.group = group,
          .blocks = static_cast<int>(size.blocks),
          .counts = reinterpret_cast<uint32_t*>(at),
          .groups = reinterpret_cast<Item*>(at + size.items_at),
          .singles = reinterpret_cast<Item*>(at + size.items_at) + size.groups,
          .members = reinterpret_cast<uint32_t*>(at + size.members_at),
          .keys = reinterpret_cast<int32_t*>(at + size.keys_at)};
}

/// Builds the unions of `p`'s tokens.
void build_unions(const char* op, const SparseMlaParams& p, const Unions& to, struct CUstream_st* stream);

}  // namespace indexcache::sm90::attention
