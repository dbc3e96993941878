// Vectors of the level that this file is compiled for, and the register-tiled product that both attention GEMMs use.
//
// Everything is in an anonymous namespace: no level may see another level's code.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace indexcache::cpu::INDEXCACHE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // 4 rows x 4 vectors: 16 sums cover the latency of a multiply-add
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int kMaxLanes = 16;  // buffers are padded alike on every level

using Floats = float __attribute__((vector_size(kLanes * 4), may_alias));
using Words = uint32_t __attribute__((vector_size(kLanes * 4), may_alias));

inline Floats& at(float* p) { return *reinterpret_cast<Floats*>(p); }

/// exp for x <= 0, -inf and NaN: within 2 ulp, 0 where the result would be subnormal.
inline Floats exp_nonpositive(Floats x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 0x1.8p23f;
  const Floats shifted = x * 0x1.715476p0f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  Floats sum = r * (1.0f / 720) + (1.0f / 120);
  sum = sum * r + (1.0f / 24);
  sum = sum * r + (1.0f / 6);
  sum = sum * r + 0.5f;
  sum = sum * (r * r) + r + 1.0f;
  const Floats power = reinterpret_cast<Floats>((reinterpret_cast<Words>(shifted) + 127u) << 23);
  return x < -87.3f ? Floats{} : sum * power;
}

/// Multiply-add of f32: one step of the contraction takes one float of each side.
struct FloatProduct {
  using Element = float;
  using Vector = Floats;
  static constexpr int kPack = 1;
  static Floats add(Floats sum, Vector b, Element a) { return sum + b * a; }
};

#if defined(__AVX512BF16__)
/// Dot products of bf16 pairs in f32: one step takes two values of each side, packed into a word.
struct PairProduct {
  using Element = uint32_t;
  using Vector = Words;
  static constexpr int kPack = 2;
  static Floats add(Floats sum, Vector b, Element a) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(b),
                                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a)))));
  }
};
#endif

/// a[row, step] at a + row * row_stride + step * step_stride.
template <class Element>
struct Left {
  const Element* data;
  int64_t row_stride, step_stride;
};

/// c[kRows, kVectors * kLanes] += a b over `depth` steps. The sum of one entry runs over the steps in order, so it does
/// not depend on the tile that the entry falls into.
template <class Product, int kRows, int kVectors>
[[gnu::noinline]] void tile_product(Left<typename Product::Element> a, const typename Product::Element* b, int64_t ldb,
                                    int64_t depth, float* c, int64_t ldc) {
  using Vector = typename Product::Vector;
  Floats sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[row][v] = at(c + row * ldc + v * kLanes);
  }
  for (int64_t step = 0; step < depth; ++step) {
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + step * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto left = a.data[row * a.row_stride + step * a.step_stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Product::add(sum[row][v], right[v], left);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) at(c + row * ldc + v * kLanes) = sum[row][v];
  }
}

template <class Product, int kVectors>
void panel_product(Left<typename Product::Element> a, const typename Product::Element* b, int64_t ldb, int64_t rows,
                   int64_t depth, float* c, int64_t ldc) {
  constexpr int kRows = kVectors == 1 ? 8 : 4;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    tile_product<Product, kRows, kVectors>({a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, ldb, depth,
                                           c + row * ldc, ldc);
  }
  for (; row < rows; ++row) {
    tile_product<Product, 1, kVectors>({a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, ldb, depth,
                                       c + row * ldc, ldc);
  }
}

/// c[rows, columns] += a b; columns is a multiple of kLanes, b and c are aligned to a vector.
template <class Product>
void add_product(Left<typename Product::Element> a, const typename Product::Element* b, int64_t ldb, int64_t rows,
                 int64_t columns, int64_t depth, float* c, int64_t ldc) {
  constexpr int64_t kPanel = kTileVectors * kLanes;
  constexpr int64_t kSteps = 96;  // a panel of b (24 KiB with AVX-512) stays in the L1 cache for all rows
  for (int64_t first = 0; first < depth; first += kSteps) {
    const int64_t steps = depth - first < kSteps ? depth - first : kSteps;
    const Left<typename Product::Element> part{a.data + first * a.step_stride, a.row_stride, a.step_stride};
    const auto* right = b + first * ldb;
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel) {
      panel_product<Product, kTileVectors>(part, right + column, ldb, rows, steps, c + column, ldc);
    }
    for (; column < columns; column += kLanes) {
      panel_product<Product, 1>(part, right + column, ldb, rows, steps, c + column, ldc);
    }
  }
}

}  // namespace
}  // namespace indexcache::cpu::INDEXCACHE_ISA
