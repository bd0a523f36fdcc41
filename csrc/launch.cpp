// Launches cubins through libcuda, which is opened at run time: building needs no CUDA, and a machine without a GPU
// loads the module all the same. Arguments are plain numbers, in the kernel's order, packed by a string of kinds:
//   P  pointer that must be 16-byte aligned      i  32-bit integer     D  one that 16 must divide
//   p  any pointer                               l  64-bit integer     f  fp32
//   T  address of a 128-byte tensor map, passed by value
// A launch whose arguments do not keep to that answers False and launches nothing.
#define PY_SSIZE_T_CLEAN
#include "launch.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>

namespace clinfast {
namespace {

using Result = int;
constexpr int kMaxArguments = 48, kMapBytes = 128, kMaxMaps = 4;
constexpr int kInvalidContext = 201, kMaxDynamicShared = 8;
constexpr unsigned kDefaultShared = 48 << 10;

struct Driver {
  void *library = nullptr;
  Result (*init)(unsigned);
  Result (*get_error_name)(Result, const char **);
  Result (*device_get)(int *, int);
  Result (*primary_retain)(void **, int);
  Result (*context_get)(void **);
  Result (*context_set)(void *);
  Result (*module_load)(void **, const void *);
  Result (*module_function)(void **, void *, const char *);
  Result (*function_set)(void *, int, int);
  Result (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                   void **);
  Result (*encode)(void *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *,
                   const uint32_t *, int, int, int, int);
};

Driver driver;

struct Kernel {
  void *function;
  std::string kinds;
  unsigned threads, shared;
  int device;
};

// A deque: addresses stay while others are added.
std::deque<Kernel> loaded;
std::mutex loading;

PyObject *fail(const char *what, Result result) {
  const char *name = nullptr;
  if (driver.get_error_name) driver.get_error_name(result, &name);
  PyErr_Format(PyExc_RuntimeError, "%s failed: %s (%d)", what, name ? name : "unknown error", result);
  return nullptr;
}

// torch makes the context of its device current in a thread only once it has worked there.
Result enter(int device) {
  void *context = nullptr;
  Result result = driver.context_get(&context);
  if (result == 0 && context) return 0;
  int handle = 0;
  if ((result = driver.device_get(&handle, device))) return result;
  if ((result = driver.primary_retain(&context, handle))) return result;
  return driver.context_set(context);
}

PyObject *open_driver(PyObject *, PyObject *path) {
  const char *name = PyUnicode_AsUTF8(path);
  if (!name) return nullptr;
  if (driver.library) Py_RETURN_NONE;
  void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) return PyUnicode_FromString(dlerror());
  struct {
    const char *symbol;
    void **slot;
    bool required;
  } symbols[] = {
      {"cuInit", reinterpret_cast<void **>(&driver.init), true},
      {"cuGetErrorName", reinterpret_cast<void **>(&driver.get_error_name), false},
      {"cuDeviceGet", reinterpret_cast<void **>(&driver.device_get), true},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void **>(&driver.primary_retain), true},
      {"cuCtxGetCurrent", reinterpret_cast<void **>(&driver.context_get), true},
      {"cuCtxSetCurrent", reinterpret_cast<void **>(&driver.context_set), true},
      {"cuModuleLoadData", reinterpret_cast<void **>(&driver.module_load), true},
      {"cuModuleGetFunction", reinterpret_cast<void **>(&driver.module_function), true},
      {"cuFuncSetAttribute", reinterpret_cast<void **>(&driver.function_set), true},
      {"cuLaunchKernel", reinterpret_cast<void **>(&driver.launch), true},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void **>(&driver.encode), false},
  };
  for (auto &entry : symbols) {
    *entry.slot = dlsym(library, entry.symbol);
    if (!*entry.slot && entry.required) {
      std::string text = std::string(name) + " lacks " + entry.symbol;
      dlclose(library);
      return PyUnicode_FromString(text.c_str());
    }
  }
  if (Result result = driver.init(0)) {
    std::string text = std::string("cuInit of ") + name + " answered " + std::to_string(result);
    dlclose(library);
    return PyUnicode_FromString(text.c_str());
  }
  driver.library = library;
  Py_RETURN_NONE;
}

bool is_open() {
  if (!driver.library) PyErr_SetString(PyExc_RuntimeError, "open_driver was not called, or failed");
  return driver.library != nullptr;
}

PyObject *load_kernel(PyObject *, PyObject *args) {
  const char *cubin, *entry, *kinds;
  Py_ssize_t size;
  unsigned shared, warps;
  int device;
  if (!PyArg_ParseTuple(args, "y#ssIIi", &cubin, &size, &entry, &kinds, &shared, &warps, &device) || !is_open())
    return nullptr;
  size_t maps = 0;
  for (const char *kind = kinds; *kind; kind++) {
    maps += *kind == 'T';
    if (!strchr("PpiDlfT", *kind)) return PyErr_Format(PyExc_ValueError, "the kind %c is unknown", *kind);
  }
  if (strlen(kinds) + 2 > kMaxArguments || maps > kMaxMaps)
    return PyErr_Format(PyExc_ValueError, "%s has too many arguments", entry);
  void *module = nullptr, *function = nullptr;
  if (Result result = enter(device)) return fail("entering the device's context", result);
  if (Result result = driver.module_load(&module, cubin)) return fail("cuModuleLoadData", result);
  if (Result result = driver.module_function(&function, module, entry)) return fail("cuModuleGetFunction", result);
  if (shared > kDefaultShared)
    if (Result result = driver.function_set(function, kMaxDynamicShared, int(shared)))
      return fail("cuFuncSetAttribute for shared memory", result);
  const std::lock_guard<std::mutex> hold(loading);
  loaded.push_back({function, kinds, 32 * warps, shared, device});
  return PyLong_FromVoidPtr(&loaded.back());
}

