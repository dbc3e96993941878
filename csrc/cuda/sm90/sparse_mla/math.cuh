// The math warpgroups: scores, online softmax, values.
//
// Warpgroup w scores the blocks j with j % 2 == w. Of a block that it scores it keeps the probabilities in registers
// for its own half of the values, and leaves a copy in shared memory for the other warpgroup. One buffer does: only the
// reader of block j writes that of block j + 1, after its own products of block j.
#pragma once

#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/common/wgmma.cuh"
#include "csrc/cuda/sm90/sparse_mla/layout.cuh"

namespace indexcache::sm90::attention {

/// Rows of a thread in any 64-row accumulator: first_row() and eight further down. Columns: 8 j + 2 (lane % 4), + 1.
inline constexpr int kRows = 2;
__device__ inline int first_row() { return threadIdx.x % 128 / 32 * 16 + cuda::lane_id() / 4; }
__device__ inline int first_column() { return 2 * (cuda::lane_id() % 4); }

/// Named barriers of the math warpgroups.
inline constexpr int kBarrierOfMath = 1, kBarrierOfWarpgroup = 2;

/// Where this lane stores matrices in a chunk: it names a row of one of four 8 x 8 matrices.
__device__ inline uintptr_t matrix_address(const uint16_t* chunk) {
  const int lane = cuda::lane_id(), row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  return reinterpret_cast<uintptr_t>(chunk + unit_offset(0, row, lane / 16));
}
/// Stores the warp's 16 rows of an accumulator, as bf16 pairs, into a chunk: of units `unit` (a, b) and the next
/// (c, d), this thread's pair of first_row() and that of eight rows down. `to`: of matrix_address().
__device__ inline void store_matrices(uintptr_t to, int unit, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // The swizzle is an exclusive or, and rows are aligned to their 128 bytes.
  cute::SM90_U32x4_STSM_N::copy(a, b, c, d, *reinterpret_cast<cute::uint128_t*>(to ^ unit * 16));
}

/// exp2 to about 2 ulp; 0 for -inf.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Before there is a key: exp2(-inf - 0) = 0, not NaN.
__device__ inline float finite_base(float max) { return max == -__builtin_inff() ? 0.0f : max; }

template <class T>
struct Math {
  static constexpr int kScores = kTileKeys / 2;   // of a thread
  static constexpr int kValues = kHalfDims / 2;
  static constexpr int kEarlyParts = T::Source::kEarlyParts, kMiddlePart = (kEarlyParts + kParts + 1) / 2;

  Shared<T>& shared;
  const uint32_t warpgroup;
  const float scale;  // of scores, to base 2
  float max[kRows] = {-__builtin_inff(), -__builtin_inff()};
  int marks[kRows] = {};  // where the valid bits of the rows begin
  float sum[kRows] = {};  // of this thread's columns of the blocks that the warpgroup scored

