// Where PyO3 meets nanobind: takes and gives `mlx.core.array` objects without copying their data.
// Called with the GIL held. No exception leaves this file.
#include <nanobind/nanobind.h>

#include "mlx/mlx.h"

namespace nb = nanobind;
using mlx::core::array;

// Joins the nanobind domain of mlx.core, which must have been imported; false with a Python error set on failure.
extern "C" bool mlxrs_bridge_register(PyObject* module) {
  return nb::register_module(module);
}

// The C++ array inside `object`, owned by it; null if it is no `mlx.core.array`.
extern "C" array* mlxrs_bridge_peek(PyObject* object) {
  nb::handle handle{object};
  return nb::isinstance<array>(handle) ? nb::inst_ptr<array>(handle) : nullptr;
}

// A new `mlx.core.array` that takes over the array behind `owned`; null with a Python error set on failure.
extern "C" PyObject* mlxrs_bridge_wrap(array* owned) {
  try {
    PyObject* object = nb::cast(std::move(*owned)).release().ptr();
    delete owned;
    return object;
  } catch (nb::python_error& e) {
    e.restore();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  delete owned;
  return nullptr;
}
