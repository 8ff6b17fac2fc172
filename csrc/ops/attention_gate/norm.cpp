// A norm's vectors on the CPU: a few thousand operations, of which no instruction set would save a microsecond.
#include <cmath>

#include "ops/attention_gate/params.h"

namespace attnkern::attention_gate {
namespace {

template <class A>
void norm(const NormParams& p) {
  const auto in = [](const void* data, int64_t f, A otherwise) {
    return data ? static_cast<const A*>(data)[f] : otherwise;
  };
  const auto *weight = static_cast<const A*>(p.weight), *mean = static_cast<const A*>(p.mean),
             *var = static_cast<const A*>(p.var);
  auto *folded = static_cast<A*>(p.folded), *shift = static_cast<A*>(p.shift), *scales = static_cast<A*>(p.scale);
  for (int64_t f = 0; f < p.hidden; ++f) {
    const A scale = in(p.gamma, f, 1) / std::sqrt(var[f] + static_cast<A>(p.eps));
    scales[f] = scale;
    shift[f] = in(p.onto, f, 0) + (in(p.beta, f, 0) + scale * (in(p.bias, f, 0) - mean[f]));
    for (int64_t c = 0; c < p.terms; ++c) folded[f * p.terms + c] = scale * weight[f * p.terms + c];
  }
}

template <class A>
void norm_backward(const NormBackwardParams& p) {
  const auto in = [](const void* data) { return static_cast<const A*>(data); };
  const A *dh = in(p.dh), *dht = in(p.dht), *mean = in(p.mean), *var = in(p.var), *scale = in(p.scale);
  auto *k0 = static_cast<A*>(p.k0), *k1 = static_cast<A*>(p.k1), *dgamma = static_cast<A*>(p.dgamma);
  const A n = static_cast<A>(p.count);
  for (int64_t f = 0; f < p.hidden; ++f) {
    const A r = 1 / std::sqrt(var[f] + static_cast<A>(p.eps));
    dgamma[f] = r * (dht[f] - mean[f] * dh[f]);
    k1[f] = -scale[f] * r * dgamma[f] / n;
    k0[f] = -scale[f] * dh[f] / n - k1[f] * mean[f];
  }
}

}  // namespace

Status launch_norm_cpu(const NormParams& p, const ThreadPool&) {
  p.dtype == DType::float64 ? norm<double>(p) : norm<float>(p);
  return {};
}

Status launch_norm_backward_cpu(const NormBackwardParams& p, const ThreadPool&) {
  p.dtype == DType::float64 ? norm_backward<double>(p) : norm_backward<float>(p);
  return {};
}

}  // namespace attnkern::attention_gate
