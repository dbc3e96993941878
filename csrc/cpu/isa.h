// Instruction sets of the CPU backend, chosen at run time.
//
// Every file under isa/ is compiled once per level, with INDEXCACHE_ISA naming the level's namespace. Such a file must
// not use templates or inline functions of the standard library that could be emitted out of line (vector, function,
// sort): the linker keeps one copy of those, and it could be one that an older CPU cannot run.
#pragma once

#include <cstdint>

namespace indexcache::cpu {

enum class Isa : uint8_t { baseline, avx2, avx512, avx512_bf16 };

/// The best level that this machine runs, lowered by INDEXCACHE_CPU_ISA (read once).
Isa isa();

}  // namespace indexcache::cpu

// INDEXCACHE_ISA_FUNCTION(void, dot_rows, const float* a, int n) declares dot_rows in the namespace of each level, and
// INDEXCACHE_ISA_CALL(dot_rows, a, n) calls the one that isa() chose. Both belong in namespace indexcache::cpu.
#if defined(__x86_64__)
#define INDEXCACHE_ISA_FUNCTION(result, function, ...)       \
  namespace baseline { result function(__VA_ARGS__); }       \
  namespace avx2 { result function(__VA_ARGS__); }           \
  namespace avx512 { result function(__VA_ARGS__); }         \
  namespace avx512_bf16 { result function(__VA_ARGS__); }
#define INDEXCACHE_ISA_CALL(function, ...)                        \
  (isa() == Isa::avx512_bf16 ? avx512_bf16::function(__VA_ARGS__) \
   : isa() == Isa::avx512    ? avx512::function(__VA_ARGS__)      \
   : isa() == Isa::avx2      ? avx2::function(__VA_ARGS__)        \
                             : baseline::function(__VA_ARGS__))
#else
#define INDEXCACHE_ISA_FUNCTION(result, function, ...) \
  namespace baseline { result function(__VA_ARGS__); }
#define INDEXCACHE_ISA_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif
