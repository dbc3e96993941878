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
    const __m512i left = _mm512_set1_epi32(static_cast<int>(a));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(left));
  }
};
#endif

/// The left operand: a pointer to each row, whose steps lie `step_bytes` apart. Rows need not be aligned.
struct Left {
  const char* const* rows;
  int64_t step_bytes;
};

/// The right operand and the result: rows of `stride` elements, aligned to a vector.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

/// c[kRows, kVectors * kLanes] += a b over steps [first, last) of a, from b's first row on. The sum of one entry runs
/// over the steps in order, so it does not depend on the tile that the entry falls into.
template <class Product, int kRows, int kVectors>
[[gnu::noinline]] void tile_product(Left a, Matrix<typename Product::Element> b, int64_t first, int64_t last,
                                    Matrix<float> c) {
  using Vector = typename Product::Vector;
  const char* left[kRows];
  Floats sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    left[row] = a.rows[row] + first * a.step_bytes;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[row][v] = at(c.data + row * c.stride + v * kLanes);
  }
  for (int64_t step = 0; step < last - first; ++step) {
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = *reinterpret_cast<const Vector*>(b.data + step * b.stride + v * kLanes);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      typename Product::Element element;
      __builtin_memcpy(&element, left[row] + step * a.step_bytes, sizeof element);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Product::add(sum[row][v], right[v], element);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) at(c.data + row * c.stride + v * kLanes) = sum[row][v];
  }
}

template <class Product, int kVectors, class Between>
void panel_product(Left a, Matrix<typename Product::Element> b, int64_t first, int64_t last, int64_t rows,
                   Matrix<float> c, Between& between) {
  constexpr int kRows = kVectors == 1 ? 8 : 4;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    between();
    tile_product<Product, kRows, kVectors>({a.rows + row, a.step_bytes}, b, first, last,
                                           {c.data + row * c.stride, c.stride});
  }
  for (; row < rows; ++row) {
    tile_product<Product, 1, kVectors>({a.rows + row, a.step_bytes}, b, first, last,
                                       {c.data + row * c.stride, c.stride});
  }
}

/// c[rows, columns] += a[rows, steps] b[steps, columns]; columns is a multiple of kLanes. `between` is called before
/// every full tile: the place for prefetches that the arithmetic hides.
template <class Product, class Between>
void add_product(Left a, Matrix<typename Product::Element> b, int64_t rows, int64_t columns, int64_t steps,
                 Matrix<float> c, Between& between) {
  constexpr int64_t kPanel = kTileVectors * kLanes;
  constexpr int64_t kSteps = 96;  // a panel of b (24 KiB with AVX-512) stays in the L1 cache for all rows
  for (int64_t first = 0; first < steps; first += kSteps) {
    const int64_t last = steps - first < kSteps ? steps : first + kSteps;
    auto* right = b.data + first * b.stride;
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel) {
      panel_product<Product, kTileVectors>(a, {right + column, b.stride}, first, last, rows,
                                           {c.data + column, c.stride}, between);
    }
    for (; column < columns; column += kLanes) {
      panel_product<Product, 1>(a, {right + column, b.stride}, first, last, rows, {c.data + column, c.stride}, between);
    }
  }
}

}  // namespace
}  // namespace indexcache::cpu::INDEXCACHE_ISA
