// Quantisation of index queries and keys: a warp per vector, which lies in shared memory as f32.
#include <algorithm>
#include <string>

#include "csrc/common/paged.h"
#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/generic/generic.h"
#include "indexcache/error.h"

namespace indexcache::generic {
namespace {

using cuda::bf16_bits;
using cuda::kWarpSize;
using cuda::lane_id;

constexpr int kMaxWarps = 4;
constexpr int64_t kSharedBytes = 48 * 1024;  // what every device gives without asking
constexpr int64_t kMaxDim = kSharedBytes / sizeof(float);

// Every function below is called by a whole warp, on the warp's vector x.

template <class T>
__device__ void load_vector(const T* from, int dim, float* x) {
  for (int i = lane_id(); i < dim; i += kWarpSize) x[i] = cuda::to_float(from[i]);
  __syncwarp();
}

__device__ void layer_norm(float* x, int dim, const float* weight, const float* bias, float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int i = lane_id(); i < dim; i += kWarpSize) sum += x[i];
  const float mean = cuda::warp_sum(sum) / dim;
  for (int i = lane_id(); i < dim; i += kWarpSize) squares += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / sqrtf(cuda::warp_sum(squares) / dim + eps);
  for (int i = lane_id(); i < dim; i += kWarpSize) {
    x[i] = (x[i] - mean) * inverse * weight[i] + (bias == nullptr ? 0.0f : bias[i]);
  }
  __syncwarp();
}

/// False, and x untouched, for a position outside the table.
__device__ bool rotate(float* x, const Rope& rope, int64_t token) {
  if (rope.dim == 0) return true;
  const int64_t position = rope.positions[token];
  if (position < 0 || position >= rope.max_position) return false;
  const int pairs = rope.dim / 2;
  const float* table = rope.cos_sin + position * rope.dim;
  for (int i = lane_id(); i < pairs; i += kWarpSize) {
    const int first = rope.interleaved ? 2 * i : i, second = rope.interleaved ? 2 * i + 1 : i + pairs;
    const float a = x[first], b = x[second], cosine = table[i], sine = table[i + pairs];
    x[first] = add_rn(mul_rn(a, cosine), -mul_rn(b, sine));
    x[second] = add_rn(mul_rn(b, cosine), mul_rn(a, sine));
  }
  __syncwarp();
  return true;
}

/// Walsh-Hadamard transform times dim^-0.5; dim is a power of two.
__device__ void hadamard(float* x, int dim) {
  for (int stride = 1; stride < dim; stride *= 2) {
    for (int i = lane_id(); i < dim / 2; i += kWarpSize) {
      const int first = i / stride * 2 * stride + i % stride;
      const float a = x[first], b = x[first + stride];
      x[first] = a + b;
      x[first + stride] = a - b;
    }
    __syncwarp();
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(dim));
  for (int i = lane_id(); i < dim; i += kWarpSize) x[i] *= norm;
  __syncwarp();
}

/// Rotates and transforms x and returns its e4m3 scale: NaN for a vector that has none.
__device__ float transform(float* x, int dim, const IndexTransform& options, int64_t token) {
  if (!rotate(x, options.rope, token)) return quiet_nan();
  if (options.hadamard) hadamard(x, dim);
  float amax = 0.0f;
  bool finite = true;
  for (int i = lane_id(); i < dim; i += kWarpSize) {
    amax = fmaxf(amax, fabsf(x[i]));
    finite = finite && is_finite(x[i]);
  }
  amax = cuda::warp_max(amax);
  return __all_sync(cuda::kFullMask, finite) ? e4m3_scale(amax, options.ue8m0) : quiet_nan();
}

__device__ void encode(const float* x, int dim, float scale, uint8_t* to) {
  for (int i = lane_id(); i < dim; i += kWarpSize) to[i] = is_finite(scale) ? float_to_e4m3(x[i] / scale) : kE4m3Nan;
  __syncwarp();  // the next vector overwrites x
}

extern __shared__ float vectors[];

template <class T>
__global__ void quantize_q_kernel(const QuantizeIndexQParams p) {
  float* x = vectors + cuda::warp_id() * p.dim;
  for (int64_t i = cuda::grid_warp(); i < p.tokens * p.heads; i += cuda::grid_warps()) {
    load_vector(static_cast<const T*>(p.q) + i * p.dim, p.dim, x);
    const float scale = transform(x, p.dim, p.transform, i / p.heads);
    encode(x, p.dim, scale, p.q8 + i * p.dim);
    if (lane_id() == 0) p.folded[i] = p.weights[i] * scale * p.scale;
  }
}

template <class T>
__global__ void quantize_k_kernel(const QuantizeIndexKParams p) {
  float* x = vectors + cuda::warp_id() * p.dim;
  for (int64_t i = cuda::grid_warp(); i < p.tokens; i += cuda::grid_warps()) {
    uint8_t* values;
    uint8_t* scale_at;
    if (p.k8 != nullptr) {
      values = p.k8 + i * p.dim;
      scale_at = reinterpret_cast<uint8_t*>(p.k_scale + i);
    } else {
      const int64_t slot = p.slots[i];
      if (!holds(p.cache, slot)) continue;
      values = row_of(p.cache, slot, p.dim);
      scale_at = page_of(p.cache, slot) + kIndexPage * p.dim + slot % kIndexPage * sizeof(float);
    }
    load_vector(static_cast<const T*>(p.k) + i * p.dim, p.dim, x);
    if (p.norm_weight != nullptr) layer_norm(x, p.dim, p.norm_weight, p.norm_bias, p.eps);
    const float scale = transform(x, p.dim, p.transform, i);
    encode(x, p.dim, scale, values);
    if (lane_id() == 0) cuda::store_float(scale_at, scale);
  }
}

template <class Params>
void launch(const char* op, void (*kernel)(Params), int64_t rows, Stream stream, const Params& p) {
  if (p.dim > kMaxDim) {
    throw Error(op, "the head dim", "at most " + std::to_string(kMaxDim) + " on the generic CUDA backend",
                std::to_string(p.dim));
  }
  const int64_t bytes = int64_t{p.dim} * sizeof(float);
  const int64_t warps = std::clamp<int64_t>(kSharedBytes / std::max<int64_t>(bytes, 1), 1, kMaxWarps);
  cuda::launch(op, kernel, cuda::ceil_div(rows, warps), static_cast<int>(warps) * kWarpSize, warps * bytes, stream, p);
}

}  // namespace

void quantize_index_q(const QuantizeIndexQParams& p, Stream stream) {
  const auto kernel = p.dtype == DType::f32 ? quantize_q_kernel<float> : quantize_q_kernel<bf16_bits>;
  launch("quantize_index_q", kernel, p.tokens * p.heads, stream, p);
}

void quantize_index_k(const QuantizeIndexKParams& p, Stream stream) {
  const auto kernel = p.dtype == DType::f32 ? quantize_k_kernel<float> : quantize_k_kernel<bf16_bits>;
  launch(p.k8 == nullptr ? "store_index_k" : "quantize_index_k", kernel, p.tokens, stream, p);
}

}  // namespace indexcache::generic
