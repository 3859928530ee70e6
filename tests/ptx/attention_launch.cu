// The attention launchers behind C functions of flat words, so that no other language has to know the layout of the
// arguments. The order of the words is that of attention_harness.py.
#include <core/attention.h>

namespace {

// Reads words one after the other.
struct Words {
  const int64_t* next;

  void* pointer() { return reinterpret_cast<void*>(*next++); }
  dk::HeadsView view() {
    dk::HeadsView v{};
    v.data = pointer();
    for (int64_t* stride : {&v.batch, &v.head, &v.token, &v.channel}) *stride = *next++;
    return v;
  }
  dk::AttentionProblem problem(double scale) {
    dk::AttentionProblem p{};
    p.dtype = static_cast<dk::Dtype>(*next++);
    for (int64_t* size : {&p.batch, &p.heads, &p.queries, &p.keys, &p.dim}) *size = *next++;
    p.scale = scale;
    for (dk::HeadsView* v : {&p.q, &p.k, &p.v}) *v = view();
    return p;
  }
};

dk::AttentionArgs forward(const int64_t* words, double scale) {
  Words w{words};
  dk::AttentionArgs a{};
  a.problem = w.problem(scale);
  a.out = w.view();
  a.lse = w.pointer();
  a.workspace = w.pointer();
  return a;
}

dk::AttentionGradArgs backward(const int64_t* words, double scale) {
  Words w{words};
  dk::AttentionGradArgs a{};
  a.problem = w.problem(scale);
  for (dk::HeadsView* v : {&a.out, &a.grad_out}) *v = w.view();
  a.lse = w.pointer();
  for (dk::HeadsView* v : {&a.dq, &a.dk, &a.dv}) *v = w.view();
  a.workspace = w.pointer();
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  a.capability = 10 * major + minor;
  return a;
}

}  // namespace

extern "C" {

int dk_attention(const int64_t* words, double scale) { return dk::cuda::attention(forward(words, scale), nullptr); }
int64_t dk_attention_workspace(const int64_t* words, double scale) {
  return dk::cuda::attention_workspace(forward(words, scale).problem);
}
const char* dk_attention_limit(const int64_t* words, double scale, int capability) {
  return dk::cuda::attention_limit(forward(words, scale).problem, capability);
}

int dk_attention_grad(const int64_t* words, double scale) {
  return dk::cuda::attention_grad(backward(words, scale), nullptr);
}
int64_t dk_attention_grad_workspace(const int64_t* words, double scale) {
  return dk::cuda::attention_grad_workspace(backward(words, scale).problem);
}
const char* dk_attention_grad_limit(const int64_t* words, double scale, int capability) {
  return dk::cuda::attention_grad_limit(backward(words, scale).problem, capability);
}
}
