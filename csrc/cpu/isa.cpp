#include "csrc/cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "csrc/cpu/cpu.h"

namespace indexcache::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = best_of_machine();
  const char* wanted = std::getenv("INDEXCACHE_CPU_ISA");
  for (int level = 0; wanted != nullptr && level <= static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<Isa>(level);
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* instruction_set() { return kNames[static_cast<int>(isa())]; }

}  // namespace indexcache::cpu
