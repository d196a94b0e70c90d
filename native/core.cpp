// The few calls that mlx-c lacks. No exception leaves this file.
#include "mlxrs.h"

#include <set>

#include "mlx/c/private/mlx.h"
#include "mlx/mlx.h"

namespace mx = mlx::core;

extern "C" mlx_stream mlxrs_current_stream(void) {
  // mlx-c would allocate a device and a stream per call; this runs for every operation.
  thread_local mx::Stream stream{0, mx::Device{mx::Device::cpu}};
  try {
    stream = mx::default_stream(mx::default_device());
    return mlx_stream{&stream};
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return mlx_stream{nullptr};
  }
}

extern "C" mlx_array mlxrs_host_array(const int* shape, int dim, mlx_dtype dtype, void** data) {
  try {
    auto type = mlx_dtype_to_cpp(dtype);
    size_t bytes = mx::size_of(type);
    for (int i = 0; i < dim; i++) {
      bytes *= static_cast<size_t>(shape[i]);
    }
    auto memory = mx::allocator::malloc(bytes);
    *data = memory.buffer().raw_ptr();
    if (*data == nullptr && bytes > 0) {
      throw std::runtime_error("out of memory for an array of " + std::to_string(bytes) + " bytes");
    }
    return mlx_array{new mx::array(std::move(memory), mx::Shape(shape, shape + dim), type)};
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return mlx_array{nullptr};
  }
}

extern "C" bool mlxrs_is_scheduled(const mlx_array array) {
  return static_cast<mx::array*>(array.ctx)->status() != mx::array::Status::unscheduled;
}

extern "C" int mlxrs_marks(mlx_vector_array* marks, const mlx_vector_array arrays) {
  try {
    std::vector<mx::array> found;
    std::set<const void*> events;
    for (const auto& array : mlx_vector_array_get_(arrays)) {
      auto& event = array.event();
      if (array.status() != mx::array::Status::evaluated || !event.valid()) {
        continue;
      }
      if (events.insert(&event.cast<char>()).second) {
        // Neither data nor inputs: a mark keeps no buffer from being written in place.
        mx::array mark(mx::Shape{}, mx::bool_, nullptr, {});
        mark.attach_event(event);
        mark.set_status(mx::array::Status::evaluated);
        found.push_back(std::move(mark));
      }
    }
    mlx_vector_array_set_(*marks, std::move(found));
    return 0;
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}

extern "C" mlx_array mlxrs_scheduled_ancestor(const mlx_array array) {
  try {
    mx::array node = *static_cast<mx::array*>(array.ctx);
    while (node.status() == mx::array::Status::unscheduled) {
      if (node.inputs().empty()) {
        return mlx_array{nullptr};
      }
      mx::array input = node.inputs()[0];
      node = std::move(input);
    }
    return mlx_array{new mx::array(std::move(node))};
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return mlx_array{nullptr};
  }
}

namespace {
// How MLX-CUDA 0.32.4 describes a buffer (mlx/backend/cuda/allocator.h, which needs CUDA's own headers).
struct CudaBuffer {
  void* data;
  size_t size;
  int device; // -1: unified
};
} // namespace

extern "C" bool mlxrs_cuda_memory(const mlx_array array, void** data, size_t* size, bool* on_device) {
  auto* node = static_cast<mx::array*>(array.ctx);
  auto* buffer = static_cast<CudaBuffer*>(node->buffer().ptr());
  auto offset = static_cast<size_t>(node->offset());
  if (buffer == nullptr || buffer->size < offset) {
    return false;
  }
  *data = static_cast<char*>(buffer->data) + offset;
  *size = buffer->size - offset;
  *on_device = buffer->device >= 0;
  return true;
}

extern "C" const char* mlxrs_mlx_version(void) {
  return mx::version();
}
