// What is not a tensor op: the levels of this build and this machine, and a decoder's pass.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "exchange.h"
#include "huge_pages.h"
#include "levels.h"
#include "scratch_pool.h"

namespace py = pybind11;

namespace llmcore {
void bind_decoder_plan(py::module_& m);
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "llmcore's native kernels; importing it registers torch.ops.llmcore";
  m.attr("BEST_LEVEL") = llmcore::BEST_LEVEL;
  m.attr("COMPILER") = __VERSION__;
  m.attr("CUDA_REASON") = LLMCORE_CUDA_REASON;
  m.def(
      "levels",
      [] {
        py::dict lacks;
        for (int64_t i = 0; i < llmcore::level_count(); ++i) lacks[llmcore::level_name(i)] = llmcore::level_lacks(i);
        return lacks;
      },
      "Each compiled level, worst first, with the instructions this machine lacks for it (empty: it runs).");
  m.def(
      "set_cache_bytes", [](int64_t bytes) { return std::exchange(llmcore::runtime.cache_bytes, bytes); },
      "Results from this size on are stored past the caches; returns what it was. For tests.");
  m.def("release_scratch", llmcore::release_scratch,
        "Give the scratch memory that is kept between calls back to the system.");
  m.def("exchange_seconds", llmcore::exchange_seconds, py::call_guard<py::gil_scoped_release>(),
        "Seconds that a cache line takes from one CPU to another; negative where that cannot be measured.");
  m.def("into_huge_pages", llmcore::into_huge_pages, py::arg("pieces"), py::call_guard<py::gil_scoped_release>(),
        "Move memory, [(address, bytes)], into huge pages where it lies; how many bytes are in such pages then.");
  llmcore::bind_decoder_plan(m);
}
