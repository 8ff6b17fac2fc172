// Tensors -> params.h -> launchers, for the dispatch keys CPU and CUDA.
#include "ops/attention_gate/params.h"

#include <tuple>

#include "torch/glue.h"

namespace attnkern::attention_gate {
namespace {

using glue::is_channels_last;
using glue::MaybeTensor;
using glue::Tensor;

constexpr std::array<std::string_view, 3> kActs{"relu", "leaky_relu", "softplus"};
constexpr std::array<std::string_view, 2> kTargets{"x", "g"};

// Whether t can be walked in that layout: a map of one channel, or of one position, in both.
bool lies(const Tensor& t, bool last) {
  if (t.numel() == 0) return true;
  return last ? t.size(1) == 1 || t.stride(1) == 1 : !is_channels_last(t);
}

template <class Pointer>
MapOf<Pointer> map_of(Pointer data, const Tensor& t, bool last) {
  if (last) return {data, t.stride(0), 1, glue::position_stride(t)};
  return {data, t.stride(0), t.stride(1), 1};
}

ConstMap const_map(const Tensor& t, bool last) { return map_of<const void*>(glue::data_or_null(t), t, last); }
Map mutable_map(Tensor& t, bool last) { return t.numel() ? map_of<void*>(t.mutable_data_ptr(), t, last) : Map{}; }

// The size of x [B, C, *spatial] along one of three spatial dims: of fewer, the leading ones are 1.
int64_t spatial(const Tensor& x, int d) {
  const int64_t at = d + x.dim() - 3;
  return at < 2 ? 1 : x.size(at);
}

Sizes sizes_of(const Tensor& x, const std::array<int64_t, 3>& kernel, int64_t hidden) {
  Sizes n{x.size(0), x.size(1), 0, hidden, {}, {}, {}, {}};
  for (int d = 0; d < 3; ++d) {
    n.x[d] = spatial(x, d);
    n.kernel[d] = kernel[d];
    n.g[d] = n.grid[d] = n.x[d] / kernel[d];
  }
  return n;
}

struct Call {
  const Tensor &x, &g, &theta;
  const MaybeTensor &phi, &bias;
  const Tensor& psi;
  const MaybeTensor &psi_bias, &taps, &tap_weights;
  std::string_view act;
  double slope;
  std::array<int64_t, 3> kernel;
  std::string_view target;
  bool apply;
};

void fill(Inputs& p, const Call& c) {
  const bool last = is_channels_last(c.x);
  p.dtype = glue::dtype_of(c.x);
  p.sizes = sizes_of(c.x, c.kernel, c.theta.size(0));
  p.sizes.gating = c.g.size(1);
  for (int d = 0; d < 3; ++d) p.sizes.g[d] = spatial(c.g, d);
  p.act = glue::parse<HiddenAct>(c.act, kActs);
  p.slope = c.slope;
  p.target = glue::parse<Target>(c.target, kTargets);
  p.apply = c.apply;
  p.x = const_map(c.x, last);
  p.g = const_map(c.g, last);
  p.theta = glue::data_or_null(c.theta);
  p.phi = glue::data_or_null(c.phi);
  p.bias = glue::data_or_null(c.bias);
  p.psi = glue::data_or_null(c.psi);
  p.psi_bias = glue::data_or_null(c.psi_bias);
  p.taps = static_cast<const int64_t*>(glue::data_or_null(c.taps));
  p.tap_weights = glue::data_or_null(c.tap_weights);
}

Tensor vector(const Tensor& like, int64_t size) {
  return glue::empty(like, std::array<int64_t, 1>{size}, like.scalar_type());
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& g, const Tensor& theta, const MaybeTensor& phi,
                                   const MaybeTensor& bias, const Tensor& psi, const MaybeTensor& psi_bias,
                                   const MaybeTensor& taps, const MaybeTensor& tap_weights, const std::string& act,
                                   double slope, int64_t k1, int64_t k2, int64_t k3, const std::string& target,
                                   bool apply) {
  ForwardParams p{};
  fill(p, {x, g, theta, phi, bias, psi, psi_bias, taps, tap_weights, act, slope, {k1, k2, k3}, target, apply});
  const Sizes& n = p.sizes;
  Tensor q = glue::empty(x, std::array<int64_t, 4>{n.batch, n.grid[0], n.grid[1], n.grid[2]}, theta.scalar_type());
  Tensor y = glue::output_like(p.target == Target::x ? x : g, apply, x);
  p.q = glue::mutable_or_null(q);
  p.y = mutable_map(y, is_channels_last(x));
  glue::launch("attention_gate", p, x, {launch_forward_cpu, forward_workspace_cpu},
               {ATTNKERN_CUDA(launch_forward_cuda, forward_workspace_cuda)});
  return {q, y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& d, const MaybeTensor& dq, const Tensor& x, const Tensor& g, const Tensor& theta,
    const MaybeTensor& phi, const MaybeTensor& bias, const Tensor& psi, const MaybeTensor& psi_bias,
    const MaybeTensor& taps, const MaybeTensor& tap_weights, const Tensor& q, const MaybeTensor& theta_scale,
    const MaybeTensor& theta_k0, const MaybeTensor& theta_k1, const MaybeTensor& phi_scale, const MaybeTensor& phi_k0,
    const MaybeTensor& phi_k1, const std::string& act, double slope, int64_t k1, int64_t k2, int64_t k3,
    const std::string& target, bool apply, bool need_x, bool need_g, bool need_weights) {
  BackwardParams p{};
  fill(p, {x, g, theta, phi, bias, psi, psi_bias, taps, tap_weights, act, slope, {k1, k2, k3}, target, apply});
  const bool last = is_channels_last(x);
  if (d.has_value()) {
    STD_TORCH_CHECK(lies(*d, last), "attention_gate: the gradient must have the layout of x");
    p.d = const_map(*d, last);
  }
  const int64_t hidden = need_weights ? p.sizes.hidden : 0;
  Tensor dx = glue::output_like(x, need_x, x);
  Tensor dg = glue::output_like(g, need_g, x);
  Tensor dtheta = glue::output_like(theta, need_weights, theta);
  Tensor dphi = glue::output_like(phi, need_weights, theta);
  Tensor dbias = vector(theta, hidden), dpsi = vector(theta, hidden), dpsi_bias = vector(theta, need_weights ? 1 : 0);
  p.dq = glue::data_or_null(dq);
  p.q = glue::data_or_null(q);
  p.theta_branch = {glue::data_or_null(theta_scale), glue::data_or_null(theta_k0), glue::data_or_null(theta_k1)};
  p.phi_branch = {glue::data_or_null(phi_scale), glue::data_or_null(phi_k0), glue::data_or_null(phi_k1)};
  p.dx = mutable_map(dx, last);
  p.dg = mutable_map(dg, last);
  p.dtheta = glue::mutable_or_null(dtheta);
  p.dphi = glue::mutable_or_null(dphi);
  p.dbias = glue::mutable_or_null(dbias);
  p.dpsi = glue::mutable_or_null(dpsi);
  p.dpsi_bias = glue::mutable_or_null(dpsi_bias);
  glue::launch("attention_gate backward", p, x, {launch_backward_cpu, backward_workspace_cpu},
               {ATTNKERN_CUDA(launch_backward_cuda, backward_workspace_cuda)});
  return {dx, dg, dtheta, dphi, dbias, dpsi, dpsi_bias};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const Tensor& weight, int64_t k1, int64_t k2, int64_t k3) {
  MomentsParams p{};
  p.dtype = glue::dtype_of(x);
  p.sizes = sizes_of(x, {k1, k2, k3}, weight.size(0));
  p.x = const_map(x, is_channels_last(x));
  p.theta = glue::data_or_null(weight);
  Tensor mean = vector(weight, p.sizes.hidden), var = vector(weight, p.sizes.hidden);
  p.mean = glue::mutable_or_null(mean);
  p.var = glue::mutable_or_null(var);
  glue::launch("attention_gate moments", p, x, {launch_moments_cpu, moments_workspace_cpu},
               {ATTNKERN_CUDA(launch_moments_cuda, moments_workspace_cuda)});
  return {mean, var};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three sums(const Tensor& dq, const Tensor& x, const Tensor& g, const Tensor& theta, const MaybeTensor& phi,
           const MaybeTensor& bias, const Tensor& psi, const MaybeTensor& psi_bias, const MaybeTensor& taps,
           const MaybeTensor& tap_weights, const MaybeTensor& theta_scale, const MaybeTensor& phi_scale,
           const std::string& act, double slope, int64_t k1, int64_t k2, int64_t k3, const std::string& target,
           bool apply) {
  SumsParams p{};
  fill(p, {x, g, theta, phi, bias, psi, psi_bias, taps, tap_weights, act, slope, {k1, k2, k3}, target, apply});
  Tensor dh = vector(theta, p.sizes.hidden), dht = vector(theta, p.sizes.hidden), dhu = vector(theta, p.sizes.hidden);
  p.dq = glue::data_or_null(dq);
  p.theta_scale = glue::data_or_null(theta_scale);
  p.phi_scale = glue::data_or_null(phi_scale);
  p.dh = glue::mutable_or_null(dh);
  p.dht = glue::mutable_or_null(dht);
  p.dhu = glue::mutable_or_null(dhu);
  glue::launch("attention_gate sums", p, x, {launch_sums_cpu, sums_workspace_cpu},
               {ATTNKERN_CUDA(launch_sums_cuda, sums_workspace_cuda)});
  return {dh, dht, dhu};
}

// A weight [F, ...] with a norm folded in, the bias that is left, on top of `onto`, and the norm's scale.
Three fold(const Tensor& weight, const MaybeTensor& onto, const MaybeTensor& bias, const MaybeTensor& gamma,
           const MaybeTensor& beta, const Tensor& mean, const Tensor& var, double eps) {
  const int64_t hidden = mean.size(0);
  Tensor folded = glue::empty_like(weight), shift = vector(weight, hidden), scale = vector(weight, hidden);
  NormParams p{glue::dtype_of(weight),
               hidden,
               weight.numel() / hidden,
               glue::data_or_null(weight),
               glue::data_or_null(onto),
               glue::data_or_null(bias),
               glue::data_or_null(gamma),
               glue::data_or_null(beta),
               glue::data_or_null(mean),
               glue::data_or_null(var),
               eps,
               glue::mutable_or_null(folded),
               glue::mutable_or_null(shift),
               glue::mutable_or_null(scale)};
  glue::launch("gate_norm", p, weight, {launch_norm_cpu}, {ATTNKERN_CUDA(launch_norm_cuda)});
  return {folded, shift, scale};
}

Three norm_forward(const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& gamma, const MaybeTensor& beta,
                   const Tensor& mean, const Tensor& var, double eps) {
  return fold(weight, {}, bias, gamma, beta, mean, var, eps);
}

// forward, of a gate with norms in evaluation: those that have a mean. `before` is added before the norm.
std::tuple<Tensor, Tensor> evaluate(
    const Tensor& x, const Tensor& g, Tensor theta, MaybeTensor phi, MaybeTensor bias, Tensor psi, MaybeTensor psi_bias,
    const MaybeTensor& taps, const MaybeTensor& tap_weights, const MaybeTensor& theta_before,
    const MaybeTensor& theta_gamma, const MaybeTensor& theta_beta, const MaybeTensor& theta_mean,
    const MaybeTensor& theta_var, double theta_eps, const MaybeTensor& phi_before, const MaybeTensor& phi_gamma,
    const MaybeTensor& phi_beta, const MaybeTensor& phi_mean, const MaybeTensor& phi_var, double phi_eps,
    const MaybeTensor& psi_before, const MaybeTensor& psi_gamma, const MaybeTensor& psi_beta,
    const MaybeTensor& psi_mean, const MaybeTensor& psi_var, double psi_eps, const std::string& act, double slope,
    int64_t k1, int64_t k2, int64_t k3, const std::string& target, bool apply) {
  if (theta_mean)
    std::tie(theta, bias, std::ignore) =
        fold(theta, bias, theta_before, theta_gamma, theta_beta, *theta_mean, *theta_var, theta_eps);
  if (phi_mean)
    std::tie(phi, bias, std::ignore) = fold(*phi, bias, phi_before, phi_gamma, phi_beta, *phi_mean, *phi_var, phi_eps);
  if (psi_mean)
    std::tie(psi, psi_bias, std::ignore) =
        fold(psi, psi_bias, psi_before, psi_gamma, psi_beta, *psi_mean, *psi_var, psi_eps);
  return forward(x, g, theta, phi, bias, psi, psi_bias, taps, tap_weights, act, slope, k1, k2, k3, target, apply);
}

Three norm_backward(const Tensor& dq, const Tensor& dh, const Tensor& dht, const Tensor& mean, const Tensor& var,
                    const Tensor& scale, double eps) {
  const int64_t hidden = dh.size(0);
  Tensor k0 = vector(dh, hidden), k1 = vector(dh, hidden), dgamma = vector(dh, hidden);
  NormBackwardParams p{glue::dtype_of(dh),
                       hidden,
                       dq.numel(),
                       glue::data_or_null(dh),
                       glue::data_or_null(dht),
                       glue::data_or_null(mean),
                       glue::data_or_null(var),
                       glue::data_or_null(scale),
                       eps,
                       glue::mutable_or_null(k0),
                       glue::mutable_or_null(k1),
                       glue::mutable_or_null(dgamma)};
  glue::launch("gate_norm backward", p, dh, {launch_norm_backward_cpu}, {ATTNKERN_CUDA(launch_norm_backward_cuda)});
  return {k0, k1, dgamma};
}

Tensor apply_forward(const Tensor& x, const Tensor& alpha) {
  const bool last = is_channels_last(x);
  Tensor y = glue::empty_like(x);
  const ApplyParams p{
      glue::dtype_of(x),      x.size(0),           x.size(1), x.size(2) * x.size(3) * x.size(4), const_map(x, last),
      alpha.const_data_ptr(), mutable_map(y, last)};
  glue::launch("gate_apply", p, x, {launch_apply_cpu}, {ATTNKERN_CUDA(launch_apply_cuda)});
  return y;
}

std::tuple<Tensor, Tensor> apply_backward(const Tensor& dy, const Tensor& x, const Tensor& alpha) {
  const bool last = is_channels_last(x);
  STD_TORCH_CHECK(lies(dy, last), "gate_apply: the gradient must have the layout of x");
  Tensor dx = glue::empty_like(x), dalpha = glue::empty_like(alpha);
  const ApplyBackwardParams p{glue::dtype_of(x),
                              x.size(0),
                              x.size(1),
                              x.size(2) * x.size(3) * x.size(4),
                              const_map(x, last),
                              const_map(dy, last),
                              alpha.const_data_ptr(),
                              mutable_map(dx, last),
                              dalpha.mutable_data_ptr()};
  glue::launch("gate_apply backward", p, x, {launch_apply_backward_cpu}, {ATTNKERN_CUDA(launch_apply_backward_cuda)});
  return {dx, dalpha};
}

void implement(auto& library) {
  library.impl("attention_gate_fwd.native", TORCH_BOX(&forward));
  library.impl("attention_gate_eval.native", TORCH_BOX(&evaluate));
  library.impl("attention_gate_bwd.native", TORCH_BOX(&backward));
  library.impl("attention_gate_moments.native", TORCH_BOX(&moments));
  library.impl("attention_gate_sums.native", TORCH_BOX(&sums));
  library.impl("gate_norm_fwd.native", TORCH_BOX(&norm_forward));
  library.impl("gate_norm_bwd.native", TORCH_BOX(&norm_backward));
  library.impl("gate_apply_fwd.native", TORCH_BOX(&apply_forward));
  library.impl("gate_apply_bwd.native", TORCH_BOX(&apply_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) { implement(m); }
#ifdef ATTNKERN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnkern, CUDA, m) { implement(m); }
#endif

}  // namespace attnkern::attention_gate
