// The gate's multiplication by itself.
#include "ops/attention_gate/launch.cuh"
#include "ops/attention_gate/sweep.cuh"

namespace attnkern::attention_gate {

Status launch_apply_cuda(const ApplyParams& p, void* stream) {
  const Sweep s{p.batch, p.channels, p.length, p.x, {}, p.y, static_cast<const float*>(p.alpha), nullptr, nullptr};
  return visit(p.dtype, is_last(p.x), [&](auto type, auto last) {
    return launch_sweep<decltype(type), decltype(last)::value, SweepKind::apply>(s, stream);
  });
}

Status launch_apply_backward_cuda(const ApplyBackwardParams& p, void* stream) {
  const Sweep s{p.batch,
                p.channels,
                p.length,
                p.x,
                p.dy,
                p.dx,
                static_cast<const float*>(p.alpha),
                nullptr,
                static_cast<float*>(p.dalpha)};
  return visit(p.dtype, is_last(p.x), [&](auto type, auto last) {
    return launch_sweep<decltype(type), decltype(last)::value, SweepKind::gate>(s, stream);
  });
}

}  // namespace attnkern::attention_gate
