#include "attention_f64.h"

#include <limits>

namespace dk::cpu {
namespace {

struct Head {
  const double* data;
  int64_t token, channel;
  Head(const HeadsView& v, int64_t b, int64_t h)
      : data(static_cast<const double*>(v.data) + b * v.batch + h * v.head), token(v.token), channel(v.channel) {}
  double at(int64_t i, int64_t c) const { return data[i * token + c * channel]; }
};

// One query against all keys, kKeys of them at a time.
void query(const AttentionProblem& p, const Head& q, const Head& k, const Head& v, int64_t i, double* out,
           int64_t out_channel, double* lse) {
  constexpr int64_t kKeys = 64;
  double logits[kKeys], sums[kLargeHeadDim] = {}, sum = 0.0, maximum = -std::numeric_limits<double>::infinity();
  for (int64_t first = 0; first < p.keys; first += kKeys) {
    const int64_t keys = std::min(kKeys, p.keys - first);
    double top = maximum;
    for (int64_t j = 0; j < keys; ++j) {
      double dot = 0.0;
      for (int64_t c = 0; c < p.dim; ++c) dot += q.at(i, c) * k.at(first + j, c);
      logits[j] = dot * p.scale;
      top = std::max(top, logits[j]);
    }
    double base;
    const double factor = softmax_advance(DoublePowers{}, maximum, top, base);
    sum *= factor;
    for (int64_t c = 0; c < p.dim; ++c) sums[c] *= factor;
    for (int64_t j = 0; j < keys; ++j) {
      const double weight = softmax_weight(DoublePowers{}, logits[j], base);
      sum += weight;
      for (int64_t c = 0; c < p.dim; ++c) sums[c] += weight * v.at(first + j, c);
    }
  }
  for (int64_t c = 0; c < p.dim; ++c) out[c * out_channel] = sums[c] / sum;
  *lse = maximum + std::log(sum);
}

}  // namespace

void attention_f64(const AttentionArgs& args, int64_t begin, int64_t end, int64_t tile) {
  const AttentionProblem& p = args.problem;
  const int64_t tiles = (p.queries + tile - 1) / tile;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / tiles, b = head / p.heads, h = head % p.heads;
    const Head q(p.q, b, h), k(p.k, b, h), v(p.v, b, h);
    double* out = static_cast<double*>(args.out.data) + b * args.out.batch + h * args.out.head;
    const int64_t first = task % tiles * tile;
    for (int64_t i = first; i < std::min(first + tile, p.queries); ++i) {
      query(p, q, k, v, i, out + i * args.out.token, args.out.channel,
            static_cast<double*>(args.lse) + head * p.queries + i);
    }
  }
}

}  // namespace dk::cpu
