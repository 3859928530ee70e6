// diffkern._C: importing it registers the schemas and the CPU ops.
#include <pybind11/pybind11.h>

#include <string>

#include "../core/args.h"

namespace py = pybind11;

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
        return info;
      },
      "Version, compiler and the instruction set in use (DIFFKERN_ISA forces one).");
  m.def(
      "columns",
      [] {
        py::dict sizes;
        sizes["step"] = static_cast<int>(dk::kColumns);
        sizes["noising"] = static_cast<int>(dk::kNoisingColumns);
        sizes["loss"] = static_cast<int>(dk::kLossColumns);
        return sizes;
      },
      "Columns of the tables that the ops read.");
}
