// The one error type of the library: it names the op, the argument, what was expected and what came.
#pragma once

#include <stdexcept>
#include <string>

namespace indexcache {

/// Thrown by every op entry before any work is launched.
///
/// The message reads `indexcache::topk: expected starts to be int32 [4], got int64 [4] on cuda:0`.
class Error : public std::runtime_error {
 public:
  Error(std::string op, std::string argument, std::string expected, std::string got)
      : std::runtime_error("indexcache::" + op + ": expected " + argument + " to be " + expected + ", got " + got),
        op(std::move(op)),
        argument(std::move(argument)),
        expected(std::move(expected)),
        got(std::move(got)) {}

  /// A failure that is not about one argument: an unusable backend, a CUDA error.
  Error(std::string op, const std::string& message)
      : std::runtime_error("indexcache::" + op + ": " + message), op(std::move(op)) {}

  const std::string op;
  const std::string argument;
  const std::string expected;
  const std::string got;
};

}  // namespace indexcache
