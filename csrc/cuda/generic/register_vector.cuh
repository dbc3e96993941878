// An index query or key in the registers of a few neighbouring lanes, on its way to e4m3.
//
//   quarter of the vector   0               1               2               3
//   lane                    0 1 2 … n-1     0 1 2 … n-1     0 1 2 … n-1     0 1 2 … n-1      kChunk values each
//
// RoPE turns the first half of the vector (or none of it): half-split pairs lie in quarters 0 and 1 of the same lane,
// interleaved ones are neighbours. The Hadamard transform is inside a chunk, then between lanes, then between quarters.
#pragma once

#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/row_group.cuh"
#include "csrc/cuda/generic/index_vector.cuh"

namespace indexcache::generic {

template <int kDim, int kLanes>
class RegisterVector {
  static constexpr int kQuarters = 4, kQuarter = kDim / kQuarters;
  static constexpr int kChunk = kQuarter / kLanes;
  static constexpr int kValues = kQuarters * kChunk;  // of a lane
  static constexpr int kChains = 4;                   // of dependent instructions, side by side
  static constexpr int kRot = kDim / 2, kPairs = kRot / 2;
  static_assert(kChunk == 4 || kChunk == 8);

 public:
  static constexpr int kMaxWarps = 8, kMinBlocks = 3;  // of a block, of an SM
  using Group = cuda::RowGroup<kLanes>;

  static constexpr int64_t shared_bytes(int) { return 0; }

  static bool serves(int dim, const Rope& rope) {
    return dim == kDim && (rope.dim == 0 || (rope.dim == kRot && cuda::aligned(rope.cos_sin, 16)));
  }

  explicit __device__ RegisterVector(int) {}

  /// What LayerNorm multiplies with and adds: loaded early, for it may come from DRAM.
  struct Norm {
    float weight[kValues], bias[kValues];

    __device__ Norm(const float* weights, const float* biases) {
#pragma unroll
      for (float& b : bias) b = 0.0f;
      if (weights != nullptr) load_values(weights, weight);
      if (biases != nullptr) load_values(biases, bias);
    }
  };

  /// Cosines and sines of the lane's pairs: half-split of its chunk of quarter 0, interleaved of those of 0 and 1.
  struct Rotation {
    float cosine[kChunk], sine[kChunk];
    bool found, turns, interleaved;

    __device__ Rotation(const Rope& rope, int64_t token) : interleaved(rope.interleaved) {
      const float* table = rotation_at(rope, token);
      turns = table != nullptr;
      found = turns || rope.dim == 0;
      if (!turns) return;
      constexpr int kHalf = kChunk / 2;
      const int first = interleaved ? Group::lane() * kHalf : Group::lane() * kChunk;
      const int second = interleaved ? first + kQuarter / 2 : first + kHalf;
      cuda::load_values<kHalf>(table + first, cosine);
      cuda::load_values<kHalf>(table + second, cosine + kHalf);
      cuda::load_values<kHalf>(table + kPairs + first, sine);
      cuda::load_values<kHalf>(table + kPairs + second, sine + kHalf);
    }
  };

  template <class T>
  __device__ void load(const T* from) {
    load_values(from, x_);
  }

  __device__ void layer_norm(const Norm& norm, float eps) {
    float sums[kChains] = {}, squares[kChains] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i % kChains] += x_[i];
    const float mean = Group::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / kDim;
#pragma unroll
    for (int i = 0; i < kValues; ++i) x_[i] -= mean, squares[i % kChains] += x_[i] * x_[i];
    const float square = Group::sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float inverse = 1.0f / sqrtf(square / kDim + eps);
#pragma unroll
    for (int i = 0; i < kValues; ++i) x_[i] = x_[i] * inverse * norm.weight[i] + norm.bias[i];
  }

  __device__ void rotate(const Rotation& by) {
    if (!by.turns) return;
    if (by.interleaved) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) rotate_pair(x_[2 * i], x_[2 * i + 1], by.cosine[i], by.sine[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) rotate_pair(x_[i], x_[i + kChunk], by.cosine[i], by.sine[i]);
    }
  }

  __device__ void hadamard() {
#pragma unroll
    for (int stride = 1; stride < kChunk; stride *= 2) add_and_subtract_pairs(stride);
#pragma unroll
    for (int neighbour = 1; neighbour < kLanes; neighbour *= 2) {
      const float sign = (cuda::lane_id() & neighbour) == 0 ? 1.0f : -1.0f;
#pragma unroll
      for (float& x : x_) x = fmaf(sign, x, __shfl_xor_sync(cuda::kFullMask, x, neighbour));
    }
#pragma unroll
    for (int stride = kChunk; stride < kValues; stride *= 2) add_and_subtract_pairs(stride);
    const float norm = hadamard_norm(kDim);
#pragma unroll
    for (float& x : x_) x *= norm;
  }

  /// Largest magnitude; not finite if a value is not.
  __device__ float amax() const {
    float amax[kChains] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) amax[i % kChains] = cuda::max_or_nan(amax[i % kChains], fabsf(x_[i]));
    return Group::max(cuda::max_or_nan(cuda::max_or_nan(amax[0], amax[1]), cuda::max_or_nan(amax[2], amax[3])));
  }

  __device__ void encode(float scale, uint8_t* to) const {
    const cuda::E4m3Encoder encoder(scale);
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      encoder.store<kChunk>(x_ + i * kChunk, to + i * kQuarter + Group::lane() * kChunk);
    }
  }

 private:
  template <class T>
  __device__ static void load_values(const T* from, float* x) {
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      cuda::load_values<kChunk>(from + i * kQuarter + Group::lane() * kChunk, x + i * kChunk);
    }
  }

  /// (a, b) -> (a + b, a - b) for the pairs `stride` apart in registers.
  __device__ void add_and_subtract_pairs(int stride) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if ((i & stride) == 0) add_and_subtract(x_[i], x_[i + stride]);
    }
  }

  float x_[kValues];
};

}  // namespace indexcache::generic
