// The operator's launchers for ctypes (squeeze_excite.py): a plan is forced or its own, the workspace is fresh device
// memory.
#include <algorithm>

#include "simt/emulator.h"

#include "ops/squeeze_excite/plan.h"

using namespace attnkern;
using namespace attnkern::squeeze_excite;

namespace {

constexpr const char* kWorkspace = "workspace";

struct Memory {
  explicit Memory(size_t bytes) : data(bytes ? simt::allocate(bytes, kWorkspace) : nullptr) {}
  ~Memory() {
    if (data) simt::release(data);
  }
  void* data;
};

Device device() {
  Device d;
  static_cast<cuda::DeviceProperties&>(d) = simt::settings().device;
  for (int i = 0; i < 5; ++i) d.clusters[i] = d.sm_count >> i;
  return d;
}

// Null, or what went wrong; `ran` is the plan.
template <class Params, class Workspace, class Launch>
const char* launch(Params p, const Force* force, Plan* ran, const Workspace& workspace, const Launch& run) {
  const Device d = device();
  const Problem problem = problem_of(p);
  // without a squeeze nothing waits for sums over the map, and only the batched plan knows how
  *ran = make_plan(problem, d, problem.squeezes ? *force : Force{});
  const Memory memory(workspace(p, *ran, d));
  p.workspace = memory.data;
  return run(p, *ran, d, nullptr).message;
}

}  // namespace

extern "C" {

void se_sizes(size_t* sizes) {
  sizes[0] = sizeof(ForwardParams);
  sizes[1] = sizeof(BackwardParams);
  sizes[2] = sizeof(Force);
}

// Null is success. `plan` gets strategy, cluster, threads, vector, pieces, grid.
const char* se_forward(const ForwardParams* p, const Force* force, int64_t* plan) {
  Plan ran{};
  const char* message = launch(
      *p, force, &ran, [](auto&... a) { return forward_workspace_cuda(a...); },
      [](auto&&... a) { return launch_forward_cuda(a...); });
  const int64_t facts[] = {static_cast<int>(ran.strategy), ran.cluster, ran.threads, ran.vector, ran.pieces, ran.grid};
  std::copy(facts, facts + 6, plan);
  return message;
}

const char* se_backward(const BackwardParams* p, const Force* force, int64_t* plan) {
  Plan ran{};
  const char* message = launch(
      *p, force, &ran, [](auto&... a) { return backward_workspace_cuda(a...); },
      [](auto&&... a) { return launch_backward_cuda(a...); });
  const int64_t facts[] = {static_cast<int>(ran.strategy), ran.cluster, ran.threads, ran.vector, ran.pieces, ran.grid};
  std::copy(facts, facts + 6, plan);
  return message;
}

const char* se_squeeze(ForwardParams* p) {
  const Memory memory(squeeze_workspace_cuda(*p));
  p->workspace = memory.data;
  return launch_squeeze_cuda(*p, nullptr).message;
}

// The launchers that register.cpp calls: their own plan, from the device's own properties.
const char* se_public_forward(ForwardParams* p) {
  const Memory memory(forward_workspace_cuda(*p));
  p->workspace = memory.data;
  return launch_forward_cuda(*p, nullptr).message;
}

const char* se_public_backward(BackwardParams* p) {
  const Memory memory(backward_workspace_cuda(*p));
  p->workspace = memory.data;
  return launch_backward_cuda(*p, nullptr).message;
}

}  // extern "C"
