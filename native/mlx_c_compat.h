// Included before every file of mlx-c: what makes mlx-c c74db530 (of mlx-sys 0.6.0) fit MLX 0.32.4.
#pragma once

#include "mlx/c/error.h"
#include "mlx/mlx.h"

namespace mlx::core {

// 0.32.4 put `global_scale` before `sorted_indices`; mlx-c still calls the old order.
inline array gather_qmm(
    const array& x,
    const array& w,
    const array& scales,
    const std::optional<array>& biases,
    std::optional<array> lhs_indices,
    std::optional<array> rhs_indices,
    bool transpose,
    std::optional<int> group_size,
    std::optional<int> bits,
    const std::string& mode,
    bool sorted_indices,
    StreamOrDevice s) {
  return gather_qmm(
      x, w, scales, biases, std::move(lhs_indices), std::move(rhs_indices), transpose, group_size, bits, mode,
      std::optional<array>{}, sorted_indices, s);
}

} // namespace mlx::core

// mlx-c hands MLX's messages to a printf as the format; a percent sign in one would read the stack.
inline void mlxrs_error(const char* file, int line, const char* message) {
  _mlx_error(file, line, "%s", message);
}
template <typename... Args>
inline void mlxrs_error(const char* file, int line, const char* format, Args... args) {
  _mlx_error(file, line, format, args...);
}
#undef mlx_error
#define mlx_error(...) mlxrs_error(__FILE__, __LINE__, __VA_ARGS__)
