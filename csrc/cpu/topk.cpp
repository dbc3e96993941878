// topk: a threshold from a sample, one pass over the row that keeps what reaches it, an exact selection among those.
//
// The sample only decides how much work is left: what reaches its threshold is counted, and where that is no help the
// row itself is selected from. So the result is exact for every input.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/common/numeric.h"
#include "csrc/common/paged.h"
#include "csrc/cpu/balance.h"
#include "csrc/cpu/cpu.h"
#include "csrc/cpu/topk_scan.h"

namespace indexcache::cpu {
namespace {

// One logit of 16 is sampled, in runs of 8 that touch one cache line of eight.
constexpr int64_t kSampleRun = 8;
constexpr int64_t kSampleStride = 128;
constexpr int64_t kSampleRatio = kSampleStride / kSampleRun;

constexpr int kRadixBits = 11;

/// The k best of a list: every key above `pivot`, and the first `ties` of those that equal it.
struct Cut {
  int32_t pivot;
  int64_t ties;
};

/// Finds the cut for the k best keys in [low, high] of key(0) … key(n - 1), by narrowing the interval that holds the
/// k-th. With fewer than k of them it lets all through.
template <class Key>
Cut find_cut(Key key, int64_t n, int64_t k, int32_t low, int32_t high) {
  int32_t bins[1 << kRadixBits];
  auto base = static_cast<uint32_t>(low);
  uint32_t width = static_cast<uint32_t>(high) - base;  // keys base … base + width remain
  for (;;) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(width)) - kRadixBits);
    std::fill(std::begin(bins), std::end(bins), 0);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t offset = static_cast<uint32_t>(key(i)) - base;
      if (offset <= width) ++bins[offset >> shift];
    }
    auto bin = static_cast<int64_t>(width >> shift);
    while (bin >= 0 && bins[bin] < k) k -= bins[bin--];
    if (bin < 0) return {low, n};
    const uint32_t offset = static_cast<uint32_t>(bin) << shift;
    base += offset;
    if (shift == 0) return {static_cast<int32_t>(base), k};
    width = std::min((1u << shift) - 1, width - offset);
  }
}

/// Writes the columns that pass the cut, in order, and -1 up to k.
template <class Key, class Column>
void emit(Key key, Column column, int64_t n, Cut cut, int64_t k, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n && count < k; ++i) {
    const int32_t x = key(i);
    const bool tie = x == cut.pivot && cut.ties > 0;
    cut.ties -= tie;
    out[count] = column(i);
    count += (x > cut.pivot && x <= kHighestKey) || tie;
  }
  std::fill(out + count, out + k, -1);
}

/// Selects from rows of one call; holds a thread's working memory.
class Selector {
 public:
  explicit Selector(int64_t k) : k_(k) {}

  /// The same of bf16 logits: a row becomes f32 first.
  int select(const uint16_t* logits, int64_t n, int64_t first, int32_t* out) {
    wide_.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) wide_[i] = bf16_to_float(logits[i]);
    return select(wide_.data(), n, first, out);
  }

  /// The k best of `logits`, whose first entry is column `first`. Returns how many times it read the row.
  int select(const float* logits, int64_t n, int64_t first, int32_t* out) {
    const auto row_key = [=](int64_t i) { return key_of(logits[i]); };
    const auto row_column = [=](int64_t i) { return static_cast<int32_t>(first + i); };
    const int64_t rank = sample_rank(n);
    const int64_t capacity = 3 * rank * kSampleRatio;
    int reads = 0;
    if (k_ < n && capacity < n) {
      reserve(capacity, n);
      const int32_t threshold = sample_threshold(logits, n, rank);
      int64_t count = collect_from(threshold, logits, n, capacity);
      reads = 1;
      if (count < 0) {
        // More than k reach the threshold. If fewer exceed it, it is a plateau, and the k-th best lies on it.
        count = collect_from(threshold + 1, logits, n, capacity);
        reads = 2;
        if (0 <= count && count < k_) {
          emit(row_key, row_column, n, {threshold, k_ - count}, k_, out);
          return reads + 1;
        }
      }
      if (count >= k_) {
        const auto key = [&](int64_t i) { return keys_[i]; };
        const auto column = [&](int64_t i) { return static_cast<int32_t>(first + columns_[i]); };
        const auto [low, high] = std::minmax_element(keys_.data(), keys_.data() + count);
        emit(key, column, count, find_cut(key, count, k_, *low, *high), k_, out);
        return reads;
      }
    }
    emit(row_key, row_column, n, find_cut(row_key, n, k_, kLowestKey, kHighestKey), k_, out);
    return reads + 32 / kRadixBits + 2;  // the rounds of find_cut() at most, and emit()
  }

 private:
  /// The rank in the sample that the k-th best of the row stays above but for four or five standard deviations.
  int64_t sample_rank(int64_t n) const {
    const double expected = static_cast<double>(std::min(k_, n)) / kSampleRatio;
    return static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 8);
  }

  void reserve(int64_t capacity, int64_t n) {
    const auto size = static_cast<size_t>(std::max(capacity, n / kSampleRatio));
    if (keys_.size() < size) keys_.resize(size);
    if (columns_.size() < size) columns_.resize(size);
  }

  int32_t sample_threshold(const float* logits, int64_t n, int64_t rank) {
    int64_t samples = 0;
    for (int64_t run = 0; run + kSampleStride <= n; run += kSampleStride) {
      for (int64_t i = 0; i < kSampleRun; ++i) keys_[samples++] = key_of(logits[run + i]);
    }
    return find_cut([&](int64_t i) { return keys_[i]; }, samples, rank, kLowestKey, kHighestKey).pivot;
  }

  int64_t collect_from(int32_t threshold, const float* logits, int64_t n, int64_t capacity) {
    return INDEXCACHE_ISA_CALL(collect, logits, n, threshold, Candidates{keys_.data(), columns_.data(), capacity});
  }

  int64_t k_;
  std::vector<float> wide_;
  std::vector<int32_t> keys_, columns_;
};

}  // namespace

void topk(const TopkParams& p, Context& ctx) {
  if (p.rows == 0 || p.k == 0) return;
  ctx.parallel_for(p.rows, 1, [&](int64_t begin, int64_t end) {
    Selector selector(p.k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = from_both_ends(i, p.rows);
      const int64_t first = p.starts == nullptr ? 0 : std::max<int64_t>(0, p.starts[row]);
      const int64_t last = std::min<int64_t>(p.columns, p.ends[row]);
      const int64_t offset = row * p.row_stride + (first < last ? first : 0), n = std::max<int64_t>(0, last - first);
      int32_t* out = p.out + row * p.k;
      const int reads = p.dtype == DType::f32
                            ? selector.select(static_cast<const float*>(p.logits) + offset, n, first, out)
                            : selector.select(static_cast<const uint16_t*>(p.logits) + offset, n, first, out);
      if (p.reads != nullptr) p.reads[row] = reads;
      if (p.slots.block_table == nullptr) continue;
      for (int64_t j = 0; j < p.k; ++j) out[j] = slot_of(p.slots, row, out[j]);
    }
  });
}

}  // namespace indexcache::cpu
