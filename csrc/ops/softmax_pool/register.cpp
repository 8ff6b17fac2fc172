// Tensors -> params.h -> launchers, for the dispatch keys CPU and CUDA.
#include "ops/softmax_pool/params.h"

#include <tuple>

#include "torch/glue.h"

namespace attnkern::softmax_pool {
namespace {

using glue::MaybeTensor;
using glue::Tensor;

constexpr std::array<std::string_view, 4> kScorers{"given", "dot", "additive", "gated"};
constexpr std::array<std::string_view, 3> kActs{"tanh", "relu", "gelu"};

template <class Pointer>
ItemsOf<Pointer> items_of(Pointer data, const Tensor& t) {
  return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Items mutable_items(Tensor& t) { return t.numel() ? items_of<void*>(t.mutable_data_ptr(), t) : Items{}; }

// [B, H, M, ...] contiguous; axes of size 1 broadcast.
ConstRows rows_of(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  const auto stride = [&](int64_t d) { return t->size(d) == 1 ? 0 : t->stride(d); };
  return {t->const_data_ptr(), stride(0), stride(1), stride(2)};
}

struct Call {
  const Tensor& values;
  const MaybeTensor &keys, &query, &scores, &V, &b_V, &U, &b_U, &w, &c, &bias, &offsets;
  std::string_view scorer, act;
  double scale;
};

void fill(Inputs& p, const Call& t) {
  p.dtype = glue::dtype_of(t.values);
  p.scorer = glue::parse<Scorer>(t.scorer, kScorers);
  p.act = glue::parse<HiddenAct>(t.act, kActs);
  p.scale = t.scale;
  const int64_t features = t.values.size(3);
  const int64_t batch = t.offsets.has_value() ? t.offsets->size(0) - 1 : t.values.size(0);
  const int64_t queries = t.scores.has_value()  ? t.scores->size(2)
                          : t.query.has_value() ? t.query->size(2)
                                                : t.w->size(0);
  const int64_t hidden = t.V.has_value()       ? t.V->size(0)
                         : t.keys.has_value()  ? t.keys->size(3)
                         : t.query.has_value() ? features
                                               : 0;
  p.sizes = {batch, t.values.size(1), t.values.size(2), queries, features, hidden};
  p.values = items_of<const void*>(t.values.const_data_ptr(), t.values);
  if (t.keys.has_value()) p.keys = items_of<const void*>(t.keys->const_data_ptr(), *t.keys);
  p.query = rows_of(t.query);
  p.scores = rows_of(t.scores);
  p.V = glue::data_or_null(t.V);
  p.b_V = glue::data_or_null(t.b_V);
  p.U = glue::data_or_null(t.U);
  p.b_U = glue::data_or_null(t.b_U);
  p.w = glue::data_or_null(t.w);
  p.c = rows_of(t.c);
  p.bias = rows_of(t.bias);
  p.offsets = static_cast<const int64_t*>(glue::data_or_null(t.offsets));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& values, const MaybeTensor& keys,
                                                   const MaybeTensor& query, const MaybeTensor& scores,
                                                   const MaybeTensor& V, const MaybeTensor& b_V, const MaybeTensor& U,
                                                   const MaybeTensor& b_U, const MaybeTensor& w, const MaybeTensor& c,
                                                   const MaybeTensor& bias, const MaybeTensor& offsets,
                                                   const std::string& scorer, const std::string& act, double scale,
                                                   bool return_scores) {
  ForwardParams p{};
  fill(p, {values, keys, query, scores, V, b_V, U, b_U, w, c, bias, offsets, scorer, act, scale});
  const auto acc = glue::accumulation_scalar(values);
  const Sizes& n = p.sizes;
  Tensor z = glue::empty(values, std::array<int64_t, 4>{n.batch, n.heads, n.queries, n.features}, acc);
  Tensor lse = glue::empty(values, std::array<int64_t, 3>{n.batch, n.heads, n.queries}, acc);
  Tensor top = glue::empty(values, std::array<int64_t, 4>{2, n.batch, n.heads, n.queries}, acc);
  Tensor raw = return_scores
                   ? glue::empty(values, std::array<int64_t, 4>{values.size(0), n.heads, n.queries, n.items}, acc)
                   : glue::nothing(values, acc);
  p.z = glue::mutable_or_null(z);
  p.lse = glue::mutable_or_null(lse);
  p.top = glue::mutable_or_null(top);
  p.scores_out = glue::mutable_or_null(raw);
  glue::launch("softmax_pool", p, values, {launch_forward_cpu, forward_workspace_cpu},
               {ATTNKERN_CUDA(launch_forward_cuda, forward_workspace_cuda)});
  return {z, lse, top, raw};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dz, const Tensor& z, const MaybeTensor& dlse, const MaybeTensor& dscores, const Tensor& values,
    const MaybeTensor& keys, const MaybeTensor& query, const MaybeTensor& scores, const MaybeTensor& V,
    const MaybeTensor& b_V, const MaybeTensor& U, const MaybeTensor& b_U, const MaybeTensor& w, const MaybeTensor& c,
    const MaybeTensor& bias, const MaybeTensor& offsets, const Tensor& top, const std::string& scorer,
    const std::string& act, double scale, bool need_values, bool need_keys, bool need_query, bool need_weights,
    bool need_logits) {
  BackwardParams p{};
  fill(p, {values, keys, query, scores, V, b_V, U, b_U, w, c, bias, offsets, scorer, act, scale});
  const auto acc = glue::accumulation_scalar(values);
  const auto nothing = [&] { return glue::nothing(values, acc); };
  const auto weight_like = [&](const MaybeTensor& t) {
    if (!t.has_value() || !need_weights) return nothing();
    return t->dim() == 1 ? glue::empty(values, std::array<int64_t, 1>{t->size(0)}, acc)
                         : glue::empty(values, std::array<int64_t, 2>{t->size(0), t->size(1)}, acc);
  };
  const auto of_rank_4 = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
    return glue::empty(values, std::array<int64_t, 4>{a, b, c, d}, acc);
  };
  Tensor dvalues = glue::output_like(values, need_values, values);
  Tensor dkeys = glue::output_like(keys, need_keys, values);
  Tensor dquery = query.has_value() && need_query
                      ? of_rank_4(query->size(0), query->size(1), query->size(2), query->size(3))
                      : nothing();
  Tensor dlogits = need_logits ? of_rank_4(values.size(0), p.sizes.heads, p.sizes.queries, p.sizes.items) : nothing();
  Tensor dV = weight_like(V), db_V = weight_like(b_V), dU = weight_like(U), db_U = weight_like(b_U),
         dw = weight_like(w);
  p.dz = glue::data_or_null(dz);
  p.z = glue::data_or_null(z);
  p.dlse = glue::data_or_null(dlse);
  p.dscores = glue::data_or_null(dscores);
  p.top = glue::data_or_null(top);
  p.dvalues = mutable_items(dvalues);
  p.dkeys = mutable_items(dkeys);
  p.dquery = glue::mutable_or_null(dquery);
  p.dlogits = glue::mutable_or_null(dlogits);
  p.dV = glue::mutable_or_null(dV);
  p.db_V = glue::mutable_or_null(db_V);
  p.dU = glue::mutable_or_null(dU);
  p.db_U = glue::mutable_or_null(db_U);
  p.dw = glue::mutable_or_null(dw);
  glue::launch("softmax_pool backward", p, values, {launch_backward_cpu, backward_workspace_cpu},
               {ATTNKERN_CUDA(launch_backward_cuda, backward_workspace_cuda)});
  return {dvalues, dkeys, dquery, dlogits, dV, db_V, dU, db_U, dw};
}

void implement(auto& library) {
  library.impl("softmax_pool_fwd.native", TORCH_BOX(&forward));
  library.impl("softmax_pool_bwd.native", TORCH_BOX(&backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) { implement(m); }
#ifdef ATTNKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnkern, CUDA, m) { implement(m); }
#endif

}  // namespace attnkern::softmax_pool
