// A tensor that somebody else owns: pointer, dtype, sizes, strides, device.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace indexcache {

enum class DType : uint8_t {
  f32, bf16, e4m3, u8, i32, i64,                     // what the ops compute with
  f64, f16, i8, i16, u16, u32, u64, boolean, other,  // named so that an error can say what came
};

/// "float32", "float8_e4m3fn", …: the names that torch and NumPy users know.
const char* name(DType dtype);

/// Bytes of one element (0 for `other`).
int64_t size_of(DType dtype);

enum class DeviceType : uint8_t { cpu, cuda, other };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device& that) const {
    return type == that.type && (type == DeviceType::cpu || index == that.index);
  }
};

/// "cpu" or "cuda:0".
std::string to_string(Device device);

inline constexpr int kMaxRank = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  Device device;
  int rank = 0;
  std::array<int64_t, kMaxRank> sizes{};
  std::array<int64_t, kMaxRank> strides{};  // in elements

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t stride(int dim) const { return strides[dim]; }
  int64_t numel() const;
  /// Row-major and dense from dimension `first` on (dimensions of size 1 may have any stride).
  bool contiguous(int first = 0) const;

  template <class T>
  T* as() const { return static_cast<T*>(data); }

  /// A dense row-major view of `sizes` over `data`.
  static TensorView dense(void* data, DType dtype, std::span<const int64_t> sizes, Device device);
};

/// "float32 [4, 128] on cuda:0", with the strides added where the view is not contiguous.
std::string to_string(const TensorView& view);

}  // namespace indexcache
