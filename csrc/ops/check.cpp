#include "csrc/ops/check.h"

#include <algorithm>
#include <limits>

namespace indexcache::ops {
namespace {

std::string describe(std::initializer_list<DType> dtypes, std::initializer_list<Dim> shape) {
  std::string text;
  for (DType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(name(dtype));
  text += " [";
  bool first = true;
  for (const Dim& dim : shape) {
    text += (first ? "" : ", ") + (dim.name ? std::string(dim.name) : std::to_string(dim.size));
    first = false;
  }
  return text + "]";
}

bool shape_matches(const TensorView& view, std::initializer_list<Dim> shape) {
  if (view.rank != static_cast<int>(shape.size())) return false;
  int index = 0;
  for (const Dim& dim : shape) {
    if (dim.size >= 0 && view.sizes[index] != dim.size) return false;
    ++index;
  }
  return true;
}

}  // namespace

void Check::tensor(const char* argument, const TensorView& view, std::initializer_list<DType> dtypes,
                   std::initializer_list<Dim> shape, Layout layout) const {
  const bool right_device = view.device == device_;
  const bool right_dtype = std::find(dtypes.begin(), dtypes.end(), view.dtype) != dtypes.end();
  if (right_dtype && shape_matches(view, shape)) {
    if (right_device && view.contiguous(layout.dense_from)) return;
    const std::string expected = describe(dtypes, shape);
    if (!right_device) fail(argument, expected + " on " + to_string(device_), to_string(view));
    const char* wanted = layout.dense_from == 0             ? "contiguous "
                         : layout.dense_from == view.rank - 1 ? "with inner stride 1, "
                                                              : "contiguous inside a page, ";
    fail(argument, wanted + expected, to_string(view));
  }
  fail(argument, describe(dtypes, shape), to_string(view));
}

void Check::at_least(const char* argument, int64_t value, int64_t minimum) const {
  if (value < minimum) fail(argument, ">= " + std::to_string(minimum), std::to_string(value));
}

void Check::at_most(const char* argument, int64_t value, int64_t maximum) const {
  if (value > maximum) fail(argument, "<= " + std::to_string(maximum), std::to_string(value));
}

TensorView Check::result(Context& ctx, const char* argument, const MaybeView& out, DType dtype,
                         std::initializer_list<int64_t> sizes) const {
  if (!out) return ctx.output(dtype, {sizes.begin(), sizes.size()}, device_);
  const int64_t* size = sizes.begin();
  switch (sizes.size()) {
    case 2: tensor(argument, *out, {dtype}, {size[0], size[1]}); break;
    case 3: tensor(argument, *out, {dtype}, {size[0], size[1], size[2]}); break;
    default: fail(argument, "of rank 2 or 3", to_string(*out));
  }
  return *out;
}

PagedCache Check::cache(const char* argument, const TensorView& view, int64_t page_size, int64_t bytes) const {
  const Dim page = page_size < 0 ? Dim("page_size") : Dim(page_size);
  tensor(argument, view, {DType::u8}, {"pages", page, bytes}, {.dense_from = 1});
  if (view.size(1) < 1) fail(argument, describe({DType::u8}, {"pages", "page_size >= 1", bytes}), to_string(view));
  at_most((std::string(argument) + " tokens (pages * page_size)").c_str(), view.size(0) * view.size(1),
          std::numeric_limits<int32_t>::max());
  return {view.as<uint8_t>(), view.size(0), view.size(1), view.stride(0)};
}

}  // namespace indexcache::ops
