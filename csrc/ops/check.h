// Argument checks of the op entries: everything that can be wrong is refused here, before any launch.
#pragma once

#include <initializer_list>
#include <string>

#include "indexcache/context.h"
#include "indexcache/error.h"
#include "indexcache/ops.h"
#include "indexcache/params.h"

namespace indexcache::ops {

/// One dimension of an expected shape: an exact size, or any size under a name that errors show.
struct Dim {
  Dim(int64_t size) : size(size) {}
  Dim(const char* name) : name(name) {}
  int64_t size = -1;
  const char* name = nullptr;
};

/// How free the strides of a tensor are: fully dense, or dense only from dimension `dense_from` on.
struct Layout {
  int dense_from = 0;
};

/// The checks of one call. Every method throws Error with the op and the argument's name.
class Check {
 public:
  /// `main` is the argument whose device the others must share.
  Check(const char* op, const TensorView& main) : op_(op), device_(main.device) {}

  const char* op() const { return op_; }
  Device device() const { return device_; }

  void tensor(const char* argument, const TensorView& view, std::initializer_list<DType> dtypes,
              std::initializer_list<Dim> shape, Layout layout = {}) const;
  void tensor(const char* argument, const MaybeView& view, std::initializer_list<DType> dtypes,
              std::initializer_list<Dim> shape) const {
    if (view) tensor(argument, *view, dtypes, shape);
  }
  void at_least(const char* argument, int64_t value, int64_t minimum) const;
  void at_most(const char* argument, int64_t value, int64_t maximum) const;
  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) const {
    throw Error(op_, argument, expected, got);
  }

  /// The caller's `out` after checking it, or a new output.
  TensorView result(Context& ctx, const char* argument, const MaybeView& out, DType dtype,
                    std::initializer_list<int64_t> sizes) const;

  /// uint8 [pages, page_size, bytes], pages any stride apart but each dense; page_size -1: any.
  PagedCache cache(const char* argument, const TensorView& view, int64_t page_size, int64_t bytes) const;

 private:
  const char* op_;
  Device device_;
};

/// Element count of a dimension that kernels keep in an int.
inline int narrow(int64_t value) { return static_cast<int>(value); }

inline IntArray int_array(const TensorView& view) { return {view.data, view.dtype == DType::i64}; }

template <class T>
T* pointer_or_null(const MaybeView& view) {
  return view ? view->as<T>() : nullptr;
}

}  // namespace indexcache::ops
