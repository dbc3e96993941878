// Between Python arrays and the library's TensorView: NumPy by its buffers, everything else by DLPack.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "csrc/pybind/memory.h"
#include "indexcache/ops.h"

namespace indexcache::pybind {

namespace py = pybind11;

/// A CUDA result: exports itself through DLPack, so that any array library can take it over without a copy.
struct DeviceArray {
  OwnedTensor tensor;

  py::capsule dlpack(py::object stream) const;
  py::tuple dlpack_device() const;
};

/// One call of an op: converts the arguments and keeps them alive, then converts the results.
class Call {
 public:
  explicit Call(uint64_t stream) : ctx(stream), stream_(stream) {}

  TensorView in(const char* name, py::handle array);
  MaybeView maybe(const char* name, py::handle array) {
    return array.is_none() ? MaybeView() : MaybeView(in(name, array));
  }
  /// NumPy has no float8 or bfloat16: uint8 and uint16 arrays stand for their bits.
  TensorView in_e4m3(const char* name, py::handle array) { return as(in(name, array), DType::u8, DType::e4m3); }
  TensorView in_float(const char* name, py::handle array) { return as(in(name, array), DType::u16, DType::bf16); }

  /// An array that the op writes: a read-only one is refused.
  TensorView writable(const char* name, py::handle array);
  MaybeView maybe_writable(const char* name, py::handle array) {
    return array.is_none() ? MaybeView() : MaybeView(writable(name, array));
  }
  AttentionOut attention_out(py::handle out, py::handle lse);

  /// The i-th result, as an array of the library that the inputs came from where it says how to make one.
  py::object result(size_t i) const;
  py::tuple pair() const { return py::make_tuple(result(0), result(1)); }

  PlainContext ctx;

 private:
  static TensorView as(TensorView view, DType bits, DType dtype) {
    if (view.dtype == bits) view.dtype = dtype;
    return view;
  }
  uint64_t stream_;
  std::vector<py::object> keep_alive_;
  py::object namespace_;  // array namespace of the first CUDA input
};

}  // namespace indexcache::pybind
