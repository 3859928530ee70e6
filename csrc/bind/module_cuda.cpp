// diffkern._cuda: importing it registers the CUDA ops.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "diffkern's CUDA kernels; the ops are torch.ops.diffkern.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = DIFFKERN_VERSION;
        info["cuda_version"] = DIFFKERN_CUDA_VERSION;
        info["cuda_archs"] = DIFFKERN_CUDA_ARCHS;
        return info;
      },
      "Version, CUDA toolkit and architectures of this build.");
}
