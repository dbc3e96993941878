#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/sm90/sm90.h"
#include "csrc/cuda/sm90/topk/long_rows.cuh"
#include "csrc/cuda/sm90/topk/short_rows.cuh"

namespace indexcache::sm90 {
namespace {

using namespace radix_topk;

template <class T, int kCluster, class Rows>
void launch_long(const TopkParams& p, Stream stream) {
  constexpr int kBytes = sizeof(LongRowShared<Rows>);
  cuda::launch<long_rows_kernel<T, kCluster, Rows>>(
      "topk", {.blocks = p.rows * kCluster, .threads = kThreads, .shared_bytes = kBytes, .cluster = kCluster}, stream,
      p);
}

template <class T>
void run(const TopkParams& p, Stream stream) {
  constexpr int kUnit = Unit<T>::kSize;
  const bool aligned = cuda::aligned(p.logits, 16) && p.row_stride % kUnit == 0;
  const Spread how = spread(p.rows, p.columns, aligned ? 0 : kUnit - 1, cuda::sm_count());
  switch (how.kernel) {
    case Kernel::short_rows:
      return cuda::launch<short_rows_kernel<T>>(
          "topk", {.blocks = p.rows, .threads = kThreads, .shared_bytes = sizeof(ShortRowShared<T>)}, stream, p);
    case Kernel::many_long_rows: return launch_long<T, 1, ManyRows>(p, stream);
    case Kernel::few_longest_rows: return launch_long<T, kMaxCluster, FewLongestRows>(p, stream);
    case Kernel::few_long_rows: break;
  }
  switch (how.cluster) {
    case 2: return launch_long<T, 2, FewRows>(p, stream);
    case 4: return launch_long<T, 4, FewRows>(p, stream);
    case 8: return launch_long<T, 8, FewRows>(p, stream);
    default: return launch_long<T, kMaxCluster, FewRows>(p, stream);
  }
}

}  // namespace

void topk(const TopkParams& p, Stream stream) {
  return p.dtype == DType::bf16 ? run<uint16_t>(p, stream) : run<float>(p, stream);
}

}  // namespace indexcache::sm90
