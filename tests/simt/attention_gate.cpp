// The operator's launchers for ctypes (attention_gate.py): a plan is forced or its own, the workspace is fresh device
// memory.
#include "simt/emulator.h"

#include "ops/attention_gate/plan.h"

using namespace attnkern;
using namespace attnkern::attention_gate;

namespace {

struct Memory {
  explicit Memory(size_t bytes) : data(bytes ? simt::allocate(bytes, "workspace") : nullptr) {}
  ~Memory() {
    if (data) simt::release(data);
  }
  void* data;
};

// Null is success, else what went wrong. Without `force` these are the launchers that register.cpp calls.
template <class Params, class Own, class Planned, class Bytes, class PlannedBytes>
const char* run(Params* p, const Force* force, Plan* ran, const Own& launch, const Planned& launch_planned,
                const Bytes& bytes, const PlannedBytes& planned_bytes) {
  *ran = make_plan(problem_of(*p), simt::settings().device, force ? *force : Force{});
  const Memory memory(force ? planned_bytes(*p, *ran) : bytes(*p));
  p->workspace = memory.data;
  return (force ? launch_planned(*p, *ran, nullptr) : launch(*p, nullptr)).message;
}

}  // namespace

#define ATTNKERN_RUN(NAME, PARAMS)                                                                   \
  const char* ag_##NAME(PARAMS* p, const Force* force, Plan* ran) {                                  \
    return run(                                                                                      \
        p, force, ran, [](const PARAMS& q, void* s) { return launch_##NAME##_cuda(q, s); },          \
        [](const PARAMS& q, const Plan& plan, void* s) { return launch_##NAME##_cuda(q, plan, s); }, \
        [](const PARAMS& q) { return NAME##_workspace_cuda(q); },                                    \
        [](const PARAMS& q, const Plan& plan) { return NAME##_workspace_cuda(q, plan); });           \
  }

extern "C" {

void ag_sizes(size_t* sizes) {
  const size_t all[] = {sizeof(ForwardParams), sizeof(BackwardParams),      sizeof(MomentsParams),
                        sizeof(SumsParams),    sizeof(NormParams),          sizeof(NormBackwardParams),
                        sizeof(ApplyParams),   sizeof(ApplyBackwardParams), sizeof(Force),
                        sizeof(Plan)};
  for (size_t size : all) *sizes++ = size;
}

ATTNKERN_RUN(forward, ForwardParams)
ATTNKERN_RUN(backward, BackwardParams)
ATTNKERN_RUN(moments, MomentsParams)
ATTNKERN_RUN(sums, SumsParams)

const char* ag_norm(NormParams* p) { return launch_norm_cuda(*p, nullptr).message; }
const char* ag_norm_backward(NormBackwardParams* p) { return launch_norm_backward_cuda(*p, nullptr).message; }
const char* ag_apply(ApplyParams* p) { return launch_apply_cuda(*p, nullptr).message; }
const char* ag_apply_backward(ApplyBackwardParams* p) { return launch_apply_backward_cuda(*p, nullptr).message; }

}  // extern "C"
