#include "plain_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <string>
#include <vector>

#include "op_list.h"

namespace fastcam {
namespace {

// What is known of a call so far.
struct Call {
  bool plain = true;
  const bool grad = c10::GradMode::is_enabled();
  std::optional<at::ScalarType> dtype;  // of its floating tensors; the first tensor of every op is one

  bool require(bool condition) { return plain = plain && condition; }
};

// torch.Tensor and torch.nn.Parameter; a subclass may mean anything.
bool is_exact_tensor(PyObject* object) {
  const auto type = [](const char* module, const char* name) {
    return pybind11::object(pybind11::module_::import(module).attr(name)).release().ptr();
  };
  static PyObject *const tensor = type("torch", "Tensor"), *const parameter = type("torch.nn", "Parameter");
  auto* found = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return found == tensor || found == parameter;
}

bool is_plain(const Tensor& x, Call& call) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet plain({Key::CPU, Key::AutogradCPU, Key::ADInplaceOrView, Key::AutocastCPU});
  if (!plain.has_all(x.key_set()) || (call.grad && x.requires_grad())) return false;
  const auto dtype = x.scalar_type();
  if (dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) {
    if (call.dtype.value_or(dtype) != dtype) return false;
    call.dtype = dtype;
  }
  if (!call.dtype) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.stride(d) == 0 && x.size(d) > 1) return false;
  }
  return true;
}

// An argument as the op takes it; of a call that is not plain, anything.
template <typename T>
struct Argument;

template <>
struct Argument<const Tensor&> {
  Tensor value;
  Argument(PyObject* object, Call& call) {
    pybind11::detail::type_caster<Tensor> caster;
    if (!call.require(is_exact_tensor(object) && caster.load(object, false))) return;
    value = std::move(static_cast<Tensor&>(caster));
    call.require(is_plain(value, call));
  }
};

template <>
struct Argument<const Maybe&> {
  Maybe value;
  Argument(PyObject* object, Call& call) {
    if (object != Py_None) value = Argument<const Tensor&>(object, call).value;
  }
};

template <>
struct Argument<bool> {
  bool value;
  Argument(PyObject* object, Call& call) : value(object == Py_True) { call.require(PyBool_Check(object)); }
};

template <>
struct Argument<int64_t> {
  int64_t value = 0;
  Argument(PyObject* object, Call& call) {
    if (!call.require(PyLong_CheckExact(object))) return;
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(object, &overflow);
    call.require(overflow == 0);
  }
};

template <>
struct Argument<std::optional<int64_t>> {
  std::optional<int64_t> value;
  Argument(PyObject* object, Call& call) {
    if (object != Py_None) value = Argument<int64_t>(object, call).value;
  }
};

// Finite and not negative, as every op takes it.
template <>
struct Argument<double> {
  double value = 0;
  Argument(PyObject* object, Call& call) {
    if (!call.require(PyFloat_CheckExact(object))) return;
    value = PyFloat_AS_DOUBLE(object);
    call.require(std::isfinite(value) && value >= 0);
  }
};

template <>
struct Argument<Name> {
  Name value;
  Argument(PyObject* object, Call& call) {
    if (!call.require(PyUnicode_CheckExact(object) && PyUnicode_IS_COMPACT_ASCII(object))) return;
    value = {static_cast<const char*>(PyUnicode_DATA(object)), static_cast<size_t>(PyUnicode_GET_LENGTH(object))};
  }
};

// Lists and tuples of E, made of arguments T.
template <typename T, typename E, typename REF>
struct Elements {
  std::vector<E> held;
  REF value;
  Elements(PyObject* object, Call& call) {
    if (object == Py_None || !call.require(PyTuple_CheckExact(object) || PyList_CheckExact(object))) return;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
      held.push_back(Argument<T>(PySequence_Fast_GET_ITEM(object, i), call).value);
    }
    value = held;
  }
};

template <>
struct Argument<Numbers> : Elements<double, double, Numbers> {
  using Elements::Elements;
};

template <>
struct Argument<at::OptionalSymIntArrayRef> : Elements<int64_t, c10::SymInt, at::OptionalSymIntArrayRef> {
  using Elements::Elements;
};

PyObject* wrapped(const Tensor& x) {
  return pybind11::detail::type_caster<Tensor>::cast(x, pybind11::return_value_policy::move, {}).ptr();
}

template <typename... T>
PyObject* wrapped(const std::tuple<T...>& x) {
  PyObject* const found = PyTuple_New(sizeof...(T));
  Py_ssize_t i = 0;
  std::apply([&](const T&... each) { (PyTuple_SET_ITEM(found, i++, wrapped(each)), ...); }, x);
  return found;
}

// Whether this thread is under no mode of dispatch or of torch functions, transform or tracer.
bool in_plain_mode() {
  const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  return (keys - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled();
}

template <typename Signature>
struct Plain;

template <typename R, typename... A>
struct Plain<R(A...)> {
  static c10::TypedOperatorHandle<R(A...)> find(const std::string& name) {
    const size_t dot = name.find('.');
    const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
    auto& dispatcher = c10::Dispatcher::singleton();
    return dispatcher.findSchemaOrThrow(("fastcam::" + name.substr(0, dot)).c_str(), overload.c_str()).template typed<R(A...)>();
  }

  template <size_t... I>
  static PyObject* result(const c10::TypedOperatorHandle<R(A...)>& op, PyObject* const* given, std::index_sequence<I...>) {
    Call call;
    const std::tuple<Argument<A>...> arguments{Argument<A>(given[I], call)...};  // in order
    if (!call.plain) return nullptr;
    const R found = [&] {
      const pybind11::gil_scoped_release others_run;
      return op.call(std::get<I>(arguments).value...);
    }();
    return wrapped(found);
  }

  template <const char* NAME>
  static PyObject* run(PyObject*, PyObject* const* given, Py_ssize_t count) {
    try {
      static const auto op = find(NAME);
      if (count == sizeof...(A) && in_plain_mode()) {
        if (PyObject* const found = result(op, given, std::index_sequence_for<A...>())) return found;
      }
    } catch (...) {
      PyErr_Clear();
    }
    Py_RETURN_NOTIMPLEMENTED;
  }
};

// Through a function without arguments, for which compilers allow any cast.
PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

#define FASTCAM_NAME(NAME, FUNCTION, RESULT, ARGUMENTS) constexpr char FUNCTION##_name[] = NAME;
#define FASTCAM_METHOD(NAME, FUNCTION, RESULT, ARGUMENTS) \
  {#FUNCTION, as_method(&Plain<RESULT ARGUMENTS>::run<FUNCTION##_name>), METH_FASTCALL, nullptr},

FASTCAM_OPS(FASTCAM_NAME)

}  // namespace

PyMethodDef* plain_calls() {
  static PyMethodDef methods[] = {FASTCAM_OPS(FASTCAM_METHOD) {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace fastcam
