// diffkern._C: importing it registers the schemas and the CPU ops.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../core/attention.h"
#include "../core/cpu.h"
#include "../core/ordered_sum.h"
#include "../core/randn.h"
#include "../core/step.h"
#include "layout.h"

namespace py = pybind11;

namespace {

py::tuple names(const std::vector<const char*>& list) {
  py::tuple tuple(list.size());
  size_t i = 0;
  for (const char* name : list) tuple[i++] = name;
  return tuple;
}

py::dict layout() {
  py::dict columns;
  for (const dk::bind::Table& table : dk::bind::tables()) columns[table.op] = names(table.columns);
  py::dict dtypes;
#define DK_NUMBER(NAME, TYPE, TORCH) dtypes[#TORCH] = static_cast<int>(dk::Dtype::NAME);
  DK_STORED_DTYPES(DK_NUMBER)
#undef DK_NUMBER
  py::list levels;
  for (int level = 0; dk::cpu::isa_level(level) != nullptr; ++level) levels.append(dk::cpu::isa_level(level));
  py::dict found;
  found["columns"] = columns;
  found["ordered_sum"] = py::dict(py::arg("block") = dk::kSumBlock, py::arg("lanes") = dk::kSumLanes);
  found["dtypes"] = dtypes;
  found["isa"] = py::tuple(levels);
  found["max_dims"] = dk::kMaxDims;
  found["histories"] = dk::kHistories;
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "diffkern's CPU kernels; the ops are torch.ops.diffkern.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = DIFFKERN_VERSION;
        info["compiler"] = DIFFKERN_COMPILER;
        info["build_type"] = DIFFKERN_BUILD_TYPE;
        info["isa"] = std::string(dk::cpu::isa_name());
        info["isa_best"] = std::string(dk::cpu::isa_best());
        py::dict attention;
        attention["float32"] = std::string(dk::cpu::attention_kernel(dk::Dtype::f32));
        attention["bfloat16"] = std::string(dk::cpu::attention_kernel(dk::Dtype::bf16));
        attention["float16"] = std::string(dk::cpu::attention_kernel(dk::Dtype::f16));
        attention["float64"] = std::string(dk::cpu::attention_kernel(dk::Dtype::f64));
        info["attention"] = attention;
        return info;
      },
      "Version, compiler and the code in use (DIFFKERN_ISA forces an instruction set).");
  m.def(
      "normals",
      [](uint64_t seed, uint64_t stream, uint64_t quad, int64_t quads) {
        if (quads < 0 || quads > (int64_t{1} << 24)) throw py::value_error("quads must be in [0, 2^24]");
        std::string bytes(static_cast<size_t>(quads) * 4 * sizeof(float), '\0');
        dk::cpu::normals(seed, stream, quad, quads, reinterpret_cast<float*>(bytes.data()));
        return py::bytes(bytes);
      },
      py::arg("seed"), py::arg("stream"), py::arg("quad"), py::arg("quads"),
      "Float32 normals of quads quad, quad + 1, ...: known answers at counters that no tensor reaches.");
  m.def(
      "attention_gemm_rate",
      [](const std::string& name, double seconds) {
        if (name != "float32" && name != "bfloat16" && name != "float16") {
          throw py::value_error("dtype must be one of float32, bfloat16, float16, got '" + name + "'");
        }
        const dk::Dtype dtype = name == "float32"    ? dk::Dtype::f32
                                : name == "bfloat16" ? dk::Dtype::bf16
                                                     : dk::Dtype::f16;
        return dk::cpu::attention_gemm_rate(dtype, seconds);
      },
      py::arg("dtype"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "GFLOP/s of the matrix products that attention is made of, one thread, operands in the L1 cache.");
  m.def(
      "layout", layout,
      "What the kernels' arguments look like: the columns of the tables by op, the order of sums (block, lanes), the\n"
      "numbers of the dtypes, the instruction sets that DIFFKERN_ISA knows, the least first.");
}
