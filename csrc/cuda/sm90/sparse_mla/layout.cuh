// How tiles lie in shared memory and which wgmma reads them, in CuTe's terms.
//
// A key block is stored once, as rows: nine chunks (d_qk 512: eight) of 64 rows x 128 bytes, each swizzled over 128
// bytes. The scores read it as K-major rows; the values read the same bytes as an MN-major operand whose K are the
// rows.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "csrc/cuda/sm90/sparse_mla/config.h"

namespace indexcache::sm90::attention {

using cute::Int;
using cute::Shape;
using Bf16 = cutlass::bfloat16_t;

/// [64][dims]: queries, keys, and with 64 dims the probabilities.
template <int kDims>
using RowsLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Bf16>{}, Shape<Int<64>, Int<kDims>>{}));

/// [256 dims][64 keys], within the rows of a key block.
using ValuesLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Bf16>{},
                                                  Shape<Int<kHalfDims>, Int<kTileKeys>>{},
                                                  cute::Step<cute::_2, cute::_1>{}));

inline constexpr auto kRowMajor = cute::GMMA::Major::K;
inline constexpr auto kColumnMajor = cute::GMMA::Major::MN;
using ScoreMma = decltype(cute::make_tiled_mma(cute::SM90_64x64x16_F32BF16BF16_SS<kRowMajor, kRowMajor>{}));
/// Probabilities from registers (of the warpgroup that scored) or from shared memory (of the other).
using OwnValueMma = decltype(cute::make_tiled_mma(cute::SM90_64x128x16_F32BF16BF16_RS<kRowMajor, kColumnMajor>{}));
using ValueMma = decltype(cute::make_tiled_mma(cute::SM90_64x128x16_F32BF16BF16_SS<kRowMajor, kColumnMajor>{}));

inline constexpr int kStepDims = 16;  // K of wgmma
inline constexpr int kChunkSteps = kChunkDims / kStepDims;
inline constexpr int kValueSteps = kTileKeys / kStepDims;

/// 16-byte units of the row-swizzled chunks: element offset of dims 8 * unit … of `row`, unit < 8.
__host__ __device__ constexpr int unit_offset(int chunk, int row, int unit) {
  return chunk * kChunkElements + row * kChunkDims + (unit ^ row % 8) * 8;
}

/// The compiler cannot compute ahead with it, and so does not keep a register for each of many derived values.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace indexcache::sm90::attention
