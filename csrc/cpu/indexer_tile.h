// The tile kernel of indexer_logits and indexer_logits_paged: a block of queries against kKeyTile keys.
//
// Both operands are expanded from e4m3 to words of 32 bits, what one multiply-add takes per lane: one float, or two
// bf16 where the machine multiplies those (e4m3 is exact in both). A query head is a row of words; a key tile is laid
// out with keys along the lanes, so that a lane is one key and its sums never depend on its neighbours.
#pragma once

#include <cstdint>

#include "csrc/cpu/isa.h"

namespace indexcache::cpu {

inline constexpr int kKeyTile = 64;  // a page of the index-key cache

/// Words that a vector of `dim` values takes at most.
constexpr int64_t max_words(int dim) { return (int64_t{dim} + 3) / 4 * 4; }

struct Window {
  int64_t begin, end;
};

/// Whether the window holds a column of [first, last). (Internal linkage: isa.h says why.)
static inline bool overlaps(Window w, int64_t first, int64_t last) {
  return w.begin < last && first < w.end && w.begin < w.end;
}

struct QueryBlock {
  const uint32_t* words;   // [queries, heads, words of a head]
  const float* weights;    // [queries, heads]
  const Window* windows;   // [queries], inside the row
  float* logits;           // rows logits_stride apart
  int64_t logits_stride;
  int queries, heads, dim;
};

struct KeyTile {
  const uint32_t* words;
  float scale[kKeyTile];
  int64_t column;  // of the first key
  int keys;        // columns of the row that the tile covers
};

/// Expands `rows` query heads of `dim` bytes.
INDEXCACHE_ISA_FUNCTION(void, pack_queries, const uint8_t* q, int64_t rows, int dim, uint32_t* words)
/// Expands `keys` <= kKeyTile keys of `dim` bytes to the layout of a tile.
INDEXCACHE_ISA_FUNCTION(void, pack_keys, const uint8_t* k, int keys, int dim, uint32_t* words)
/// Writes the columns of the tile in every row of the block: scores inside its window, -inf outside.
INDEXCACHE_ISA_FUNCTION(void, score_tile, const QueryBlock& block, const KeyTile& tile)

}  // namespace indexcache::cpu
