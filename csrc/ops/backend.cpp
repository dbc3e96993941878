#include "indexcache/backend.h"

#include <cstdlib>
#include <cstring>

#include "csrc/cpu/cpu.h"
#include "csrc/ops/build_info.h"
#include "indexcache/error.h"
#include "indexcache/params.h"

#if INDEXCACHE_WITH_CUDA
#include "csrc/cuda/common/device.h"
#endif

namespace indexcache {
namespace {

constexpr const char* kFloats = "any dims; float32, bfloat16";
constexpr const char* kE4m3 = "any heads and head dim; float8_e4m3fn";
constexpr const char* kIndexCache = "page 64, any head dim";
constexpr const char* kLatentCache = "656-byte rows, any page size";
constexpr const char* kAnyK = "any k, any row stride; float32, bfloat16";

/// A block keeps one f32 vector in 48 KiB of shared memory.
bool fits_shared_memory(const CallShape& shape) { return shape.dim <= 12288; }

bool fits_sm90_indexer(const CallShape& shape) {
  const int64_t h = shape.heads;
  return (h == 8 || h == 16 || h == 32 || h == 64) && (shape.dim == 64 || shape.dim == 128);
}

bool fits_sm90_attention(const CallShape& shape) {
  const bool dims = (shape.dim == kLatentDim + kRopeDim || shape.dim == kLatentDim) && shape.d_v == kLatentDim;
  return shape.dtype == DType::bf16 && dims;
}

bool fits_sm90_topk(const CallShape& shape) { return shape.k <= 2048; }

// One row per op and backend, the preferred backend of an op first.
#define INDEXCACHE_ROWS(op, limits) {op, Backend::generic, limits, nullptr}, {op, Backend::cpu, limits, nullptr}
#define INDEXCACHE_QUANTISE(op)                                                            \
  {op, Backend::generic, "head dim up to 12,288; float32, bfloat16", fits_shared_memory}, \
      {op, Backend::cpu, kFloats, nullptr}
#define INDEXCACHE_TOPK(op) \
  {op, Backend::sm90, "k up to 2,048, any row stride; float32, bfloat16", fits_sm90_topk}, INDEXCACHE_ROWS(op, kAnyK)
#define INDEXCACHE_INDEXER(op)                                                                        \
  {op, Backend::sm90, "8, 16, 32 or 64 heads; head dim 64 or 128; float8_e4m3fn", fits_sm90_indexer}, \
      INDEXCACHE_ROWS(op, kE4m3)
constexpr Capability kCapabilities[] = {
    INDEXCACHE_QUANTISE("quantize_index_q"),
    INDEXCACHE_QUANTISE("quantize_index_k"),
    INDEXCACHE_QUANTISE("store_index_k"),
    INDEXCACHE_ROWS("gather_index_k", kIndexCache),
    INDEXCACHE_ROWS("store_latent_kv", kLatentCache),
    INDEXCACHE_ROWS("gather_latent_kv", kLatentCache),
    INDEXCACHE_INDEXER("indexer_logits"),
    INDEXCACHE_INDEXER("indexer_logits_paged"),
    INDEXCACHE_TOPK("topk"),
    INDEXCACHE_TOPK("topk_to_slots"),
    INDEXCACHE_TOPK("topk_reads"),
    INDEXCACHE_INDEXER("indexer_topk"),
    INDEXCACHE_INDEXER("indexer_topk_paged"),
    INDEXCACHE_ROWS("to_slots", "any page size"),
    {"sparse_mla", Backend::sm90, "any heads; d_qk 576 or 512, d_v 512; bfloat16", fits_sm90_attention},
    INDEXCACHE_ROWS("sparse_mla", kFloats),
    {"sparse_mla_paged", Backend::sm90, "any heads; q bfloat16; 656-byte rows, any page size", fits_sm90_attention},
    INDEXCACHE_ROWS("sparse_mla_paged", "any heads; q float32, bfloat16; 656-byte rows, any page size"),
};
#undef INDEXCACHE_ROWS
#undef INDEXCACHE_TOPK
#undef INDEXCACHE_INDEXER
#undef INDEXCACHE_QUANTISE

/// Why `backend` cannot serve any call on `device`, or null.
const char* device_refusal(Backend backend, Device device) {
  if (backend == Backend::cpu) return device.type == DeviceType::cpu ? nullptr : "it serves CPU tensors";
  if (device.type != DeviceType::cuda) return "it serves CUDA tensors";
#if INDEXCACHE_WITH_CUDA
  const int compute = cuda::compute_capability(device.index);
  if (backend == Backend::generic && compute < 80) return "it needs compute capability 8.0 or later";
  if (backend == Backend::sm90 && compute != 90) return "it needs compute capability 9.0";
  return nullptr;
#else
  return "this library was built without CUDA: build it where nvcc is found";
#endif
}

const char* refusal(const Capability& row, Device device, const CallShape& shape) {
  if (const char* why = device_refusal(row.backend, device)) return why;
  return row.serves == nullptr || row.serves(shape) ? nullptr : row.limits;
}

}  // namespace

const char* name(Backend backend) {
  constexpr const char* kNames[] = {"sm90", "generic", "cpu"};
  return kNames[static_cast<int>(backend)];
}

std::span<const Capability> capabilities() { return kCapabilities; }

Backend choose_backend(const char* op, Device device, const CallShape& shape) {
  const char* forced = std::getenv("INDEXCACHE_BACKEND");
  if (forced != nullptr && (*forced == '\0' || std::strcmp(forced, "auto") == 0)) forced = nullptr;
  std::string reasons;
  for (const Capability& row : kCapabilities) {
    if (std::strcmp(row.op, op) != 0) continue;
    if (forced != nullptr && std::strcmp(forced, name(row.backend)) != 0) continue;
    const char* why = refusal(row, device, shape);
    if (why == nullptr) return row.backend;
    reasons += (reasons.empty() ? "" : "; ") + std::string(name(row.backend)) + ": " + why;
  }
  if (reasons.empty()) {
    throw Error(op, "INDEXCACHE_BACKEND=" + std::string(forced ? forced : "") +
                        " names no backend of this op (auto, sm90, generic, cpu; see indexcache_ext.capabilities())");
  }
  const std::string none = forced ? "the backend that INDEXCACHE_BACKEND forces cannot serve" : "no backend serves";
  throw Error(op, none + " a call on " + to_string(device) + " (" + reasons + ")");
}

bool built_with_cuda() { return INDEXCACHE_WITH_CUDA; }

std::string build_info() {
  return std::string("{\"version\": \"") + INDEXCACHE_VERSION + "\", \"cxx\": \"" + INDEXCACHE_CXX +
         "\", \"cuda\": \"" + INDEXCACHE_CUDA_VERSION + "\", \"cuda_archs\": \"" + INDEXCACHE_CUDA_ARCHS +
         "\", \"cutlass\": \"" + INDEXCACHE_CUTLASS_VERSION + "\", \"cpu_isa\": \"" + cpu::instruction_set() + "\"}";
}

std::string capabilities_json() {
  std::string json = "[";
  for (const Capability& row : kCapabilities) {
    if (row.backend != Backend::cpu && !built_with_cuda()) continue;
    json += std::string(json.size() > 1 ? ", " : "") + "{\"op\": \"" + row.op + "\", \"backend\": \"" +
            name(row.backend) + "\", \"limits\": \"" + row.limits + "\"}";
  }
  return json + "]";
}

}  // namespace indexcache
