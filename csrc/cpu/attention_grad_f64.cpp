#include "attention_grad_f64.h"

#include "attention_f64.h"

namespace dk::cpu {
namespace {

struct Head {
  double* data;
  int64_t token, channel;
  Head(const HeadsView& v, int64_t b, int64_t h)
      : data(static_cast<double*>(v.data) + b * v.batch + h * v.head), token(v.token), channel(v.channel) {}
  double& at(int64_t i, int64_t c) const { return data[i * token + c * channel]; }
};

double dot(const Head& a, int64_t i, const Head& b, int64_t j, int64_t dim) {
  constexpr int64_t kChains = 8;
  static_assert(kHeadDimStep % kChains == 0, "no channel is left over");
  double sum[kChains] = {};
  for (int64_t c = 0; c < dim; c += kChains) {
    for (int64_t chain = 0; chain < kChains; ++chain) sum[chain] += a.at(i, c + chain) * b.at(j, c + chain);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// The operands of one head.
struct Operands {
  const AttentionProblem& p;
  Head q, k, v, out, grad, dq, dk, dv;
  const double* lse;
  double* delta;

  Operands(const AttentionGradArgs& a, int64_t head, int64_t b, int64_t h)
      : p(a.problem),
        q(p.q, b, h),
        k(p.k, b, h),
        v(p.v, b, h),
        out(a.out, b, h),
        grad(a.grad_out, b, h),
        dq(a.dq, b, h),
        dk(a.dk, b, h),
        dv(a.dv, b, h),
        lse(static_cast<const double*>(a.lse) + head * p.queries),
        delta(static_cast<double*>(a.workspace) + head * p.queries) {}

  double weight(int64_t i, int64_t j) const {
    return softmax_weight(DoublePowers{}, p.scale * dot(q, i, k, j, p.dim), lse[i]);
  }
  double logit_grad(int64_t i, int64_t j, double weight) const {
    return softmax_gradient(DoublePowers{}, p.scale * weight, dot(grad, i, v, j, p.dim), delta[i]);
  }

  void query(int64_t i) const {
    double sums[kLargeHeadDim] = {};
    delta[i] = dot(grad, i, out, i, p.dim);
    for (int64_t j = 0; j < p.keys; ++j) {
      const double ds = logit_grad(i, j, weight(i, j));
      for (int64_t c = 0; c < p.dim; ++c) sums[c] += ds * k.at(j, c);
    }
    for (int64_t c = 0; c < p.dim; ++c) dq.at(i, c) = sums[c];
  }

  void key(int64_t j) const {
    double sums[2][kLargeHeadDim] = {};
    for (int64_t i = 0; i < p.queries; ++i) {
      const double w = weight(i, j), ds = logit_grad(i, j, w);
      for (int64_t c = 0; c < p.dim; ++c) {
        sums[0][c] += ds * q.at(i, c);
        sums[1][c] += w * grad.at(i, c);
      }
    }
    for (int64_t c = 0; c < p.dim; ++c) {
      dk.at(j, c) = sums[0][c];
      dv.at(j, c) = sums[1][c];
    }
  }
};

}  // namespace

int64_t attention_grad_f64_workspace(const AttentionProblem& p) {
  return p.batch * p.heads * p.queries * static_cast<int64_t>(sizeof(double));
}

int64_t attention_grad_f64_tasks(const AttentionProblem& p, int64_t phase) {
  return p.batch * p.heads * (phase == 0 ? p.queries : p.keys);
}

void attention_grad_f64(const AttentionGradArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const AttentionProblem& p = args.problem;
  const int64_t per_head = phase == 0 ? p.queries : p.keys;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / per_head;
    const Operands operands(args, head, head / p.heads, head % p.heads);
    phase == 0 ? operands.query(task % per_head) : operands.key(task % per_head);
  }
}

}  // namespace dk::cpu
