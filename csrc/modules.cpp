#include "modules.h"

#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace py = pybind11;

namespace fastcam {
namespace {

class Digest {
 public:
  void add(uint64_t value) {
    state_ = (state_ ^ value) * 0x9e3779b97f4a7c15u;
    state_ ^= state_ >> 29;
  }
  void add(const void* address) { add(reinterpret_cast<uint64_t>(address)); }
  void add_hash(PyObject* value) {
    const Py_hash_t hash = PyObject_Hash(value);
    if (hash == -1 && PyErr_Occurred()) throw py::error_already_set();
    add(Py_TYPE(value));  // 1, 1.0 and True are other settings, and hash alike
    add(static_cast<uint64_t>(hash));
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0x243f6a8885a308d3u;
};

bool contains(py::handle set, PyObject* value) {
  const int found = PySet_Contains(set.ptr(), value);
  if (found < 0) throw py::error_already_set();
  return found == 1;
}

bool derives(PyObject* value, py::handle type) {
  return PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(type.ptr())) != 0;
}

bool derives_of_any(PyObject* value, const py::tuple& types) {
  for (py::handle type : types) {
    if (derives(value, type)) return true;
  }
  return false;
}

// By a name that is made once.
PyObject* item(const py::object& dict, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), name);
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

struct Module {
  py::object self, attributes, parameters, children, hooks, pre_hooks;
};

// Without running Python code, so nobody changes a dictionary meanwhile. False where one is none.
bool collect(py::handle model, std::vector<Module>& found) {
  static PyObject *const parameters = PyUnicode_InternFromString("_parameters"),
                  *const children = PyUnicode_InternFromString("_modules"),
                  *const hooks = PyUnicode_InternFromString("_forward_hooks"),
                  *const pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
  std::unordered_set<PyObject*> seen = {model.ptr()};
  std::vector<PyObject*> queue = {model.ptr()};
  for (size_t i = 0; i < queue.size(); ++i) {
    Module module;
    module.self = py::reinterpret_borrow<py::object>(queue[i]);
    module.attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(queue[i], nullptr));
    if (!module.attributes) throw py::error_already_set();
    const auto part = [&](PyObject* name) { return py::reinterpret_borrow<py::object>(item(module.attributes, name)); };
    module.parameters = part(parameters);
    module.children = part(children);
    module.hooks = part(hooks);
    module.pre_hooks = part(pre_hooks);
    for (const py::object* each : {&module.parameters, &module.children, &module.hooks, &module.pre_hooks}) {
      if (!*each || !PyDict_Check(each->ptr())) return false;
    }
    Py_ssize_t at = 0;
    PyObject *name, *child;
    while (PyDict_Next(module.children.ptr(), &at, &name, &child)) {
      if (child != Py_None && seen.insert(child).second) queue.push_back(child);
    }
    found.push_back(std::move(module));
  }
  return true;
}

// The module's token; `make` runs Python code where there is none yet.
py::object token_of(PyObject* module, py::handle make, const py::dict& known) {
  const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(module));
  PyObject* entry = PyDict_GetItemWithError(known.ptr(), id.ptr());
  if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (entry != nullptr) {
    const auto kept = py::reinterpret_borrow<py::tuple>(entry);
    const py::object reference = kept[0], number = kept[1];
    if (reference().is(py::handle(module))) return number;
  }
  return make(py::handle(module));
}

}  // namespace

py::object outline(py::handle model, py::handle token, py::dict tokens, py::frozenset bookkeeping,
                   py::frozenset scalars, py::tuple plain, py::handle tensor) {
  std::vector<Module> modules;
  if (!collect(model, modules)) return py::none();
  std::unordered_map<PyObject*, uint64_t> numbers;
  for (const Module& module : modules) {
    numbers[module.self.ptr()] = token_of(module.self.ptr(), token, tokens).cast<uint64_t>();
  }
  Digest digest;
  static PyObject* const training_name = PyUnicode_InternFromString("training");
  bool training = false;
  const auto add_value = [&](PyObject* value) {
    if (contains(scalars, reinterpret_cast<PyObject*>(Py_TYPE(value)))) digest.add_hash(value);
    else digest.add(value);
  };
  for (const Module& module : modules) {
    digest.add(numbers.at(module.self.ptr()));
    digest.add(Py_TYPE(module.self.ptr()));
    digest.add(uint64_t{PyDict_Size(module.hooks.ptr()) > 0 || PyDict_Size(module.pre_hooks.ptr()) > 0});
    Py_ssize_t at = 0;
    PyObject *key, *value;
    while (PyDict_Next(module.attributes.ptr(), &at, &key, &value)) {
      if (contains(bookkeeping, key)) continue;
      if (contains(scalars, reinterpret_cast<PyObject*>(Py_TYPE(value)))) {
        digest.add_hash(key);
        digest.add_hash(value);
      } else if (PyTuple_Check(value) || PyList_Check(value)) {
        digest.add_hash(key);
        const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
        digest.add(static_cast<uint64_t>(count));
        for (Py_ssize_t i = 0; i < count; ++i) add_value(PySequence_Fast_GET_ITEM(value, i));
      } else if (PyCallable_Check(value) || derives(value, tensor)) {
        digest.add_hash(key);
        digest.add(value);
      } else if (derives_of_any(value, plain)) {  // of a class of the user's
        digest.add_hash(key);
        digest.add_hash(value);
      }
    }
    at = 0;
    while (PyDict_Next(module.parameters.ptr(), &at, &key, &value)) {
      digest.add_hash(key);
      digest.add(uint64_t{value == Py_None});
    }
    at = 0;
    while (PyDict_Next(module.children.ptr(), &at, &key, &value)) {
      digest.add_hash(key);
      const auto number = numbers.find(value);  // None has none, nor what was put there since
      digest.add(number == numbers.end() ? ~uint64_t{0} : number->second);
    }
    PyObject* flag = item(module.attributes, training_name);
    training |= flag != nullptr && PyObject_IsTrue(flag) == 1;
  }
  return py::make_tuple(digest.value(), training);
}

}  // namespace fastcam
