// Which code can serve an op, and the choice among it. The dispatcher and the support table read the same rows.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "indexcache/tensor_view.h"

namespace indexcache {

enum class Backend : uint8_t { sm90, generic, cpu };

const char* name(Backend backend);

/// What the choice may depend on. Fields that do not apply to an op are 0.
struct CallShape {
  int64_t heads = 0;
  int64_t dim = 0;  // index head dim, or d_qk
  int64_t d_v = 0;
  int64_t k = 0;
  DType dtype = DType::other;  // of the main input
};

/// One row of the support table.
struct Capability {
  const char* op;
  Backend backend;
  const char* limits;                // for people: "any dims; float32, bfloat16"
  bool (*serves)(const CallShape&);  // null: any shape that passes the op's checks
};

/// All rows, the preferred backend of an op first.
std::span<const Capability> capabilities();

/// The backend that serves this call: the first row of `op` that fits, or the one that INDEXCACHE_BACKEND forces.
/// Throws Error that says why where none can.
Backend choose_backend(const char* op, Device device, const CallShape& shape);

/// True where this library holds CUDA code.
bool built_with_cuda();

/// JSON for people and machines: version, compilers, CUDA architectures, CPU instruction set in use.
std::string build_info();

/// JSON list of {op, backend, limits}.
std::string capabilities_json();

}  // namespace indexcache
