// The tile kernel of the indexer, see csrc/cpu/indexer_tile.h: a small matrix product with relu, head weights and key
// scales applied to the sums while they are in registers.
#include <cstdint>
#include <cstring>

#include "csrc/cpu/indexer_tile.h"
#include "csrc/cpu/simd.h"

namespace indexcache::cpu::INDEXCACHE_ISA {
namespace {

// The register tile: kHeads x kVectors sums, chosen so that they, a row of keys and one broadcast fit the registers,
// and that the keys of a panel (D = 128: at most 16 KiB) stay in the L1 cache while the queries pass by.
#if defined(__AVX512BF16__)
constexpr int kHeads = 4, kVectors = 4;
#elif defined(__AVX512F__)
constexpr int kHeads = 8, kVectors = 2;
#else
constexpr int kHeads = 4, kVectors = 2;
#endif
constexpr int kPanel = kVectors * kLanes;  // keys
static_assert(kKeyTile % kPanel == 0);

// Four values make kPlanes words. Their order is free, as long as queries and keys agree: here all first words, then
// all second words, …, so that whole vectors are expanded at once.
#if defined(__AVX512BF16__)
constexpr int kPlanes = 2;
#else
constexpr int kPlanes = 4;
#endif
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of four bytes is taken for the lowest");

int64_t quads(int dim) { return (int64_t{dim} + 3) / 4; }

/// Expands four bytes per lane, in place: word j of a lane goes j * n words further. bf16 pairs are (0, 2) and (1, 3).
template <class F, class U>
void expand_quad(uint32_t* words, int64_t n) {
  const U bytes = load<U>(words);
#if defined(__AVX512BF16__)
  const auto pair = [](U low, U high) {
    const U low_bits = __builtin_bit_cast(U, e4m3_to_float<F>(low & 0xffu)) >> 16;
    return low_bits | __builtin_bit_cast(U, e4m3_to_float<F>(high & 0xffu));
  };
  store(words, pair(bytes, bytes >> 16));
  store(words + n, pair(bytes >> 8, bytes >> 24));
#else
  for (int i = 0; i < kPlanes; ++i) store(words + i * n, e4m3_to_float<F>((bytes >> (8 * i)) & 0xffu));
#endif
}

/// Expands 4n bytes, which lie where the first plane goes.
void expand_in_place(uint32_t* words, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) expand_quad<Floats, Words>(words + i, n);
  for (; i < n; ++i) expand_quad<float, uint32_t>(words + i, n);
}

/// acc + a * b per lane; the two products of a bf16 pair are exact in f32.
Floats multiply_add_words(uint32_t a, Words b, Floats acc) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(broadcast(a)), reinterpret_cast<__m512bh>(b));
#else
  return multiply_add(broadcast(__builtin_bit_cast(float, a)), __builtin_bit_cast(Floats, b), acc);
#endif
}

/// score += weight * relu(q . k) for `Heads` heads in ascending order. NaN passes through the relu.
template <int Heads>
void add_heads(const uint32_t* q, const float* weights, const uint32_t* keys, int64_t words,
               Floats (&score)[kVectors]) {
  Floats dot[Heads][kVectors] = {};
  for (int64_t i = 0; i < words; ++i) {
    Words key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = load<Words>(keys + (i * kVectors + v) * kLanes);
    for (int h = 0; h < Heads; ++h) {
      for (int v = 0; v < kVectors; ++v) dot[h][v] = multiply_add_words(q[h * words + i], key[v], dot[h][v]);
    }
  }
  const Floats zero = {};
  for (int h = 0; h < Heads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      score[v] = multiply_add(broadcast(weights[h]), zero > dot[h][v] ? zero : dot[h][v], score[v]);
    }
  }
}

/// The scores of one query and the kPanel keys of a panel.
void score_panel(const uint32_t* q, const float* weights, int heads, int64_t words, const uint32_t* keys,
                 const float* scale, float* out) {
  Floats score[kVectors] = {};
  int h = 0;
  for (; h + kHeads <= heads; h += kHeads) add_heads<kHeads>(q + h * words, weights + h, keys, words, score);
  for (; h + 2 <= heads; h += 2) add_heads<2>(q + h * words, weights + h, keys, words, score);
  if (h < heads) add_heads<1>(q + h * words, weights + h, keys, words, score);
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, score[v] * load<Floats>(scale + v * kLanes));
}

}  // namespace

void pack_queries(const uint8_t* q, int64_t rows, int dim, uint32_t* words) {
  const int64_t n = quads(dim);
  for (int64_t row = 0; row < rows; ++row, q += dim, words += kPlanes * n) {
    if (dim % 4 != 0) words[n - 1] = 0;
    std::memcpy(words, q, dim);
    expand_in_place(words, n);
  }
}

void pack_keys(const uint8_t* k, int keys, int dim, uint32_t* words) {
  const int64_t n = quads(dim);
  const int rest = dim % 4;
  for (int first = 0; first < keys; first += kPanel, words += kPlanes * n * kPanel) {
    if (rest != 0 || keys - first < kPanel) std::memset(words, 0, n * kPanel * sizeof(uint32_t));
    for (int lane = 0; lane < kPanel && first + lane < keys; ++lane, k += dim) {
      uint32_t* column = words + lane;
      for (int i = 0; i < dim / 4; ++i) std::memcpy(column + i * kPanel, k + 4 * i, 4);
      if (rest != 0) std::memcpy(column + dim / 4 * kPanel, k + dim - rest, rest);
    }
    expand_in_place(words, n * kPanel);
  }
}

void score_tile(const QueryBlock& block, const KeyTile& tile) {
  const int64_t words = kPlanes * quads(block.dim);
  const int64_t query_words = block.heads * words;
  for (int first = 0; first < tile.keys; first += kPanel) {
    const int64_t column = tile.column + first;
    const int64_t last = tile.column + (first + kPanel < tile.keys ? first + kPanel : tile.keys);
    for (int t = 0; t < block.queries; ++t) {
      const Window window = block.windows[t];
      float scores[kPanel];
      if (overlaps(window, column, last)) {
        score_panel(block.words + t * query_words, block.weights + int64_t{t} * block.heads, block.heads, words,
                    tile.words + first * words, tile.scale + first, scores);
      }
      float* out = block.logits + t * block.logits_stride;
      for (int64_t n = column; n < last; ++n) {
        out[n] = window.begin <= n && n < window.end ? scores[n - column] : -__builtin_inff();
      }
    }
  }
}

}  // namespace indexcache::cpu::INDEXCACHE_ISA
