// Quantisation of index queries and keys: a vector in the registers of a few lanes, or of an odd size in shared memory.
#include <algorithm>
#include <string>

#include "csrc/cuda/common/index_page.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/generic/generic.h"
#include "csrc/cuda/generic/register_vector.cuh"
#include "csrc/cuda/generic/shared_vector.cuh"
#include "indexcache/error.h"

namespace indexcache::generic {
namespace {

using cuda::bf16_bits;
using cuda::kWarpSize;

constexpr int64_t kSharedBytes = 48 * 1024;  // what every device gives without asking
constexpr int64_t kMaxDim = kSharedBytes / sizeof(float);
constexpr int kKeyWarps = 4;  // of a block, so that 8,192 keys reach every SM

// A block's first round of heads waits for a position and then for its rotation, the next find both in the cache: where
// tokens are enough to fill the GPU, each block takes several rounds.
constexpr int64_t kManyTokens = 2048;
constexpr int kRounds = 4;

// A group of lanes without a vector of its own works on the last one and keeps the result to itself: no branch lies
// between the loads, so that they are in flight together.

/// A block per token, a group of lanes per head.
template <class T, class Vector>
__global__ void __launch_bounds__(Vector::kMaxWarps* kWarpSize, Vector::kMinBlocks)
    quantize_q_kernel(const QuantizeIndexQParams p) {
  const int groups = static_cast<int>(blockDim.x) / Vector::Group::kLanes;
  const int group = static_cast<int>(threadIdx.x) / Vector::Group::kLanes;
  const int64_t token = blockIdx.x, first_row = token * p.heads;
  Vector x(p.dim);
  for (int first = 0; first < p.heads; first += groups) {
    const int head = first + group;
    const int64_t from = first_row + min(head, p.heads - 1);
    x.load(static_cast<const T*>(p.q) + from * p.dim);
    const float weight = p.weights[from];
    __syncwarp();  // what is above is on its way before anything waits for a position
    const typename Vector::Rotation rotation(p.transform.rope, token);
    const float scale = transform(x, rotation, p.transform);
    if (head < p.heads) {
      x.encode(scale, p.q8 + (first_row + head) * p.dim);
      if (Vector::Group::lane() == 0) p.folded[first_row + head] = weight * scale * p.scale;
    }
  }
}

/// Where key i goes: into the dense arrays or the cache, or nowhere.
__device__ cuda::IndexEntry destination(const QuantizeIndexKParams& p, int64_t i) {
  if (i >= p.tokens) return {nullptr, nullptr};
  if (p.k8 == nullptr) return cuda::index_entry(p.cache, p.slots[i], p.dim);
  return {p.k8 + i * p.dim, reinterpret_cast<uint8_t*>(p.k_scale + i)};
}

/// A group of lanes per key.
template <class T, class Vector>
__global__ void __launch_bounds__(Vector::kMaxWarps* kWarpSize) quantize_k_kernel(const QuantizeIndexKParams p) {
  const int64_t step = cuda::grid_warps() * Vector::Group::kRows;
  Vector x(p.dim);
  for (int64_t first = cuda::grid_warp() * Vector::Group::kRows; first < p.tokens; first += step) {
    const int64_t row = first + Vector::Group::row(), from = min(row, p.tokens - 1);
    x.load(static_cast<const T*>(p.k) + from * p.dim);
    const typename Vector::Norm norm(p.norm_weight, p.norm_bias);
    __syncwarp();
    const typename Vector::Rotation rotation(p.transform.rope, from);
    const cuda::IndexEntry to = destination(p, row);
    if (p.norm_weight != nullptr) x.layer_norm(norm, p.eps);
    const float scale = transform(x, rotation, p.transform);
    if (to.values != nullptr) {
      x.encode(scale, to.values);
      if (Vector::Group::lane() == 0) cuda::store_float(to.scale, scale);
    }
  }
}

template <class Vector>
int most_warps(const char* op, int dim) {
  if (dim > kMaxDim) {
    throw Error(op, "the head dim", "at most " + std::to_string(kMaxDim) + " on the generic CUDA backend",
                std::to_string(dim));
  }
  const int64_t bytes = Vector::shared_bytes(dim);
  return bytes == 0 ? Vector::kMaxWarps : std::clamp(static_cast<int>(kSharedBytes / bytes), 1, Vector::kMaxWarps);
}

template <class T, class Vector>
void launch_q(const QuantizeIndexQParams& p, Stream stream) {
  constexpr auto kOp = "quantize_index_q";
  if (p.tokens > cuda::kMaxGrid) throw Error(kOp, "tokens", "at most 2^31 - 1", std::to_string(p.tokens));
  const int64_t rounds = p.tokens < kManyTokens ? 1 : kRounds;
  const int wanted = static_cast<int>(cuda::ceil_div(p.heads, rounds * Vector::Group::kRows));
  const int warps = std::min(most_warps<Vector>(kOp, p.dim), wanted);
  cuda::launch(kOp, quantize_q_kernel<T, Vector>, p.tokens, warps * kWarpSize, warps * Vector::shared_bytes(p.dim),
               stream, p);
}

template <class T, class Vector>
void launch_k(const QuantizeIndexKParams& p, Stream stream) {
  const char* op = p.k8 == nullptr ? "store_index_k" : "quantize_index_k";
  const int warps = std::min(most_warps<Vector>(op, p.dim), kKeyWarps);
  const int64_t blocks = cuda::ceil_div(p.tokens, warps * Vector::Group::kRows);
  cuda::launch(op, quantize_k_kernel<T, Vector>, blocks, warps * kWarpSize, warps * Vector::shared_bytes(p.dim), stream,
               p);
}

// Few lanes per query of 128 dims, for more loads in flight; twice as many per key, which has a norm to keep.

template <class T>
void quantize_q(const QuantizeIndexQParams& p, Stream stream) {
  using Vector128 = RegisterVector<128, 4>;
  using Vector64 = RegisterVector<64, 4>;
  const bool aligned = cuda::aligned(p.q, 16) && cuda::aligned(p.q8, 8);
  if (aligned && Vector128::serves(p.dim, p.transform.rope)) return launch_q<T, Vector128>(p, stream);
  if (aligned && Vector64::serves(p.dim, p.transform.rope)) return launch_q<T, Vector64>(p, stream);
  launch_q<T, SharedVector>(p, stream);
}

template <class T>
void quantize_k(const QuantizeIndexKParams& p, Stream stream) {
  using Vector128 = RegisterVector<128, 8>;
  using Vector64 = RegisterVector<64, 4>;
  const bool to = p.k8 != nullptr ? cuda::aligned(p.k8, 8)
                                  : cuda::aligned(p.cache.data, 8) && p.cache.page_stride % 8 == 0;
  const bool norm = cuda::aligned(p.norm_weight, 16) && cuda::aligned(p.norm_bias, 16);
  const bool aligned = to && norm && cuda::aligned(p.k, 16);
  if (aligned && Vector128::serves(p.dim, p.transform.rope)) return launch_k<T, Vector128>(p, stream);
  if (aligned && Vector64::serves(p.dim, p.transform.rope)) return launch_k<T, Vector64>(p, stream);
  launch_k<T, SharedVector>(p, stream);
}

}  // namespace

void quantize_index_q(const QuantizeIndexQParams& p, Stream stream) {
  return p.dtype == DType::f32 ? quantize_q<float>(p, stream) : quantize_q<bf16_bits>(p, stream);
}

void quantize_index_k(const QuantizeIndexKParams& p, Stream stream) {
  return p.dtype == DType::f32 ? quantize_k<float>(p, stream) : quantize_k<bf16_bits>(p, stream);
}

}  // namespace indexcache::generic
