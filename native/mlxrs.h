/* What Rust sees of C: mlx-c's headers and the few calls that mlx-c lacks. */
#pragma once

#include "mlx/c/array.h"
#include "mlx/c/cuda.h"
#include "mlx/c/device.h"
#include "mlx/c/error.h"
#include "mlx/c/map.h"
#include "mlx/c/memory.h"
#include "mlx/c/metal.h"
#include "mlx/c/ops.h"
#include "mlx/c/stream.h"
#include "mlx/c/string.h"
#include "mlx/c/transforms.h"
#include "mlx/c/vector.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stream that an operation without one would use on this thread now. The handle belongs to the thread and is
   never freed; the next call on the same thread renews it. */
mlx_stream mlxrs_current_stream(void);

/* A new array over `bytes` of MLX's own allocator, what shape and type take, not yet written; `data` is its first byte,
   which the CPU may write until the array is first used. On CUDA it is unified memory. An empty handle on failure, after the error handler. */
mlx_array mlxrs_host_array(const int* shape, int dim, mlx_dtype dtype, size_t bytes, void** data);

/* True if the array has been computed, or its computation has been scheduled. */
bool mlxrs_is_scheduled(const mlx_array array);

/* Fills `marks` with arrays that have no data, one for each computation that `arrays` are still the outcome of:
   evaluating a mark waits for that computation, and fails as it did. */
int mlxrs_marks(mlx_vector_array* marks, const mlx_vector_array arrays);

/* The array itself, or what it would be computed from by the first input of each step, whichever is scheduled first:
   the buffer that a chain of updates began with. An empty handle if there is none. */
mlx_array mlxrs_scheduled_ancestor(const mlx_array array);

/* Where a computed array on a CUDA device lies: its first element, the bytes from there to the end of its buffer, and
   whether that is memory of the device or unified. False if it has none. */
bool mlxrs_cuda_memory(const mlx_array array, void** data, size_t* size, bool* on_device);

/* The tensors of an open safetensors file by name: arrays that are read when they are computed. The file descriptor is
   taken over, and closed with the last of them, or now on failure. Reading fails if the file is short, or if its size and
   time of change are not those given. 0 on success, else after the error handler. */
int mlxrs_lazy_tensors(mlx_map_string_to_array* res, int file, const char* path, int64_t size, int64_t seconds,
                       int64_t nanoseconds);

/* MLX's version as libmlx, loaded now, tells it. */
const char* mlxrs_mlx_version(void);

#ifdef __cplusplus
}
#endif
