#include "csrc/cuda/sm90/sm90.h"

#include <cuda_runtime_api.h>

#include "csrc/cuda/common/device.h"
#include "csrc/cuda/sm90/topk/kernel.cuh"

namespace indexcache::sm90 {
namespace {

int sm_count() {
  int device = 0, sms = 0;
  cuda::check("topk", cudaGetDevice(&device));
  cuda::check("topk", cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  return sms;
}

template <int kCluster>
void launch(const TopkParams& p, Stream stream) {
  const auto kernel = radix_topk::topk_kernel<kCluster>;
  constexpr int kBytes = sizeof(radix_topk::Shared);
  cuda::check("topk", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  if (kCluster > 8) {
    cuda::check("topk", cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(p.rows * kCluster);
  config.blockDim = radix_topk::kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cuda::check("topk", cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace

void topk(const TopkParams& p, Stream stream) {
  switch (radix_topk::cluster_size(p.rows, p.columns, sm_count())) {
    case 1: return launch<1>(p, stream);
    case 2: return launch<2>(p, stream);
    case 4: return launch<4>(p, stream);
    case 8: return launch<8>(p, stream);
    default: return launch<16>(p, stream);
  }
}

}  // namespace indexcache::sm90
