// What a kernel family gets: plain pointers and sizes, checked by the op entry. The same structs serve every backend.
//
// Everything is dense and row-major unless a stride is named. Strides are in elements, offsets 64-bit.
// A window or an index may hold any value: kernels clamp and ignore as `ops.h` says, and never read memory for it.
#pragma once

#include <cstdint>

#include "indexcache/tensor_view.h"

#if defined(__CUDACC__)
#define INDEXCACHE_HOST_DEVICE __host__ __device__
#else
#define INDEXCACHE_HOST_DEVICE
#endif

namespace indexcache {

inline constexpr int64_t kIndexPage = 64;        // tokens of a page of the index-key cache
inline constexpr int64_t kLatentDim = 512;       // value part of a latent row
inline constexpr int64_t kRopeDim = 64;          // rotary part of a latent row
inline constexpr int64_t kLatentBytes = 656;     // 512 e4m3 | 4 f32 scales | 64 bf16
inline constexpr int64_t kLatentScaleGroup = 128;  // latent values that share a scale

/// An int32 or int64 array, as `positions` and `slots` may be.
struct IntArray {
  const void* data = nullptr;
  bool wide = false;
  INDEXCACHE_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

/// Rotary embedding of the first `dim` entries of a vector; `dim` 0 means none.
struct Rope {
  const float* cos_sin = nullptr;  // [max_position, dim]: cos in the first half of a row, sin in the second
  int64_t max_position = 0;
  int dim = 0;
  bool interleaved = false;  // pairs (0,1), (2,3), …; otherwise (i, i + dim/2)
  IntArray positions;        // [tokens]
};

/// How a vector becomes e4m3: rotate, transform, scale.
struct IndexTransform {
  Rope rope;
  bool hadamard = false;  // times D^-0.5
  bool ue8m0 = false;     // scale rounded up to a power of two
};

struct QuantizeIndexQParams {
  const void* q;  // [tokens, heads, dim] of dtype
  DType dtype;    // f32 or bf16
  int64_t tokens;
  int heads, dim;
  const float* weights;  // [tokens, heads]
  IndexTransform transform;
  float scale;
  uint8_t* q8;    // [tokens, heads, dim]
  float* folded;  // [tokens, heads]
};

/// One paged cache: page p starts at data + p * page_stride bytes.
struct PagedCache {
  uint8_t* data = nullptr;
  int64_t pages = 0;
  int64_t page_size = 0;    // tokens
  int64_t page_stride = 0;  // bytes
};

struct QuantizeIndexKParams {
  const void* k;  // [tokens, dim] of dtype
  DType dtype;    // f32 or bf16
  int64_t tokens;
  int dim;
  const float* norm_weight;  // [dim] or null: no LayerNorm
  const float* norm_bias;    // [dim] or null
  float eps;
  IndexTransform transform;
  // Where the result goes: two dense arrays, or (k8 null) the paged cache.
  uint8_t* k8;     // [tokens, dim]
  float* k_scale;  // [tokens]
  PagedCache cache;  // inside a page: 64 * dim value bytes, then 64 f32 scales
  IntArray slots;    // [tokens]; a slot outside the cache is skipped
};

struct GatherIndexKParams {
  PagedCache cache;
  IntArray slots;  // [rows]
  int64_t rows;
  int dim;
  uint8_t* k8;     // [rows, dim]
  float* k_scale;  // [rows]
};

struct StoreLatentKvParams {
  const void* kv;  // [tokens, 576] of dtype
  DType dtype;     // f32 or bf16
  int64_t tokens;
  int64_t row_stride;
  IntArray slots;
  PagedCache cache;
};

struct GatherLatentKvParams {
  PagedCache cache;
  IntArray slots;  // [rows]
  int64_t rows;
  uint16_t* kv;  // bf16 [rows, 576]
};

struct IndexerLogitsParams {
  const uint8_t* q;      // e4m3 [queries, heads, dim]
  const float* weights;  // [queries, heads]
  int64_t queries;
  int heads, dim;
  const uint8_t* k;      // e4m3 [keys, dim]
  const float* k_scale;  // [keys]
  int64_t keys;
  const int32_t* starts;  // [queries]
  const int32_t* ends;    // [queries]
  float* logits;          // [queries, keys], rows logits_stride apart; every entry is written
  int64_t logits_stride;
};

struct IndexerLogitsPagedParams {
  const uint8_t* q;      // e4m3 [requests * queries_per_request, heads, dim]
  const float* weights;  // [requests * queries_per_request, heads]
  int64_t requests, queries_per_request;
  int heads, dim;
  PagedCache cache;
  const int32_t* context_lens;  // [requests * queries_per_request]
  const int32_t* block_table;   // [requests, table_pages]
  int64_t table_pages;
  float* logits;  // [requests * queries_per_request, columns], rows logits_stride apart; every entry is written
  int64_t columns;
  int64_t logits_stride;
};

/// How positions inside a request become slots of a paged cache.
struct SlotTable {
  const int32_t* block_table = nullptr;  // [requests, table_pages]
  int64_t requests = 0, table_pages = 0;
  int64_t page_size = 0;
  const int32_t* request = nullptr;  // [rows]: the request of each row
};

struct TopkParams {
  const void* logits;  // [rows, columns] of dtype, rows row_stride apart
  DType dtype;         // f32 or bf16
  int64_t rows, columns, row_stride;
  const int32_t* starts;  // [rows], null: 0
  const int32_t* ends;    // [rows]
  int64_t k;
  int32_t* out = nullptr;    // [rows, k]: columns, or their slots
  SlotTable slots = {};      // block_table null: columns
  int32_t* reads = nullptr;  // [rows] or null: how many times the kernel read each row
};

struct ToSlotsParams {
  const int32_t* indices;  // [tokens, k]
  int64_t tokens, k;
  SlotTable table;
  int32_t* slots;  // [tokens, k]
};

/// Attention of `tokens` queries over listed rows of `kv` (bf16 or f32), or of the 656-byte cache (kv null).
struct SparseMlaParams {
  const void* q;  // [tokens, heads, d_qk] of dtype, inner stride 1
  DType dtype;    // f32 or bf16; also of kv and out
  int64_t tokens;
  int heads, d_qk, d_v;
  int64_t q_token_stride, q_head_stride;
  const void* kv;  // [keys, d_qk] of dtype, inner stride 1
  int64_t keys;    // rows of kv; pages * page_size of the cache
  int64_t kv_stride;
  PagedCache cache;
  const int32_t* indices;  // [tokens, k]: rows of kv, or slots of the cache
  int64_t k;
  const int32_t* lengths;  // [tokens] or null
  const float* sink;       // [heads] or null, natural log
  float sm_scale;
  void* out;   // [tokens, heads, d_v] of dtype
  float* lse;  // [tokens, heads], natural log
  void* scratch = nullptr;  // what the backend asked for (dispatch.h)
};

}  // namespace indexcache
