#include "csrc/pybind/arrays.h"

#include <string>

#include "csrc/pybind/dlpack.h"
#include "indexcache/error.h"

namespace indexcache::pybind {
namespace {

struct TypeRow {
  DType dtype;
  dlpack::DataType type;
  const char* numpy;  // the NumPy dtype of results
};

constexpr TypeRow kTypes[] = {
    {DType::f32, {dlpack::kFloat, 32, 1}, "float32"},  {DType::bf16, {dlpack::kBfloat, 16, 1}, "uint16"},
    {DType::e4m3, {dlpack::kFloat8E4m3fn, 8, 1}, "uint8"}, {DType::u8, {dlpack::kUInt, 8, 1}, "uint8"},
    {DType::i32, {dlpack::kInt, 32, 1}, "int32"},      {DType::i64, {dlpack::kInt, 64, 1}, "int64"},
    {DType::f64, {dlpack::kFloat, 64, 1}, "float64"},  {DType::f16, {dlpack::kFloat, 16, 1}, "float16"},
    {DType::i8, {dlpack::kInt, 8, 1}, "int8"},         {DType::i16, {dlpack::kInt, 16, 1}, "int16"},
    {DType::u16, {dlpack::kUInt, 16, 1}, "uint16"},    {DType::u32, {dlpack::kUInt, 32, 1}, "uint32"},
    {DType::u64, {dlpack::kUInt, 64, 1}, "uint64"},    {DType::boolean, {dlpack::kBool, 8, 1}, "bool"}};

const TypeRow& row_of(DType dtype) {
  for (const TypeRow& row : kTypes) {
    if (row.dtype == dtype) return row;
  }
  throw Error("_C", std::string("no array type for ") + name(dtype));
}

void check_rank(const char* argument, int64_t rank) {
  if (rank > kMaxRank) throw Error("_C", argument, "an array of at most 8 dimensions", std::to_string(rank));
}

TensorView view_numpy(const char* argument, const py::array& array) {
  check_rank(argument, array.ndim());
  TensorView view;
  view.data = const_cast<void*>(array.data());
  view.rank = static_cast<int>(array.ndim());
  for (const TypeRow& row : kTypes) {
    if (row.dtype != DType::bf16 && row.dtype != DType::e4m3 && array.dtype().equal(py::dtype(row.numpy))) {
      view.dtype = row.dtype;
    }
  }
  const int64_t item = array.itemsize();
  for (int dim = 0; dim < view.rank; ++dim) {
    view.sizes[dim] = array.shape(dim);
    if (array.strides(dim) % item != 0) {
      throw Error("_C", argument, "an array whose strides are multiples of its element size",
                  std::to_string(array.strides(dim)) + " bytes for elements of " + std::to_string(item));
    }
    view.strides[dim] = array.strides(dim) / item;
  }
  return view;
}

TensorView view_dlpack(const char* argument, const dlpack::Tensor& tensor) {
  check_rank(argument, tensor.ndim);
  TensorView view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.ndim;
  const bool cuda = tensor.device.type == dlpack::kCuda || tensor.device.type == dlpack::kCudaManaged;
  const bool cpu = tensor.device.type == dlpack::kCpu || tensor.device.type == dlpack::kCudaHost;
  view.device = {cuda ? DeviceType::cuda : cpu ? DeviceType::cpu : DeviceType::other, cuda ? tensor.device.id : 0};
  for (const TypeRow& row : kTypes) {
    if (row.type.code == tensor.dtype.code && row.type.bits == tensor.dtype.bits && tensor.dtype.lanes == 1) {
      view.dtype = row.dtype;
    }
  }
  int64_t dense = 1;
  for (int dim = tensor.ndim - 1; dim >= 0; --dim) {
    view.sizes[dim] = tensor.shape[dim];
    view.strides[dim] = tensor.strides ? tensor.strides[dim] : dense;
    dense *= tensor.shape[dim];
  }
  return view;
}

/// The library of an array that can take over a DLPack export: by the array API standard, else by its type's module.
py::object namespace_of(py::handle array) {
  if (py::hasattr(array, "__array_namespace__")) return array.attr("__array_namespace__")();
  const auto module = py::type::handle_of(array).attr("__module__").cast<std::string>();
  const py::object library = py::module_::import(module.substr(0, module.find('.')).c_str());
  return py::hasattr(library, "from_dlpack") ? library : py::object();
}

/// DLPack numbers CUDA's streams its own way: 1 is the legacy default stream, 0 is not allowed.
uint64_t stream_to_dlpack(uint64_t stream) { return stream == 0 ? 1 : stream; }

}  // namespace

TensorView Call::in(const char* argument, py::handle array) {
  if (py::isinstance<py::array>(array)) {
    keep_alive_.push_back(py::reinterpret_borrow<py::object>(array));
    return view_numpy(argument, py::reinterpret_borrow<py::array>(array));
  }
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) {
    throw Error("_C", argument, "an array (NumPy, or anything with __dlpack__)",
                std::string(py::str(py::type::handle_of(array).attr("__name__"))));
  }
  const auto device = array.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const bool cuda = device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged;
  const py::object exported =
      cuda ? array.attr("__dlpack__")(py::arg("stream") = stream_to_dlpack(stream_)) : array.attr("__dlpack__")();
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(exported.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  keep_alive_.push_back(exported);  // never renamed, so the capsule itself frees the export
  if (cuda && !namespace_) namespace_ = namespace_of(array);
  return view_dlpack(argument, managed->tensor);
}

TensorView Call::writable(const char* argument, py::handle array) {
  if (py::isinstance<py::array>(array) && !py::reinterpret_borrow<py::array>(array).writeable()) {
    throw Error("_C", argument, "a writable array", "a read-only one");
  }
  return in(argument, array);
}

AttentionOut Call::attention_out(py::handle out, py::handle lse) {
  if (out.is_none() != lse.is_none()) {
    throw Error("_C", out.is_none() ? "out" : "lse", "given together with the other", "None");
  }
  if (out.is_none()) return {};
  return {as(writable("out", out), DType::u16, DType::bf16), writable("lse", lse)};
}

py::object Call::result(size_t i) const {
  const OwnedTensor& tensor = ctx.outputs().at(i);
  const TensorView& view = tensor.view;
  if (view.device.type == DeviceType::cpu) {
    auto* owner = new std::shared_ptr<Memory>(tensor.memory);
    const py::capsule base(owner, [](void* p) { delete static_cast<std::shared_ptr<Memory>*>(p); });
    return py::array(py::dtype(row_of(view.dtype).numpy), std::vector<py::ssize_t>(view.sizes.begin(), view.sizes.begin() + view.rank),
                     view.data, base);
  }
  py::object array = py::cast(DeviceArray{tensor});
  return namespace_ ? namespace_.attr("from_dlpack")(array) : array;
}

py::capsule DeviceArray::dlpack(py::object stream) const {
  // -1 asks for no ordering; 0 and 1 are the legacy default stream, which CUDA calls null.
  const int64_t consumer = stream.is_none() ? 1 : stream.cast<int64_t>();
  if (consumer != -1) tensor.memory->order_before(consumer <= 1 ? nullptr : reinterpret_cast<void*>(consumer));
  struct Export {
    dlpack::ManagedTensor managed;
    OwnedTensor tensor;
  };
  auto* exported = new Export{{}, tensor};
  TensorView& view = exported->tensor.view;
  const DType shown = view.dtype == DType::e4m3 ? DType::u8 : view.dtype;  // few libraries know float8 in DLPack
  exported->managed = {{view.data, {dlpack::kCuda, view.device.index}, view.rank, row_of(shown).type,
                        view.sizes.data(), view.strides.data(), 0},
                       exported,
                       [](dlpack::ManagedTensor* self) { delete static_cast<Export*>(self->manager); }};
  return py::capsule(&exported->managed, "dltensor", [](PyObject* capsule) {
    // A consumer renames the capsule to "used_dltensor" and frees the tensor itself.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

py::tuple DeviceArray::dlpack_device() const {
  return py::make_tuple(static_cast<int>(dlpack::kCuda), tensor.view.device.index);
}

}  // namespace indexcache::pybind
