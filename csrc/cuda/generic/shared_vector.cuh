// An index query or key in shared memory as f32, a warp for each: any dim, alignment and rotary width.
#pragma once

#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/row_group.cuh"
#include "csrc/cuda/generic/index_vector.cuh"

namespace indexcache::generic {

extern __shared__ float shared_vectors[];  // a vector per warp

class SharedVector {
 public:
  static constexpr int kMaxWarps = 4, kMinBlocks = 1;  // of a block, of an SM
  using Group = cuda::RowGroup<cuda::kWarpSize>;

  static constexpr int64_t shared_bytes(int dim) { return int64_t{dim} * int64_t{sizeof(float)}; }  // per warp

  explicit __device__ SharedVector(int dim) : x_(shared_vectors + cuda::warp_id() * dim), dim_(dim) {}

  struct Norm {
    const float *weight, *bias;
    __device__ Norm(const float* weight, const float* bias) : weight(weight), bias(bias) {}
  };

  struct Rotation {
    const Rope& rope;
    const float* table;
    bool found;
    __device__ Rotation(const Rope& rope, int64_t token)
        : rope(rope), table(rotation_at(rope, token)), found(rope.dim == 0 || table != nullptr) {}
  };

  template <class T>
  __device__ void load(const T* from) {
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) x_[i] = cuda::to_float(from[i]);
    __syncwarp();
  }

  __device__ void layer_norm(const Norm& norm, float eps) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) sum += x_[i];
    const float mean = cuda::warp_sum(sum) / dim_;
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) squares += (x_[i] - mean) * (x_[i] - mean);
    const float inverse = 1.0f / sqrtf(cuda::warp_sum(squares) / dim_ + eps);
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) {
      x_[i] = (x_[i] - mean) * inverse * norm.weight[i] + (norm.bias == nullptr ? 0.0f : norm.bias[i]);
    }
    __syncwarp();
  }

  __device__ void rotate(const Rotation& by) {
    if (by.table == nullptr) return;
    const int pairs = by.rope.dim / 2;
    for (int i = cuda::lane_id(); i < pairs; i += cuda::kWarpSize) {
      const int first = by.rope.interleaved ? 2 * i : i, second = by.rope.interleaved ? 2 * i + 1 : i + pairs;
      rotate_pair(x_[first], x_[second], by.table[i], by.table[i + pairs]);
    }
    __syncwarp();
  }

  /// dim is a power of two.
  __device__ void hadamard() {
    for (int stride = 1; stride < dim_; stride *= 2) {
      for (int i = cuda::lane_id(); i < dim_ / 2; i += cuda::kWarpSize) {
        const int first = i / stride * 2 * stride + i % stride;
        add_and_subtract(x_[first], x_[first + stride]);
      }
      __syncwarp();
    }
    const float norm = hadamard_norm(dim_);
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) x_[i] *= norm;
    __syncwarp();
  }

  /// Largest magnitude; not finite if a value is not.
  __device__ float amax() const {
    float amax = 0.0f;
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) amax = cuda::max_or_nan(amax, fabsf(x_[i]));
    return Group::max(amax);
  }

  __device__ void encode(float scale, uint8_t* to) const {
    for (int i = cuda::lane_id(); i < dim_; i += cuda::kWarpSize) {
      to[i] = is_finite(scale) ? float_to_e4m3(x_[i] / scale) : kE4m3Nan;
    }
    __syncwarp();  // the next vector overwrites x_
  }

 private:
  float* x_;
  int dim_;
};

}  // namespace indexcache::generic
