// The C++ API without torch and Python: a program of its own, checked against double loops. Exit code 0: all held.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/sm90/topk/config.h"  // its pure functions
#include "indexcache/backend.h"
#include "indexcache/ops.h"

using namespace indexcache;

namespace {

int failures = 0;

void expect(bool held, const std::string& what) {
  std::printf("%s %s\n", held ? "ok  " : "FAIL", what.c_str());
  failures += !held;
}

/// The least that an op asks of its caller: memory that lives as long as the context, one thread.
class TestContext final : public Context {
 public:
  TensorView output(DType dtype, std::span<const int64_t> sizes, Device device) override {
    TensorView view = TensorView::dense(nullptr, dtype, sizes, device);
    view.data = scratch(view.numel() * size_of(dtype), device);
    return view;
  }
  void* scratch(int64_t bytes, Device) override {
    blocks_.push_back(std::make_unique<std::byte[]>(bytes + 64));
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(blocks_.back().get()) + 63) / 64 * 64);
  }
  void* stream(Device) override { return nullptr; }
  void parallel_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) override {
    if (n > 0) body(0, n);
  }

 private:
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

template <class T>
TensorView view(std::vector<T>& data, DType dtype, std::vector<int64_t> sizes) {
  return TensorView::dense(data.data(), dtype, sizes, {});
}

/// The definition, by sorting: (value descending, column ascending), listed by column, then -1.
std::vector<int32_t> sorted_topk(const float* row, int64_t begin, int64_t end, int64_t k) {
  std::vector<int32_t> columns;
  for (int64_t n = begin; n < end; ++n) {
    if (row[n] > -std::numeric_limits<float>::infinity()) columns.push_back(static_cast<int32_t>(n));
  }
  std::stable_sort(columns.begin(), columns.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  columns.resize(std::min<int64_t>(columns.size(), k));
  std::sort(columns.begin(), columns.end());
  columns.resize(k, -1);
  return columns;
}

void test_topk(std::mt19937& random) {
  constexpr int64_t kRows = 7, kColumns = 5003, kK = 300;
  std::vector<float> logits(kRows * kColumns);
  // Few distinct values, so that ties straddle every threshold; NaN, infinities and both zeros among them.
  const float values[] = {0.0f, -0.0f, 1.5f, -2.0f, INFINITY, -INFINITY, NAN, 1e-40f, 3e38f};
  for (float& x : logits) x = values[random() % std::size(values)];
  std::vector<int32_t> starts{0, 17, -5, 0, 4000, INT32_MIN, 5}, ends{5003, 5000, 9999, 0, 3000, INT32_MAX, 6};
  TestContext ctx;
  const TensorView out = topk(ctx, view(logits, DType::f32, {kRows, kColumns}), view(starts, DType::i32, {kRows}),
                              view(ends, DType::i32, {kRows}), kK);
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t begin = std::max<int64_t>(0, starts[r]), end = std::min<int64_t>(kColumns, ends[r]);
    const auto wanted = sorted_topk(&logits[r * kColumns], begin, end, kK);
    expect(std::memcmp(out.as<int32_t>() + r * kK, wanted.data(), kK * sizeof(int32_t)) == 0,
           "topk row " + std::to_string(r));
  }
}

/// The selection as slots, and without a translation where the table is empty: never columns in place of slots.
void test_topk_to_slots(std::mt19937& random) {
  constexpr int64_t kRows = 3, kColumns = 500, kK = 40, kPage = 7, kPages = 80;
  std::vector<float> logits(kRows * kColumns);
  std::normal_distribution<float> normal;
  for (float& x : logits) x = normal(random);
  std::vector<int32_t> starts(kRows, 0), ends(kRows, kColumns), requests{1, 0, 1}, table(2 * kPages);
  for (int32_t& page : table) page = static_cast<int32_t>(random() % 1000) - 10;  // some name no page
  TestContext ctx;
  const TensorView scores = view(logits, DType::f32, {kRows, kColumns}), first = view(starts, DType::i32, {kRows}),
                   last = view(ends, DType::i32, {kRows}), request = view(requests, DType::i32, {kRows});
  const TensorView columns = topk(ctx, scores, first, last, kK);
  const TensorView slots =
      topk_to_slots(ctx, scores, first, last, kK, view(table, DType::i32, {2, kPages}), request, kPage);
  const TensorView none =
      topk_to_slots(ctx, scores, first, last, kK, TensorView::dense(nullptr, DType::i32, {{2, 0}}, {}), request, kPage);
  bool same = true, empty = true;
  for (int64_t i = 0; i < kRows * kK; ++i) {
    const int32_t column = columns.as<int32_t>()[i];
    const int32_t page = table[requests[i / kK] * kPages + column / kPage];
    same &= slots.as<int32_t>()[i] == (page < 0 ? -1 : page * static_cast<int32_t>(kPage) + column % kPage);
    empty &= none.as<int32_t>()[i] == -1;
  }
  expect(same, "slots of a selection");
  expect(empty, "slots by an empty table");
}

