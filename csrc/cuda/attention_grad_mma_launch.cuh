// Launches of the backward attention kernels of one dtype.
#pragma once

#include "attention_grad_mma.cuh"

namespace dk::cuda::grad {

template <class S, int kDim, bool kRowsByToken, bool kColumnsByToken, Role role>
int launch_role(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  using C = Config<kDim, role>;
  const AttentionProblem& problem = args.problem;
  constexpr bool by_query = C::kByQuery;
  constexpr bool queries_by_token = by_query ? kRowsByToken : kColumnsByToken;
  constexpr bool keys_by_token = by_query ? kColumnsByToken : kRowsByToken;
  const auto of_queries = [&](const HeadsView& v) { return operand(v, queries_by_token, problem, problem.queries); };
  const auto of_keys = [&](const HeadsView& v) { return operand(v, keys_by_token, problem, problem.keys); };
  Params p{};
  Operand(&queries)[2] = by_query ? p.x : p.y, (&keys)[2] = by_query ? p.y : p.x;
  queries[0] = of_queries(problem.q), queries[1] = of_queries(args.grad_out);
  keys[0] = of_keys(problem.k), keys[1] = of_keys(problem.v);
  if constexpr (by_query) {
    p.out[0] = of_queries(args.dq);
  } else {
    p.out[0] = of_keys(C::kWithDp ? args.dk : args.dv), p.out[1] = of_keys(args.dv);
  }
  p.terms = terms;
  p.rows = by_query ? problem.queries : problem.keys;
  p.columns = by_query ? problem.keys : problem.queries;
  p.run = query_run(problem.queries);
  const int64_t tiles = (p.rows + C::kRows - 1) / C::kRows;
  p.dim = static_cast<int>(problem.dim);
  p.stream = p.y[0].matrix.reach == Reach::chunks && p.y[1].matrix.reach == Reach::chunks;
  p.log2_scale = static_cast<float>(problem.scale * kLog2E);
  p.scale = static_cast<float>(attention_grad_scale(problem));
  const int64_t blocks = tiles * problem.batch * problem.heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  p.heads = static_cast<unsigned>(problem.heads), p.tiles = static_cast<unsigned>(tiles);

  const auto function = reinterpret_cast<const void*>(kernel<S, kDim, kRowsByToken, kColumnsByToken, role>);
  const size_t bytes = static_cast<size_t>(C::shared_bytes(args.capability >= 80));
  cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) {
    void* arguments[] = {&p};
    status = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, bytes, stream);
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// The sums of both dk and dv for more than 128 channels do not fit in registers at once.
template <class S, int kDim, bool kQueriesByToken, bool kKeysByToken>
int launch_roles(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  int status = launch_role<S, kDim, kQueriesByToken, kKeysByToken, Role::dq>(args, terms, stream);
  if (status != cudaSuccess) return status;
  if constexpr (kDim <= 128) {
    return launch_role<S, kDim, kKeysByToken, kQueriesByToken, Role::dk_dv>(args, terms, stream);
  } else {
    status = launch_role<S, kDim, kKeysByToken, kQueriesByToken, Role::dk>(args, terms, stream);
    if (status != cudaSuccess) return status;
    return launch_role<S, kDim, kKeysByToken, kQueriesByToken, Role::dv>(args, terms, stream);
  }
}

// The order of q and the order of k; where grad_out or v has another one, it is transposed on its way into shared
// memory.
template <class S, int kDim>
int launch_orders(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  const bool queries_by_token = args.problem.q.channel != 1, keys_by_token = args.problem.k.channel != 1;
  const auto function = queries_by_token
                            ? keys_by_token ? launch_roles<S, kDim, true, true> : launch_roles<S, kDim, true, false>
                        : keys_by_token ? launch_roles<S, kDim, false, true>
                                        : launch_roles<S, kDim, false, false>;
  return function(args, terms, stream);
}

template <class S>
int launch(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream) {
  const int64_t dim = args.problem.dim;
  if (dim <= 64) return launch_orders<S, 64>(args, terms, stream);
  if (dim <= 128) return launch_orders<S, 128>(args, terms, stream);
  if (dim <= 256) return launch_orders<S, 256>(args, terms, stream);
  if (dim <= 512) return launch_orders<S, 512>(args, terms, stream);
  return cudaErrorNotSupported;
}

}  // namespace dk::cuda::grad
