// The steps from an index query or key to e4m3 that do not depend on where its values lie.
#pragma once

#include "csrc/common/numeric.h"
#include "csrc/cuda/common/warp.cuh"

namespace indexcache::generic {

/// Cosines, then sines of a token's position; null without RoPE, or for a position outside the table.
__device__ inline const float* rotation_at(const Rope& rope, int64_t token) {
  if (rope.dim == 0) return nullptr;
  const int64_t position = rope.positions[token];
  return position >= 0 && position < rope.max_position ? rope.cos_sin + position * rope.dim : nullptr;
}

__device__ inline void rotate_pair(float& first, float& second, float cosine, float sine) {
  const float a = first, b = second;
  first = add_rn(mul_rn(a, cosine), -mul_rn(b, sine));
  second = add_rn(mul_rn(b, cosine), mul_rn(a, sine));
}

__device__ inline void add_and_subtract(float& first, float& second) {
  const float a = first, b = second;
  first = a + b;
  second = a - b;
}

__device__ inline float hadamard_norm(int dim) { return 1.0f / sqrtf(static_cast<float>(dim)); }

/// Rotates and transforms x and returns its e4m3 scale: NaN for a value that is not finite, or no rotation found.
template <class Vector>
__device__ float transform(Vector& x, const typename Vector::Rotation& rotation, const IndexTransform& options) {
  x.rotate(rotation);
  if (options.hadamard) x.hadamard();
  const float amax = x.amax();
  return rotation.found && is_finite(amax) ? e4m3_scale(amax, options.ue8m0) : quiet_nan();
}

}  // namespace indexcache::generic
