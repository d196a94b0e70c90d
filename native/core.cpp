// The few calls that mlx-c lacks. No exception leaves this file.
#include "mlxrs.h"

#include "mlx/backend/cuda/cuda.h"
#include <set>

#include "mlx/c/private/mlx.h"
#include "mlx/io/load.h"
#include "mlx/mlx.h"

#include <cerrno>
#include <cstring>

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

extern "C" mlx_array mlxrs_host_array(const int* shape, int dim, mlx_dtype dtype, size_t bytes, void** data) {
  try {
    auto type = mlx_dtype_to_cpp(dtype);
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

namespace {
// An open file that must stay as it was when it was checked. MLX reads tensors from several threads, by place.
class FileReader : public mx::io::Reader {
 public:
  FileReader(int file, std::string path, int64_t size, int64_t seconds, int64_t nanoseconds)
      : file_(file), path_(std::move(path)), size_(size), seconds_(seconds), nanoseconds_(nanoseconds) {}

  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  ~FileReader() override {
    close(file_);
  }

  bool is_open() const override {
    return true;
  }

  bool good() const override {
    return true;
  }

  size_t tell() override {
    return place_;
  }

  void seek(int64_t offset, std::ios_base::seekdir way) override {
    auto from = way == std::ios_base::beg ? 0 : way == std::ios_base::end ? size_ : static_cast<int64_t>(place_);
    place_ = static_cast<size_t>(from + offset);
  }

  void read(char* data, size_t n) override {
    read(data, n, place_);
    place_ += n;
  }

  void read(char* data, size_t n, size_t offset) override {
    while (n > 0) {
      auto got = pread(file_, data, n, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) {
        continue;
      }
      if (got <= 0) {
        fail(got == 0 ? "the file ends too early" : std::strerror(errno));
      }
      data += got;
      n -= static_cast<size_t>(got);
      offset += static_cast<size_t>(got);
    }
    // Afterwards: what was read before a change is good.
    check_unchanged();
  }

  std::string label() const override {
    return "file " + path_;
  }

 private:
  void check_unchanged() const {
    struct stat now;
    if (fstat(file_, &now) != 0) {
      fail(std::strerror(errno));
    }
#ifdef __APPLE__
    auto changed = now.st_mtimespec;
#else
    auto changed = now.st_mtim;
#endif
    if (now.st_size != size_ || changed.tv_sec != seconds_ || changed.tv_nsec != nanoseconds_) {
      fail("the file changed since it was opened");
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("[load] Unable to read from " + label() + ": " + what);
  }

  int file_;
  std::string path_;
  int64_t size_;
  int64_t seconds_;
  int64_t nanoseconds_;
  size_t place_{0};
};
} // namespace

extern "C" int mlxrs_lazy_tensors(
    mlx_map_string_to_array* res,
    int file,
    const char* path,
    int64_t size,
    int64_t seconds,
    int64_t nanoseconds) {
  try {
    auto reader = std::make_shared<FileReader>(file, path, size, seconds, nanoseconds);
    // As MLX does for a path: Metal cannot read.
    mx::StreamOrDevice stream{};
    if (!mx::cu::is_available()) {
      stream = mx::default_stream(mx::Device::cpu);
    }
    mlx_map_string_to_array_set_(*res, mx::load_safetensors(std::move(reader), stream).first);
    return 0;
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}

extern "C" const char* mlxrs_mlx_version(void) {
  return mx::version();
}