// launch_kernel(handle, stream, grid x, y, z, *arguments) -> bool
PyObject *launch_kernel(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count < 5) return PyErr_Format(PyExc_TypeError, "launch_kernel takes a handle, a stream and a grid");
  const auto *kernel = static_cast<const Kernel *>(PyLong_AsVoidPtr(args[0]));
  void *stream = PyLong_AsVoidPtr(args[1]);
  unsigned grid[3];
  for (int i = 0; i < 3; i++) grid[i] = unsigned(PyLong_AsUnsignedLong(args[2 + i]));
  if (PyErr_Occurred()) return nullptr;
  const Py_ssize_t given = count - 5, expected = Py_ssize_t(kernel->kinds.size());
  if (given != expected)
    return PyErr_Format(PyExc_TypeError, "the kernel takes %zd arguments, not %zd", expected, given);

  // Values, then the two scratch pointers that Triton's kernels end in and that ours do not use.
  uint64_t values[kMaxArguments] = {};
  alignas(64) unsigned char maps[kMaxMaps][kMapBytes];
  void *pointers[kMaxArguments];
  int used_maps = 0;
  bool fits = true;
  for (Py_ssize_t i = 0; i < given; i++) {
    PyObject *value = args[5 + i];
    pointers[i] = &values[i];
    const char kind = kernel->kinds[size_t(i)];
    if (kind == 'f') {
      const float number = float(PyFloat_AsDouble(value));
      memcpy(&values[i], &number, sizeof number);
    } else if (kind == 'P' || kind == 'p') {
      values[i] = PyLong_AsUnsignedLongLong(value);
      fits &= kind == 'p' || values[i] % 16 == 0;
    } else if (kind == 'T') {
      const void *map = PyLong_AsVoidPtr(value);
      if (!map) return PyErr_Format(PyExc_ValueError, "argument %zd is no tensor map", i);
      memcpy(maps[used_maps], map, kMapBytes);
      pointers[i] = maps[used_maps++];
    } else {
      const long long number = PyLong_AsLongLong(value);
      fits &= kind == 'l' || (number >= INT32_MIN && number <= INT32_MAX);
      fits &= kind != 'D' || number % 16 == 0;
      memcpy(&values[i], &number, sizeof number);
    }
  }
  if (PyErr_Occurred()) return nullptr;
  if (!fits) Py_RETURN_FALSE;
  pointers[given] = &values[given];
  pointers[given + 1] = &values[given + 1];

  Result result;
  Py_BEGIN_ALLOW_THREADS;
  result = driver.launch(kernel->function, grid[0], grid[1], grid[2], kernel->threads, 1, 1, kernel->shared, stream,
                         pointers, nullptr);
  if (result == kInvalidContext && (result = enter(kernel->device)) == 0)
    result = driver.launch(kernel->function, grid[0], grid[1], grid[2], kernel->threads, 1, 1, kernel->shared, stream,
                           pointers, nullptr);
  Py_END_ALLOW_THREADS;
  if (result) return fail("cuLaunchKernel", result);
  Py_RETURN_TRUE;
}

// encode_tensor_map(to, element type, base, rows, columns, row bytes, box rows, box columns, swizzle)
PyObject *encode_tensor_map(PyObject *, PyObject *args) {
  unsigned long long to, base, rows, columns, row_bytes;
  unsigned box_rows, box_columns;
  int type, swizzle;
  if (!PyArg_ParseTuple(args, "KiKKKKIIi", &to, &type, &base, &rows, &columns, &row_bytes, &box_rows, &box_columns,
                        &swizzle) ||
      !is_open())
    return nullptr;
  if (!driver.encode) return PyErr_Format(PyExc_RuntimeError, "this driver has no cuTensorMapEncodeTiled");
  // The fastest dimension comes first; its stride is the element.
  const uint64_t shape[2] = {columns, rows}, strides[1] = {row_bytes};
  const uint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  constexpr int kNoInterleave = 0, kPromoteTo128Bytes = 2, kZerosOutside = 0;
  if (Result result = driver.encode(reinterpret_cast<void *>(to), type, 2, reinterpret_cast<void *>(base), shape,
                                    strides, box, steps, kNoInterleave, swizzle, kPromoteTo128Bytes, kZerosOutside))
    return fail("cuTensorMapEncodeTiled", result);
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef launch_methods[] = {
    {"open_driver", open_driver, METH_O, "open_driver(path) -> why libcuda does not open, or None"},
    {"load_kernel", load_kernel, METH_VARARGS,
     "load_kernel(cubin, entry, kinds, shared bytes, warps, device) -> handle"},
    {"launch_kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch_kernel)), METH_FASTCALL,
     "launch_kernel(handle, stream, x, y, z, *arguments) -> whether the arguments suited the kernel"},
    {"encode_tensor_map", encode_tensor_map, METH_VARARGS,
     "encode_tensor_map(to, type, base, rows, columns, row bytes, box rows, box columns, swizzle)"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace clinfast
