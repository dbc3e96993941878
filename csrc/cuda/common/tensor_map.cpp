#include "csrc/cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "csrc/cuda/common/device.h"
#include "indexcache/error.h"

namespace indexcache::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check("tensor_map", cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                       &found));
#else
  check("tensor_map", cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw Error("tensor_map", "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
  }
  return reinterpret_cast<Encode>(function);
}

constexpr CUtensorMapSwizzle driver_swizzle(Swizzle swizzle) {
  return swizzle == Swizzle::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : swizzle == Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

CUtensorMap tensor_map(const char* op, const TensorMapShape& shape) {
  static const Encode encode = find_encode();
  constexpr cuuint32_t kDense[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, shape.type, static_cast<cuuint32_t>(shape.rank), const_cast<void*>(shape.data), shape.sizes.data(),
             shape.strides.data(), shape.tile.data(), kDense, CU_TENSOR_MAP_INTERLEAVE_NONE,
             driver_swizzle(shape.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(op, "the driver refused a tensor map, CUresult " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace indexcache::cuda
