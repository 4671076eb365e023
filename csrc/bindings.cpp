// fastcam._C: facts about this build, hashes of weights, outlines of models, and a short way from Python to the ops,
// which are registered with the dispatcher.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "cpu/fingerprint.h"
#include "cpu/leaf.h"
#include "cpu/result_memory.h"
#include "modules.h"
#include "plain_calls.h"

namespace py = pybind11;
using fastcam::cpu::Isa;

namespace {

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default"; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= fastcam::cpu::widest_isa()) names.emplace_back(isa_name(isa));
  }
  return names;
}

std::map<std::string, std::vector<std::string>> compiled_ops() {
  std::map<std::string, std::vector<std::string>> ops = {{"CPU", {}}, {"CUDA", {}}};
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "fastcam") continue;
    const auto op = dispatcher.findOp(name);
    if (!op) continue;
    const std::string base = name.name.substr(name.name.find("::") + 2);
    const std::string full = name.overload_name.empty() ? base : base + "." + name.overload_name;
    for (auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
      if (op->hasKernelForDispatchKey(key)) ops[c10::toString(key)].push_back(full);
    }
  }
  return ops;
}

// How many pieces at::parallel_for cuts work into here: 1 with several threads means this file lost -fopenmp.
int parallel_chunks() {
  std::atomic<int> chunks{0};
  at::parallel_for(0, 1024, 1, [&](int64_t, int64_t) { ++chunks; });
  return chunks;
}

// Taken when the module is loaded, before Python adds launchers to keys that C++ left free.
const auto& ops_at_load() {
  static const auto ops = compiled_ops();
  return ops;
}

// Bytes.
std::map<std::string, size_t> result_pool() {
  const auto pool = fastcam::cpu::result_pool();
  return {{"limit", pool.limit}, {"idle", pool.idle}, {"blocks", pool.blocks}};
}

py::dict build_config() {
  py::dict config;
  config["torch"] = TORCH_VERSION;
#ifdef FASTCAM_WITH_CUDA
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
#if defined(__clang__)
  config["compiler"] = "clang " __clang_version__;
#else
  config["compiler"] = "gcc " __VERSION__;
#endif
  config["cplusplus"] = static_cast<long>(__cplusplus);
  config["isa"] = isa_name(fastcam::cpu::isa());
  config["isas"] = available_isas();
  config["threads"] = at::get_num_threads();
  config["parallel_chunks"] = parallel_chunks();
  config["ops"] = ops_at_load();
  config["result_pool"] = result_pool();
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const char* cap = std::getenv("FASTCAM_CPU_ISA");
  const std::string name = cap == nullptr ? "" : cap;
  if (!name.empty() && name != "default" && name != "avx2" && name != "avx512") {
    throw py::value_error("FASTCAM_CPU_ISA must be default, avx2 or avx512, got '" + name + "'");
  }
  fastcam::cpu::result_pool();  // a bad FASTCAM_RESULT_POOL is an error now, not in the middle of an op
  ops_at_load();
  if (PyModule_AddFunctions(m.ptr(), fastcam::plain_calls()) != 0) throw py::error_already_set();
  m.def("build_config", &build_config, "Compiler, instruction sets, threads, torch version and ops of this build.");
  m.def("result_pool", &result_pool, "Limit of the memory kept for large results, and what of it is idle, in bytes.");
  m.def("fingerprints", &fastcam::cpu::fingerprints, py::call_guard<py::gil_scoped_release>(),
        "64-bit hashes of the bytes at each (address, length), which the caller keeps alive.");
  m.def("outline", &fastcam::outline, "(fingerprint, whether any module is in train mode) of a model, or None.");
}
