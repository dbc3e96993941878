// Tensor maps: how the copy engine (TMA) finds a tile of a tensor in global memory, and how it lays the tile out.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace indexcache::cuda {

enum class Swizzle { none, bytes64, bytes128 };

/// A tensor of up to four dimensions, the contiguous one first. Address and strides are multiples of 16 bytes.
struct TensorMapShape {
  CUtensorMapDataType type;
  const void* data;
  int rank;
  std::array<uint64_t, 4> sizes;
  std::array<uint64_t, 3> strides;  // bytes, of the second dimension and those after it
  std::array<uint32_t, 4> tile;     // up to 256 each
  Swizzle swizzle;
};

/// Throws Error where the driver refuses the shape. The driver's function is found at run time: nothing links libcuda.
CUtensorMap tensor_map(const char* op, const TensorMapShape& shape);

}  // namespace indexcache::cuda
