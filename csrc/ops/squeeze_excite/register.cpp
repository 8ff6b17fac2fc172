// Tensors -> params.h -> launchers, for the dispatch keys CPU and CUDA.
#include "ops/squeeze_excite/params.h"

#include <tuple>

#include "torch/glue.h"

namespace attnkern::squeeze_excite {
namespace {

using glue::MaybeTensor;
using glue::Tensor;

constexpr std::array<std::string_view, 9> kActs{"identity",  "relu", "relu6", "leaky_relu", "silu",
                                                "hardswish", "gelu", "mish",  "prelu"};
constexpr std::array<std::string_view, 5> kGates{"identity", "sigmoid", "hard_sigmoid", "relu", "tanh"};
constexpr std::array<std::string_view, 4> kApplies{"scale", "scale1p", "scale_shift", "shift"};

int64_t positions(const Tensor& x) {
  int64_t length = 1;
  for (int64_t d = 2; d < x.dim(); ++d) length *= x.size(d);
  return length;
}

Layout layout_of(const Tensor& x) { return glue::is_channels_last(x) ? Layout::channels_last : Layout::channels_first; }

template <class Pointer>
MapOf<Pointer> map_of(Pointer data, const Tensor& x, Layout layout) {
  return {data, x.stride(0), layout == Layout::channels_last ? glue::position_stride(x) : x.stride(1)};
}

ConstMap const_map(const Tensor& x, Layout layout) { return map_of<const void*>(x.const_data_ptr(), x, layout); }

Map mutable_map(Tensor& x, Layout layout) { return x.numel() ? map_of<void*>(x.mutable_data_ptr(), x, layout) : Map{}; }

struct Call {
  const Tensor& x;
  const MaybeTensor &src, &w1, &b1, &w2, &b2, &act_weight, &residual, &drop_path;
  std::string_view act;
  double act_slope;
  std::string_view gate;
  double gate_slope, gate_offset;
  std::string_view apply;
  double gain;
  std::string_view out_act;
};

void fill(Inputs& p, const Call& c) {
  p.dtype = glue::dtype_of(c.x);
  p.weight_dtype = c.w1.has_value() ? glue::dtype_of(*c.w1) : accumulation(p.dtype);
  p.layout = layout_of(c.x);
  p.options = {glue::parse<Act>(c.act, kActs),
               c.act_slope,
               glue::parse<Gate>(c.gate, kGates),
               c.gate_slope,
               c.gate_offset,
               glue::parse<Apply>(c.apply, kApplies),
               c.gain,
               glue::parse<Act>(c.out_act, kActs)};
  const int64_t channels = c.x.size(1);
  p.sizes = {c.x.size(0), channels, positions(c.x), c.w2.has_value() ? c.w1->size(0) : 0,
             p.options.apply == Apply::scale_shift ? 2 * channels : channels};
  p.x = const_map(c.x, p.layout);
  p.src = glue::data_or_null(c.src);
  p.w1 = glue::data_or_null(c.w1);
  p.b1 = glue::data_or_null(c.b1);
  p.w2 = glue::data_or_null(c.w2);
  p.b2 = glue::data_or_null(c.b2);
  p.act_weight = glue::data_or_null(c.act_weight);
  p.act_weight_stride = c.act_weight.has_value() && c.act_weight->numel() > 1 ? 1 : 0;
  if (c.residual.has_value()) {
    STD_TORCH_CHECK(layout_of(*c.residual) == p.layout, "squeeze_excite: residual must have the layout of x");
    p.residual = const_map(*c.residual, p.layout);
  }
  p.drop_path = glue::data_or_null(c.drop_path);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const MaybeTensor& src, const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2,
    const MaybeTensor& b2, const MaybeTensor& act_weight, const MaybeTensor& residual, const MaybeTensor& drop_path,
    const std::string& act, double act_slope, const std::string& gate, double gate_slope, double gate_offset,
    const std::string& apply, double gain, const std::string& out_act, bool save_mask) {
  ForwardParams p{};
  fill(p, {x, src, w1, b1, w2, b2, act_weight, residual, drop_path, act, act_slope, gate, gate_slope, gate_offset,
           apply, gain, out_act});
  const auto acc = glue::accumulation_scalar(x);
  const auto small = [&](int64_t columns) {
    return glue::empty(x, std::array<int64_t, 2>{p.sizes.batch, columns}, acc);
  };
  const auto byte = torch::headeronly::ScalarType::Byte;
  Tensor y = glue::empty_like(x);
  Tensor mean = src.has_value() ? glue::nothing(x, acc) : small(p.sizes.channels);
  Tensor hidden = p.sizes.hidden ? small(p.sizes.hidden) : glue::nothing(x, acc);
  Tensor logits = small(p.sizes.width);
  const bool last = p.layout == Layout::channels_last;
  const int64_t rows = p.sizes.batch * (last ? p.sizes.length : p.sizes.channels);
  const int64_t columns = last ? p.sizes.channels : p.sizes.length;
  Tensor mask =
      save_mask ? glue::empty(x, std::array<int64_t, 2>{rows, (columns + 7) / 8}, byte) : glue::nothing(x, byte);
  p.y = mutable_map(y, p.layout);
  p.mean = glue::mutable_or_null(mean);
  p.hidden = glue::mutable_or_null(hidden);
  p.logits = glue::mutable_or_null(logits);
  p.mask = static_cast<uint8_t*>(glue::mutable_or_null(mask));
  glue::launch("squeeze_excite", p, x, {launch_forward_cpu, forward_workspace_cpu},
               {ATTNKERN_CUDA(launch_forward_cuda, forward_workspace_cuda)});
  return {y, mean, hidden, logits, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const MaybeTensor& dlogits, const Tensor& x, const MaybeTensor& src, const MaybeTensor& w1,
    const MaybeTensor& b1, const MaybeTensor& w2, const MaybeTensor& b2, const MaybeTensor& act_weight,
    const MaybeTensor& residual, const MaybeTensor& drop_path, const Tensor& mean, const Tensor& hidden,
    const Tensor& logits, const Tensor& mask, const std::string& act, double act_slope, const std::string& gate,
    double gate_slope, double gate_offset, const std::string& apply, double gain, const std::string& out_act,
    bool need_dx, bool need_dw, bool need_dresidual) {
  BackwardParams p{};
  fill(p, {x, src, w1, b1, w2, b2, act_weight, residual, drop_path, act, act_slope, gate, gate_slope, gate_offset,
           apply, gain, out_act});
  STD_TORCH_CHECK(layout_of(dy) == p.layout, "squeeze_excite: the gradient must have the layout of x");
  Tensor dx = glue::output_like(x, need_dx, x);
  Tensor dsrc = glue::output_like(src, true, x);
  Tensor dw1 = glue::output_like(w1, need_dw, x);
  Tensor db1 = glue::output_like(b1, need_dw, x);
  Tensor dw2 = glue::output_like(w2, need_dw, x);
  Tensor db2 = glue::output_like(b2, need_dw, x);
  Tensor dact_weight = glue::output_like(act_weight, need_dw, x);
  Tensor dresidual = glue::output_like(x, need_dresidual, x);
  Tensor ddrop_path = glue::output_like(drop_path, true, x);
  p.dy = const_map(dy, p.layout);
  p.dlogits = glue::data_or_null(dlogits);
  p.mean = glue::data_or_null(mean);
  p.hidden = glue::data_or_null(hidden);
  p.logits = glue::data_or_null(logits);
  p.mask = static_cast<const uint8_t*>(glue::data_or_null(mask));
  p.dx = mutable_map(dx, p.layout);
  p.dsrc = glue::mutable_or_null(dsrc);
  p.dw1 = glue::mutable_or_null(dw1);
  p.db1 = glue::mutable_or_null(db1);
  p.dw2 = glue::mutable_or_null(dw2);
  p.db2 = glue::mutable_or_null(db2);
  p.dact_weight = glue::mutable_or_null(dact_weight);
  p.dresidual = mutable_map(dresidual, p.layout);
  p.ddrop_path = glue::mutable_or_null(ddrop_path);
  glue::launch("squeeze_excite backward", p, x, {launch_backward_cpu, backward_workspace_cpu},
               {ATTNKERN_CUDA(launch_backward_cuda, backward_workspace_cuda)});
  return {dx, dsrc, dw1, db1, dw2, db2, dact_weight, dresidual, ddrop_path};
}

Tensor squeeze(const Tensor& x) {
  ForwardParams p{};
  p.dtype = glue::dtype_of(x);
  p.layout = layout_of(x);
  p.sizes = {x.size(0), x.size(1), positions(x), 0, x.size(1)};
  p.x = const_map(x, p.layout);
  Tensor mean = glue::empty(x, std::array<int64_t, 2>{p.sizes.batch, p.sizes.channels}, glue::accumulation_scalar(x));
  p.mean = glue::mutable_or_null(mean);
  glue::launch("squeeze", p, x, {launch_squeeze_cpu, squeeze_workspace_cpu},
               {ATTNKERN_CUDA(launch_squeeze_cuda, squeeze_workspace_cuda)});
  return mean;
}

void implement(auto& library) {
  library.impl("squeeze_excite_fwd.native", TORCH_BOX(&forward));
  library.impl("squeeze_excite_bwd.native", TORCH_BOX(&backward));
  library.impl("squeeze_fwd.native", TORCH_BOX(&squeeze));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) { implement(m); }
#ifdef ATTNKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnkern, CUDA, m) { implement(m); }
#endif

}  // namespace attnkern::squeeze_excite
