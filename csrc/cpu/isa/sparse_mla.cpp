// Attention of one query over listed rows: tiles of keys, online softmax with the heads in the lanes.
//
//   scores [key, head] += K [key, step] Q^T [step, head]     Q is transposed once, keys are broadcast
//   p = exp(scores - max), one vector of heads at a time     no reduction across lanes
//   out [head, d] += P^T [head, key] V [key, d]              p is broadcast
//
// Where the machine multiplies bf16 pairs, a step is two values: neighbouring ones of a row in the first product, the
// same one of two neighbouring keys in the second.
#include "csrc/cpu/sparse_mla.h"

#include "csrc/common/numeric.h"
#include "csrc/common/paged.h"
#include "csrc/cpu/isa/sparse_mla_simd.h"
#include "csrc/cpu/latent_row.h"

namespace indexcache::cpu::INDEXCACHE_ISA {
namespace {

constexpr int kTile = 64;  // keys
constexpr float kInfinity = __builtin_inff();

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// A row length of an odd number of cache lines: a column of vectors then spreads over all sets of the cache.
constexpr int64_t spread(int64_t words) {
  return round_up(words, kMaxLanes) / kMaxLanes / 2 * 2 * kMaxLanes + kMaxLanes;
}

/// The buffers of a task, cut from its workspace.
template <class Product>
struct Buffers {
  using Element = typename Product::Element;
  int64_t steps;                // of the first product
  int64_t lanes;                // heads, padded
  int64_t columns;              // d_v, padded
  int64_t tile_row, value_row;  // row lengths
  Element* queries;             // [steps, lanes]
  Element* tile;                // [kTile, tile_row]
  Element* values;              // [kTile / kPack, value_row]; the tile itself where kPack is 1
  const char** keys;            // [kTile]: the rows of the tile
  const char** weight_columns;  // [lanes]: the columns of weights
  float* scores;                // [kTile, lanes], then the weights
  Element* weights;             // [kTile / kPack, lanes]; the scores themselves where kPack is 1
  float* out;                   // [heads, value_row]
  float *max, *sum, *decay;     // [lanes]
  int64_t bytes = 0;

  Buffers(const SparseMlaParams& p, int heads, char* base)
      : steps((p.d_qk + Product::kPack - 1) / Product::kPack),
        lanes(round_up(heads, kLanes)),
        columns(round_up(p.d_v, kLanes)),
        tile_row(spread(steps)),
        value_row(Product::kPack == 1 ? tile_row : spread(p.d_v)) {
    const auto take = [&](int64_t words) {
      float* memory = reinterpret_cast<float*>(base + bytes);
      bytes += round_up(words, kMaxLanes) * 4;
      return memory;
    };
    queries = reinterpret_cast<Element*>(take(steps * lanes));
    tile = reinterpret_cast<Element*>(take(kTile * tile_row));
    values = Product::kPack == 1 ? tile : reinterpret_cast<Element*>(take(kTile / Product::kPack * value_row));
    keys = reinterpret_cast<const char**>(take(kTile * 2));
    weight_columns = reinterpret_cast<const char**>(take(lanes * 2));
    scores = take(kTile * lanes);
    weights = reinterpret_cast<Element*>(Product::kPack == 1 ? scores : take(kTile / Product::kPack * lanes));
    out = take(heads * value_row);
    max = take(lanes);
    sum = take(lanes);
    decay = take(lanes);
  }
};

// --- Loading: a row of floats, or of bf16 pairs -------------------------------------------------------------------

void load_row(const void* data, DType dtype, int64_t first, int dim, float* out) {
  load_floats(data, dtype, first, dim, out);
}

[[maybe_unused]] void load_row(const void* data, DType, int64_t first, int dim, uint32_t* out) {
  if (dim % 2 != 0) out[dim / 2] = 0;
  std::memcpy(out, static_cast<const uint16_t*>(data) + first, dim * sizeof(uint16_t));
}

template <class Product>
void load_queries(const SparseMlaParams& p, const SparseMlaTask& task, const Buffers<Product>& b) {
  std::memset(b.queries, 0, b.steps * b.lanes * 4);
  for (int head = 0; head < task.heads; ++head) {
    auto* row = b.tile;  // free until the first keys come
    const int64_t first = task.token * p.q_token_stride + (task.first_head + head) * p.q_head_stride;
    load_row(p.q, p.dtype, first, p.d_qk, row);
    for (int64_t step = 0; step < b.steps; ++step) b.queries[step * b.lanes + head] = row[step];
  }
}

int64_t element_bytes(const SparseMlaParams& p) { return p.dtype == DType::bf16 ? 2 : 4; }

/// Brings the rows of the next tile into the L2 cache, one per call, while the present tile is computed: they lie
/// anywhere in memory, and all at once they would wait for it.
struct Prefetch {
  const SparseMlaParams& p;
  const int32_t* row;
  const int32_t* end;

