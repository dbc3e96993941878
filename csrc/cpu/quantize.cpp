// Index queries and keys -> e4m3: LayerNorm, RoPE, Hadamard, scale, in f32, one vector at a time.
#include <cmath>
#include <cstring>
#include <vector>

#include "csrc/common/numeric.h"
#include "csrc/common/paged.h"
#include "csrc/cpu/cpu.h"

namespace indexcache::cpu {
namespace {

constexpr int64_t kVectorsPerTask = 64;

void layer_norm(float* x, int dim, const float* weight, const float* bias, float eps) {
  // Sums in f64: the result does not depend on how the compiler splits the loop.
  double sum = 0;
  for (int i = 0; i < dim; ++i) sum += x[i];
  const float mean = static_cast<float>(sum / dim);
  double squares = 0;
  for (int i = 0; i < dim; ++i) squares += static_cast<double>(x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / dim) + eps);
  for (int i = 0; i < dim; ++i) {
    x[i] = (x[i] - mean) * inverse * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
  }
}

/// False where the table has no row for the position.
bool rotate(const Rope& rope, int64_t token, float* x) {
  if (rope.dim == 0) return true;
  const int64_t position = rope.positions[token];
  if (position < 0 || position >= rope.max_position) return false;
  const int half = rope.dim / 2;
  const float* cosine = rope.cos_sin + position * rope.dim;
  const float* sine = cosine + half;
  for (int i = 0; i < half; ++i) {
    float& a = x[rope.interleaved ? 2 * i : i];
    float& b = x[rope.interleaved ? 2 * i + 1 : i + half];
    const float rotated_a = add_rn(mul_rn(a, cosine[i]), -mul_rn(b, sine[i]));
    const float rotated_b = add_rn(mul_rn(b, cosine[i]), mul_rn(a, sine[i]));
    a = rotated_a;
    b = rotated_b;
  }
  return true;
}

/// Walsh-Hadamard transform in natural (Sylvester) order, times dim^-0.5.
void hadamard(float* x, int dim) {
  for (int half = 1; half < dim; half *= 2) {
    for (int block = 0; block < dim; block += 2 * half) {
      for (int i = block; i < block + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int i = 0; i < dim; ++i) x[i] *= norm;
}

/// The common end of queries and keys: x is overwritten, the scale returned.
float transform_and_encode(const IndexTransform& transform, int64_t token, float* x, int dim, uint8_t* out) {
  if (!rotate(transform.rope, token, x)) {
    std::memset(out, kE4m3Nan, dim);
    return quiet_nan();
  }
  if (transform.hadamard) hadamard(x, dim);
  return encode_e4m3(x, dim, transform.ue8m0, out);
}

}  // namespace

void quantize_index_q(const QuantizeIndexQParams& p, Context& ctx) {
  ctx.parallel_for(p.tokens * p.heads, kVectorsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> x(p.dim);
    for (int64_t row = begin; row < end; ++row) {
      load_floats(p.q, p.dtype, row * p.dim, p.dim, x.data());
      const float scale = transform_and_encode(p.transform, row / p.heads, x.data(), p.dim, p.q8 + row * p.dim);
      p.folded[row] = p.weights[row] * scale * p.scale;
    }
  });
}

void quantize_index_k(const QuantizeIndexKParams& p, Context& ctx) {
  const bool paged = p.k8 == nullptr;
  ctx.parallel_for(p.tokens, kVectorsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> x(p.dim);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = paged ? p.slots[token] : token;
      if (paged && !holds(p.cache, slot)) continue;
      load_floats(p.k, p.dtype, token * p.dim, p.dim, x.data());
      if (p.norm_weight != nullptr) layer_norm(x.data(), p.dim, p.norm_weight, p.norm_bias, p.eps);
      if (paged) {
        uint8_t* page = page_of(p.cache, slot);
        const int64_t offset = slot % p.cache.page_size;
        const float scale = transform_and_encode(p.transform, token, x.data(), p.dim, page + offset * p.dim);
        std::memcpy(page + p.cache.page_size * p.dim + offset * sizeof scale, &scale, sizeof scale);
      } else {
        p.k_scale[token] = transform_and_encode(p.transform, token, x.data(), p.dim, p.k8 + token * p.dim);
      }
    }
  });
}

void gather_index_k(const GatherIndexKParams& p, Context& ctx) {
  ctx.parallel_for(p.rows, kVectorsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = p.slots[row];
      uint8_t* values = p.k8 + row * p.dim;
      if (!holds(p.cache, slot)) {
        std::memset(values, 0, p.dim);
        p.k_scale[row] = 0.0f;
        continue;
      }
      const uint8_t* page = page_of(p.cache, slot);
      const int64_t offset = slot % p.cache.page_size;
      std::memcpy(values, page + offset * p.dim, p.dim);
      std::memcpy(p.k_scale + row, page + p.cache.page_size * p.dim + offset * sizeof(float), sizeof(float));
    }
  });
}

}  // namespace indexcache::cpu
