// attnkern._C: what is not a tensor operator. The only pybind11 file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/plan_registry.h"
#include "core/poison.h"
#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of attnkern; importing it registers them with torch.";
  m.def(
      "build_info",
      [] {
        py::dict info;
#ifdef ATTNKERN_WITH_CUDA
        info["cuda"] = true;
        info["cuda_targets"] = ATTNKERN_CUDA_TARGETS;
#else
        info["cuda"] = false;
        info["cuda_targets"] = "";
#endif
        info["compiler"] = __VERSION__;
        return info;
      },
      "How this extension was built.");
  m.def(
      "cpu_isa", [] { return attnkern::cpu::name(attnkern::cpu::active_isa()); },
      "The instruction set that CPU kernels run with: avx512, avx2 or scalar.");
  m.def(
      "cpu_isas",
      [] {
        py::list names;
        for (const auto isa : attnkern::cpu::supported_isas()) names.append(attnkern::cpu::name(isa));
        return names;
      },
      "The instruction sets this processor supports, best first.");
  m.def(
      "poison_fresh_memory", [](bool poison) { return attnkern::poison_fresh_memory.exchange(poison); },
      py::arg("poison"), "Fill what the CPU kernels allocate with NaN, for tests; returns whether it was so before.");
  m.def(
      "plan",
      [](const std::string& name, const std::map<std::string, int64_t>& query) {
        const auto found = attnkern::plans().find(name);
        if (found == attnkern::plans().end()) throw py::key_error("no plan is named " + name);
        return found->second({query});
      },
      py::arg("name"), py::arg("query"), "The launch plan `name` for the sizes and device in `query`.");
}