void test_attention(std::mt19937& random) {
  constexpr int64_t kTokens = 3, kHeads = 5, kDim = 24, kValue = 16, kKeys = 40, kList = 33;
  std::normal_distribution<float> normal;
  std::vector<float> q(kTokens * kHeads * kDim), kv(kKeys * kDim);
  for (float& x : q) x = normal(random);
  for (float& x : kv) x = normal(random);
  std::vector<int32_t> indices(kTokens * kList);
  for (int32_t& i : indices) i = static_cast<int32_t>(random() % 60) - 10;  // some outside [0, kKeys)
  TestContext ctx;
  const Pair result = sparse_mla(ctx, view(q, DType::f32, {kTokens, kHeads, kDim}), view(kv, DType::f32, {kKeys, kDim}),
                                 view(indices, DType::i32, {kTokens, kList}), 0.3, kValue, {}, {});
  double worst = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      double sum = 0;
      std::vector<double> wanted(kValue);
      for (int64_t j = 0; j < kList; ++j) {
        const int64_t n = indices[t * kList + j];
        if (n < 0 || n >= kKeys) continue;
        double s = 0;
        for (int64_t d = 0; d < kDim; ++d) s += double{q[(t * kHeads + h) * kDim + d]} * kv[n * kDim + d];
        const double p = std::exp(0.3 * s);
        sum += p;
        for (int64_t d = 0; d < kValue; ++d) wanted[d] += p * kv[n * kDim + d];
      }
      const int64_t row = t * kHeads + h;
      worst = std::max(worst, std::abs(result.second.as<float>()[row] - std::log(sum)));
      for (int64_t d = 0; d < kValue; ++d) {
        worst = std::max(worst, std::abs(result.first.as<float>()[row * kValue + d] - wanted[d] / sum));
      }
    }
  }
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", worst);
  expect(worst < 1e-5, std::string("sparse_mla against double loops: largest difference ") + text);
}

void test_errors() {
  std::vector<float> logits(12);
  std::vector<int64_t> wide(4);
  std::vector<int32_t> bounds(4);
  TestContext ctx;
  try {
    topk(ctx, view(logits, DType::f32, {4, 3}), view(wide, DType::i64, {4}), view(bounds, DType::i32, {4}), 1);
    expect(false, "a wrong dtype is refused");
  } catch (const Error& error) {
    expect(std::string(error.what()) == "indexcache::topk: expected starts to be int32 [4], got int64 [4] on cpu" &&
               error.op == "topk" && error.argument == "starts",
           "a wrong dtype is refused with op and argument");
  }
}

void test_topk_plan() {
  using namespace sm90::radix_topk;
  constexpr int kSms = 132;
  struct {
    int64_t rows, columns, lead;
    Kernel kernel;
    int cluster;
  } const cases[] = {
      {1, 8192, 0, Kernel::short_rows, 1},           {1, 8192, 3, Kernel::many_long_rows, 1},
      {100'000, 8190, 2, Kernel::short_rows, 1},     {1, 0, 3, Kernel::short_rows, 1},
      {1, 8193, 0, Kernel::many_long_rows, 1},        {1, 16'384, 0, Kernel::few_long_rows, 2},
      {1, 524'288, 0, Kernel::few_long_rows, 16},    {1, 1 << 23, 3, Kernel::few_longest_rows, 16},
      {7, 1 << 20, 0, Kernel::few_longest_rows, 16},    {8, 1 << 20, 0, Kernel::few_long_rows, 8},
      {16, 131'072, 0, Kernel::few_long_rows, 4},    {64, 65'536, 0, Kernel::few_long_rows, 2},
      {66, 65'536, 0, Kernel::few_long_rows, 2},     {67, 65'536, 0, Kernel::many_long_rows, 1},
      {128, 32'768, 0, Kernel::many_long_rows, 1},    {132, 1 << 20, 0, Kernel::many_long_rows, 1},
      {133, 32'768, 0, Kernel::many_long_rows, 1},   {100'000, 1 << 20, 0, Kernel::many_long_rows, 1},
  };
  for (const auto& c : cases) {
    const Spread how = spread(c.rows, c.columns, c.lead, kSms);
    expect(how.kernel == c.kernel && how.cluster == c.cluster,
           "spread of " + std::to_string(c.rows) + " x " + std::to_string(c.columns));
  }
  bool fits = true;  // in one wave, where rows are shared
  for (int64_t rows = 1; rows <= 300; ++rows) {
    for (int64_t columns = 1; columns < INT32_MAX; columns += 1 + columns / 3) {
      const int cluster = spread(rows, columns, 3, kSms).cluster;
      fits &= cluster == 1 || (cluster <= kMaxCluster && rows * cluster <= kSms && columns / cluster >= kLeastSlice);
    }
  }
  expect(fits, "blocks of shared rows have work and run at the same time");
  bool long_enough = true;
  for (int length = kWholeRow + 1; length < INT32_MAX - INT32_MAX / 97 - 1; length += 1 + length / 97) {
    long_enough &= length >> (kLogThreads - 1 + log_sample_units(length)) >= kSampleUnit;
    long_enough &= log_sample_units(length) <= log2_of(kMaxUnits);
  }
  expect(long_enough, "every part of a sampled row is as long as a unit");
}

}  // namespace

int main() {
  std::mt19937 random(0);
  test_topk(random);
  test_topk_to_slots(random);
  test_attention(random);
  test_errors();
  test_topk_plan();
  expect(!capabilities().empty() && choose_backend("topk", {}, {}) == Backend::cpu, "the CPU serves topk");
  std::printf("%d failed\n", failures);
  return failures != 0;
}