  __device__ static auto row_tile(Bf16* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), RowsLayout<T::kDims>{});
  }

  /// The rows of `block`, from `chunk` on.
  __device__ Bf16* keys_of(uint32_t block, int chunk) {
    return reinterpret_cast<Bf16*>(shared.keys[block % kStages] + chunk * kChunkElements);
  }

  /// Starts parts kFirst … kEnd - 1 of the scores of `block` as they arrive, a group.
  template <int kFirst, int kEnd, class Scores>
  __device__ void start_scores(Scores& scores, uint32_t block) {
    if constexpr (kFirst == kEnd) return;
    cute::for_each(cute::make_range<kFirst, kEnd>{}, [&](auto part) {
      cuda::wait(&shared.key_full[block % kStages][part], block / kStages & 1);
      if constexpr (T::Source::kReadersFence) cuda::fence_async_proxy();
      issue_scores<part>(scores, block);
    });
    cute::warpgroup_commit_batch();
  }

  template <int kPart, class Scores>
  __device__ void issue_scores(Scores& scores, uint32_t block) {
    const auto mma = ScoreMma{}.get_slice(threadIdx.x % 128);
    const auto queries = mma.partition_fragment_A(row_tile(reinterpret_cast<Bf16*>(shared.queries)));
    const auto keys = mma.partition_fragment_B(row_tile(keys_of(block, 0)));
    constexpr int kFirst = first_chunk(kPart) * kChunkSteps, kEnd = end_chunk(kPart, T::kChunks) * kChunkSteps;
    ScoreMma product;
    product.accumulate_ = kPart == 0 ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
    cute::warpgroup_fence_operand(scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = kFirst; step < kEnd; ++step) {
      cute::gemm(product, queries(cute::_, cute::_, step), keys(cute::_, cute::_, step), scores);
      product.accumulate_ = cute::GMMA::ScaleOut::One;
    }
  }

  /// Dot products become probabilities, as bf16 pairs. Maxima rise ever more rarely, so it is found out whether one
  /// does while the exponentials are on their way.
  template <class Scores, class Values>
  __device__ void softmax(Scores& scores, uint32_t block, uint32_t (&pairs)[kScores / 2], Values& values) {
    mask(scores, shared.valid[block % kStages]);
    float added[kRows], top[kRows] = {-__builtin_inff(), -__builtin_inff()};
    exponentials(scores, pairs, added);
#pragma unroll
    for (int i = 0; i < kScores; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores(i));
    if (__any_sync(cuda::kFullMask, top[0] * scale > max[0] + kSlack || top[1] * scale > max[1] + kSlack)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(cuda::kFullMask, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(cuda::kFullMask, top[r], 2)) * scale;
        top[r] = top[r] > max[r] + kSlack ? top[r] : max[r];
      }
      rise_to(top, values);
      exponentials(scores, pairs, added);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += added[r];
  }

  template <class Scores>
  __device__ void exponentials(const Scores& scores, uint32_t (&pairs)[kScores / 2], float (&added)[kRows]) {
    const float base[kRows] = {finite_base(max[0]), finite_base(max[1])};
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const int r = i / 2 % 2;
      const float low = fast_exp2(fmaf(scores(i), scale, -base[r]));
      const float high = fast_exp2(fmaf(scores(i + 1), scale, -base[r]));
      added[r] = i < 2 * kRows ? low + high : added[r] + (low + high);
      pairs[i / 2] = cuda::pack_bf16x2(low, high);
    }
  }

  /// Keys that a row does not attend to.
  template <class Scores>
  __device__ void mask(Scores& scores, const uint32_t* valid) {
    constexpr int kSets = T::kGrouped ? kRows : 1;  // of words: both rows' own, or the same ones
    uint32_t words[kSets][kTileKeys / 32], all = ~0u;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 32; ++i) all &= words[set][i] = valid[(T::kGrouped ? marks[set] : 0) + i];
    }
    if (all == ~0u) return;
