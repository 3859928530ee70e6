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
      "columns",
      [] {
        py::dict sizes;
        sizes["step"] = static_cast<int>(dk::kColumns);
        sizes["noising"] = static_cast<int>(dk::kNoisingColumns);
        sizes["loss"] = static_cast<int>(dk::kLossColumns);
        sizes["variational"] = static_cast<int>(dk::kBoundColumns);
        return sizes;
      },
      "Columns of the tables that the ops read.");
}
