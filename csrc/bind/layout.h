// What diffkern._C.layout() says of the ops, between the files that see torch and the one that sees pybind11.
#pragma once

#include <vector>

namespace dk::bind {

struct Table {
  const char* op;
  std::vector<const char*> columns;
};

std::vector<Table> tables();  // of all ops that read one

}  // namespace dk::bind
