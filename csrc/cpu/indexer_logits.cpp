// indexer_logits and indexer_logits_paged: the work is cut into blocks of queries times spans of keys.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/cpu/balance.h"
#include "csrc/cpu/cpu.h"
#include "csrc/cpu/indexer_tile.h"

namespace indexcache::cpu {
namespace {

constexpr int64_t kSpan = 1024;              // keys that share one expansion of the queries
constexpr int64_t kQueryBytes = 256 * 1024;  // expanded queries of a block: they should stay in the L2 cache
constexpr int64_t kMaxBlock = 64;            // queries

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Queries that are scored together against each key tile, so that a tile is expanded once for all of them.
int64_t block_size(int64_t queries, int heads, int dim) {
  const int64_t query_bytes = std::max<int64_t>(1, heads * max_words(dim) * 4);
  return std::clamp<int64_t>(kQueryBytes / query_bytes, 1, std::min(kMaxBlock, queries));
}

/// The rows that a block reads and writes.
struct Rows {
  const uint8_t* q;
  const float* weights;
  float* logits;
  int64_t logits_stride;
  int queries, heads, dim;
};

/// Where the keys of a tile lie; k null: nowhere.
struct KeySource {
  const uint8_t* k = nullptr;
  const uint8_t* scale = nullptr;  // f32, at any alignment
};

/// What one thread works with.
class Scorer {
 public:
  Scorer(int64_t block, int heads, int dim)
      : query_words_(lines(block * heads * max_words(dim))), key_words_(lines(kKeyTile * max_words(dim))) {}

  std::vector<Window>& windows() { return windows_; }

  /// Writes columns [first, last) of the rows; `first` is a multiple of kKeyTile and locate(tile) finds the keys.
  template <class Locate>
  void run(const Rows& rows, int64_t first, int64_t last, Locate locate) {
    const QueryBlock block{words(query_words_), rows.weights, windows_.data(), rows.logits, rows.logits_stride,
                           rows.queries, rows.heads, rows.dim};
    bool packed = false;
    for (int64_t column = first; column < last; column += kKeyTile) {
      const int64_t end = std::min(last, column + kKeyTile);
      const KeySource source = seen(column, end) ? locate(column / kKeyTile) : KeySource{};
      if (source.k == nullptr) {
        for (int t = 0; t < rows.queries; ++t) {
          float* row = rows.logits + t * rows.logits_stride;
          std::fill(row + column, row + end, -std::numeric_limits<float>::infinity());
        }
        continue;
      }
      if (!packed) {
        const int64_t heads = int64_t{rows.queries} * rows.heads;
        INDEXCACHE_ISA_CALL(pack_queries, rows.q, heads, rows.dim, words(query_words_));
        packed = true;
      }
      KeyTile tile{words(key_words_), {}, column, static_cast<int>(end - column)};
      std::memcpy(tile.scale, source.scale, tile.keys * sizeof(float));
      INDEXCACHE_ISA_CALL(pack_keys, source.k, tile.keys, rows.dim, words(key_words_));
      INDEXCACHE_ISA_CALL(score_tile, block, tile);
    }
  }

 private:
  struct alignas(64) Line {
    uint32_t words[16];
  };
  static size_t lines(int64_t words) { return static_cast<size_t>(words / 16 + 1); }
  static uint32_t* words(std::vector<Line>& lines) { return lines.data()->words; }

  bool seen(int64_t first, int64_t last) const {
    return std::any_of(windows_.begin(), windows_.end(), [=](Window w) { return overlaps(w, first, last); });
  }

  std::vector<Line> query_words_, key_words_;
  std::vector<Window> windows_;
};

}  // namespace

void indexer_logits(const IndexerLogitsParams& p, Context& ctx) {
  if (p.queries == 0 || p.keys == 0) return;
  const int64_t block = block_size(p.queries, p.heads, p.dim);
  const int64_t spans = ceil_div(p.keys, kSpan);
  const int64_t units = ceil_div(p.queries, block) * spans;
  const int64_t row_bytes = int64_t{p.heads} * p.dim;
  const auto* scale = reinterpret_cast<const uint8_t*>(p.k_scale);

  ctx.parallel_for(units, 1, [&](int64_t begin, int64_t end) {
    Scorer scorer(block, p.heads, p.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = from_both_ends(i, units);
      const int64_t t = unit / spans * block;
      const int queries = static_cast<int>(std::min(block, p.queries - t));
      scorer.windows().clear();
      for (int64_t row = t; row < t + queries; ++row) {
        scorer.windows().push_back({std::max<int64_t>(0, p.starts[row]), std::min<int64_t>(p.keys, p.ends[row])});
      }
      const Rows rows{p.q + t * row_bytes, p.weights + t * p.heads, p.logits + t * p.logits_stride, p.logits_stride,
                      queries, p.heads, p.dim};
      const int64_t first = unit % spans * kSpan;
      scorer.run(rows, first, std::min(p.keys, first + kSpan), [&](int64_t tile) {
        return KeySource{p.k + tile * kKeyTile * p.dim, scale + tile * kKeyTile * sizeof(float)};
      });
    }
  });
}

void indexer_logits_paged(const IndexerLogitsPagedParams& p, Context& ctx) {
  static_assert(kKeyTile == kIndexPage);
  if (p.requests == 0 || p.queries_per_request == 0 || p.columns == 0) return;
  const int64_t block = block_size(p.queries_per_request, p.heads, p.dim);
  const int64_t blocks = ceil_div(p.queries_per_request, block);
  const int64_t spans = ceil_div(p.columns, kSpan);
  const int64_t units = p.requests * blocks * spans;
  const int64_t row_bytes = int64_t{p.heads} * p.dim;

  ctx.parallel_for(units, 1, [&](int64_t begin, int64_t end) {
    Scorer scorer(block, p.heads, p.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = from_both_ends(i, units);
      const int64_t request = unit / (blocks * spans);
      const int64_t query = unit / spans % blocks * block;
      const int64_t t = request * p.queries_per_request + query;
      const int queries = static_cast<int>(std::min(block, p.queries_per_request - query));
      scorer.windows().clear();
      for (int64_t row = t; row < t + queries; ++row) {
        scorer.windows().push_back({0, std::min<int64_t>(p.columns, p.context_lens[row])});
      }
      const Rows rows{p.q + t * row_bytes, p.weights + t * p.heads, p.logits + t * p.logits_stride, p.logits_stride,
                      queries, p.heads, p.dim};
      const int64_t first = unit % spans * kSpan;
      scorer.run(rows, first, std::min(p.columns, first + kSpan), [&](int64_t tile) {
        const int64_t page = tile < p.table_pages ? p.block_table[request * p.table_pages + tile] : -1;
        if (page < 0 || page >= p.cache.pages) return KeySource{};
        const uint8_t* data = p.cache.data + page * p.cache.page_stride;
        return KeySource{data, data + kIndexPage * p.dim};
      });
    }
  });
}

}  // namespace indexcache::cpu