#pragma unroll
    for (auto& set : words) {
#pragma unroll
      for (uint32_t& word : set) word = opaque(word >> first_column());
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int column = i / 4 * 8 + i % 2;
      if (!(words[i / 2 % 2 % kSets][column / 32] >> column % 32 & 1)) scores(i) = -__builtin_inff();
    }
  }

  /// New maxima; what was before them shrinks.
  template <class Values>
  __device__ void rise_to(const float (&top)[kRows], Values& values) {
    float correction[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      correction[r] = fast_exp2(max[r] - finite_base(top[r]));
      max[r] = top[r];
      sum[r] *= correction[r];
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) values(i) *= correction[i / 2 % 2];
  }

  /// Gives the other warpgroup what it needs of a block.
  __device__ void publish(const uint32_t (&pairs)[kScores / 2]) {
    const auto to = matrix_address(shared.probabilities);
#pragma unroll
    for (int i = 0; i < kScores / 2; i += 4) {
      store_matrices(to, i / 2, pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
    }
    const int row = first_row();
    if (cuda::lane_id() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) shared.max[row + 8 * r] = max[r];
    }
    cuda::fence_async_proxy();
    cuda::warp_arrive(&shared.probabilities_full[warpgroup]);
  }

  /// What the other warpgroup made of `block`.
  template <class Values>
  __device__ void follow(uint32_t block, Values& values) {
    cuda::wait(&shared.probabilities_full[block % kMathWarpgroups], block / kMathWarpgroups & 1);
    if constexpr (T::Source::kReadersFence) cuda::fence_async_proxy();  // its products read the keys too
    const float top[kRows] = {shared.max[first_row()], shared.max[first_row() + 8]};
    if (__any_sync(cuda::kFullMask, top[0] != max[0] || top[1] != max[1])) rise_to(top, values);
  }

  /// Starts this warpgroup's half of the values of `block`, a group for each part.
  template <class Mma, class Probabilities, class Values>
  __device__ void start_values(const Probabilities& probabilities, uint32_t block, Values& values) {
    auto* const half = keys_of(block, warpgroup * kHalfDims / kChunkDims);
    const auto tile = cute::make_tensor(cute::make_smem_ptr(half), ValuesLayout{});
    const auto keys = Mma{}.get_slice(threadIdx.x % 128).partition_fragment_B(tile);
    Mma product;
    product.accumulate_ = cute::GMMA::ScaleOut::One;
    cute::warpgroup_fence_operand(values);
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < kHalfDims / kPartDims; ++part) {
#pragma unroll
      for (int step = 0; step < kValueSteps; ++step) {
        cute::gemm(product, probabilities(cute::_, 0, step), keys(cute::_, part, step), values(cute::_, 0, part));
      }
      cute::warpgroup_commit_batch();
    }
  }

  /// Waits for all but kLater groups, and frees a part of `block` that was read before them.
  template <int kLater>
  __device__ void free_part(uint32_t block, uint32_t part) {
    cute::warpgroup_wait<kLater>();
    cuda::warp_arrive(&shared.key_empty[block % kStages][part]);
  }

  /// Waits for the values of `block`, and frees the parts read unless it is the last block, whose place the output
  /// takes.
  template <class Values>
  __device__ void end_values(uint32_t block, uint32_t end, Values& values) {
    if (block + 1 < end) {
      free_part<1>(block, warpgroup);
      free_part<0>(block, kMathWarpgroups + warpgroup);
    }
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(values);
  }

  /// A block whose scores this warpgroup has started; `end` is that of the token.
  template <class Scores, class Values>
  __device__ void own_block(uint32_t block, uint32_t end, Scores& scores, Values& values) {
    auto fragment = cute::make_tensor<Bf16>(
        cute::Layout<Shape<Shape<cute::_2, cute::_2, cute::_2>, cute::_1, Int<kValueSteps>>>{});
    auto& pairs = *reinterpret_cast<uint32_t(*)[kScores / 2]>(fragment.data());
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    if (block + kMathWarpgroups >= end) cuda::warp_arrive(&shared.query_empty);
    softmax(scores, block, pairs, values);
    publish(pairs);
    start_values<OwnValueMma>(fragment, block, values);
    end_values(block, end, values);
  }

  /// Starts the values of a block that the other warpgroup scored.
  template <class Values>
  __device__ void start_other_block(uint32_t block, Values& values) {
    follow(block, values);
    auto* const rows = reinterpret_cast<Bf16*>(shared.probabilities);
    const auto tile = cute::make_tensor(cute::make_smem_ptr(rows), RowsLayout<kTileKeys>{});
    start_values<ValueMma>(ValueMma{}.get_slice(threadIdx.x % 128).partition_fragment_A(tile), block, values);
  }

  /// Key blocks `block` … `end` - 1 of the ring, which are those of a token. Keeps this warpgroup's dims of the last
  /// one, for the output.
  template <class Values>
  __device__ void run(uint32_t block, uint32_t end, Values& values) {
    auto scores = cute::partition_fragment_C(ScoreMma{}, Shape<Int<kTileHeads>, Int<kTileKeys>>{});
    static_assert(decltype(cute::size(scores))::value == kScores);
    if (block < end && block % kMathWarpgroups == warpgroup) {
      start_scores<0, kParts>(scores, block);
      own_block(block, end, scores, values);
      ++block;
    } else if (block + 1 >= end) {
      cuda::warp_arrive(&shared.query_empty);  // this warpgroup scores no block
    }
    if (block + 1 < end) {
      start_scores<0, kEarlyParts>(scores, block + 1);
      while (true) {
        start_other_block(block, values);
        free_part<1>(block, warpgroup);  // as early as the products go: to issue more takes as long as theirs
        start_scores<kEarlyParts, kMiddlePart>(scores, block + 1);
        free_part<1>(block, kMathWarpgroups + warpgroup);
        start_scores<kMiddlePart, kParts>(scores, block + 1);
        cute::warpgroup_fence_operand(values);
        cuda::sync_threads<128>(kBarrierOfWarpgroup + warpgroup);  // no warp's products read the probabilities any more
        own_block(block + 1, end, scores, values);
        block += 2;
        if (block + 1 >= end) break;
        start_scores<0, kEarlyParts>(scores, block + 1);
      }
    }
    if (block < end) {
      start_other_block(block, values);
      end_values(block, end, values);
    }
  }

  /// After run(): the sums of the blocks that this warpgroup scored, for both.
  __device__ void share_sums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float whole = sum[r];
      whole += __shfl_xor_sync(cuda::kFullMask, whole, 1);
      whole += __shfl_xor_sync(cuda::kFullMask, whole, 2);
      if (cuda::lane_id() % 4 == 0) shared.sums[warpgroup][first_row() + 8 * r] = whole;
    }
  }
};

}  // namespace indexcache::sm90::attention