  void operator()() {
    if (row == end) return;
    const char* data = p.kv != nullptr ? static_cast<const char*>(p.kv) + *row * p.kv_stride * element_bytes(p)
                                       : reinterpret_cast<const char*>(row_of(p.cache, *row, kLatentBytes));
    const int64_t bytes = p.kv != nullptr ? p.d_qk * element_bytes(p) : kLatentBytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
    ++row;
  }
};

/// Points b.keys at the rows of a tile: at f32 copies of them.
void load_keys(const SparseMlaParams& p, const int32_t* rows, int64_t keys, const Buffers<FloatProduct>& b) {
  for (int64_t key = 0; key < keys; ++key) {
    float* row = b.tile + key * b.tile_row;
    if (p.kv == nullptr) {
      uint16_t values[kLatentRow];
      decode_latent_row(row_of(p.cache, rows[key], kLatentBytes), values);
      load_row(values, DType::bf16, 0, kLatentRow, row);
    } else {
      load_row(p.kv, p.dtype, rows[key] * p.kv_stride, p.d_qk, row);
    }
    b.keys[key] = reinterpret_cast<const char*>(row);
  }
}

/// The second product reads the copies.
void pack(const SparseMlaParams&, int64_t, const Buffers<FloatProduct>&) {}

#if defined(__AVX512BF16__)
/// At the rows themselves, or at copies where they come from the cache or the last value needs a partner.
void load_keys(const SparseMlaParams& p, const int32_t* rows, int64_t keys, const Buffers<PairProduct>& b) {
  for (int64_t key = 0; key < keys; ++key) {
    uint32_t* copy = b.tile + key * b.tile_row;
    const void* row = copy;
    if (p.kv == nullptr) {
      decode_latent_row(row_of(p.cache, rows[key], kLatentBytes), reinterpret_cast<uint16_t*>(copy));
    } else if (p.d_qk % 2 != 0) {
      load_row(p.kv, p.dtype, rows[key] * p.kv_stride, p.d_qk, copy);
    } else {
      row = static_cast<const uint16_t*>(p.kv) + rows[key] * p.kv_stride;
    }
    b.keys[key] = static_cast<const char*>(row);
  }
}

/// Values and weights of keys 2i and 2i + 1 into one word; the partner of an odd last key has weight 0.
void pack(const SparseMlaParams& p, int64_t keys, const Buffers<PairProduct>& b) {
  if (keys % 2 != 0) {
    b.keys[keys] = reinterpret_cast<const char*>(std::memset(b.tile + keys * b.tile_row, 0, b.tile_row * 4));
    std::memset(b.scores + keys * b.lanes, 0, b.lanes * 4);
  }
  for (int64_t pair = 0; pair < (keys + 1) / 2; ++pair) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(b.keys[2 * pair]);
    const uint16_t* odd = reinterpret_cast<const uint16_t*>(b.keys[2 * pair + 1]);
    uint32_t* values = b.values + pair * b.value_row;
    for (int64_t i = 0; i < p.d_v; ++i) values[i] = even[i] | uint32_t{odd[i]} << 16;
    const float* even_score = b.scores + 2 * pair * b.lanes;
    const float* odd_score = even_score + b.lanes;
    uint32_t* weights = b.weights + pair * b.lanes;
    for (int64_t i = 0; i < b.lanes; ++i) {
      weights[i] = float_to_bf16(even_score[i]) | uint32_t{float_to_bf16(odd_score[i])} << 16;
    }
  }
}
#endif

// --- Softmax ------------------------------------------------------------------------------------------------------

/// Scores -> exp(score - max), with the running max and sum; `decay` is what the earlier output is worth now.
template <class Product>
void softmax_tile(const Buffers<Product>& b, int64_t keys, float sm_scale) {
  for (int64_t lane = 0; lane < b.lanes; lane += kLanes) {
    const Floats before = at(b.max + lane);
    Floats top = before;
    for (int64_t key = 0; key < keys; ++key) {
      Floats& score = at(b.scores + key * b.lanes + lane);
      score *= sm_scale;
      top = score > top ? score : top;
    }
    const Floats base = top == -kInfinity ? Floats{} : top;  // -inf - -inf would be NaN
    Floats total{};
    for (int64_t key = 0; key < keys; ++key) {
      Floats& score = at(b.scores + key * b.lanes + lane);
      score = exp_nonpositive(score - base);
      total += score;
    }
    const Floats decay = exp_nonpositive(before - base);
    at(b.max + lane) = top;
    at(b.sum + lane) = at(b.sum + lane) * decay + total;
    at(b.decay + lane) = decay;
  }
}

template <class Product>
void decay_output(const Buffers<Product>& b, int heads) {
  for (int head = 0; head < heads; ++head) {
    if (b.decay[head] == 1.0f) continue;
    for (int64_t i = 0; i < b.columns; i += kLanes) at(b.out + head * b.value_row + i) *= b.decay[head];
  }
}

template <class Product>
void finish_head(const SparseMlaParams& p, const SparseMlaTask& task, const Buffers<Product>& b, int head) {
  const int64_t row = task.token * p.heads + task.first_head + head;
  const float sum = b.sum[head];
  const float lse = sum == 0.0f ? -kInfinity : b.max[head] + __builtin_logf(sum);
  float factor = 1.0f / sum;
  if (p.sink != nullptr) factor /= 1.0f + __builtin_expf(p.sink[task.first_head + head] - lse);
  p.lse[row] = lse;
  const float* out = b.out + head * b.value_row;
  for (int64_t i = 0; i < p.d_v; ++i) {
    const float value = sum == 0.0f ? 0.0f : out[i] * factor;
    if (p.dtype == DType::bf16) {
      static_cast<uint16_t*>(p.out)[row * p.d_v + i] = float_to_bf16(value);
    } else {
      static_cast<float*>(p.out)[row * p.d_v + i] = value;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------

template <class Product>
void attend(const SparseMlaParams& p, const SparseMlaTask& task) {
  constexpr int64_t kPack = Product::kPack;
  const Buffers<Product> b(p, task.heads, static_cast<char*>(task.workspace));
  load_queries(p, task, b);
  std::memset(b.tile, 0, kTile * b.tile_row * 4);  // the padding of its rows is multiplied too
  std::memset(b.values, 0, kTile / kPack * b.value_row * 4);
  std::memset(b.out, 0, task.heads * b.value_row * 4);
  for (int64_t lane = 0; lane < b.lanes; ++lane) {
    b.max[lane] = -kInfinity;
    b.sum[lane] = 0.0f;
    b.weight_columns[lane] = reinterpret_cast<const char*>(b.weights + lane);
  }

  for (int64_t first = 0; first < task.count; first += kTile) {
    const int64_t keys = min(task.count - first, kTile);
    const int32_t* rows = task.rows + first;
    Prefetch next{p, rows + keys, rows + min(task.count - first, 2 * kTile)};
    load_keys(p, rows, keys, b);
    std::memset(b.scores, 0, keys * b.lanes * 4);
    add_product<Product>({b.keys, 4}, {b.queries, b.lanes}, keys, b.lanes, b.steps, {b.scores, b.lanes}, next);
    softmax_tile(b, keys, p.sm_scale);
    decay_output(b, task.heads);
    pack(p, keys, b);
    add_product<Product>({b.weight_columns, b.lanes * 4}, {b.values, b.value_row}, task.heads, b.columns,
                         (keys + kPack - 1) / kPack, {b.out, b.value_row}, next);
  }
  for (int head = 0; head < task.heads; ++head) finish_head(p, task, b, head);
}

#if defined(__AVX512BF16__)
bool multiplies_pairs(const SparseMlaParams& p) { return p.dtype == DType::bf16; }
#endif

}  // namespace

int64_t sparse_mla_workspace(const SparseMlaParams& p, int heads) {
#if defined(__AVX512BF16__)
  if (multiplies_pairs(p)) return Buffers<PairProduct>(p, heads, nullptr).bytes;
#endif
  return Buffers<FloatProduct>(p, heads, nullptr).bytes;
}

void sparse_mla_task(const SparseMlaParams& p, const SparseMlaTask& task) {
#if defined(__AVX512BF16__)
  if (multiplies_pairs(p)) return attend<PairProduct>(p, task);
#endif
  attend<FloatProduct>(p, task);
}

}  // namespace indexcache::cpu::INDEXCACHE_ISA
