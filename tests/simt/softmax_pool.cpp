// The operator's launchers for ctypes (softmax_pool.py): a plan is forced or its own, the workspace is fresh device
// memory.
#include "simt/emulator.h"

#include "ops/softmax_pool/plan.h"

using namespace attnkern;
using namespace attnkern::softmax_pool;

namespace {

struct Memory {
  explicit Memory(size_t bytes) : data(bytes ? simt::allocate(bytes, "workspace") : nullptr) {}
  ~Memory() {
    if (data) simt::release(data);
  }
  void* data;
};

}  // namespace

extern "C" {

void sp_sizes(size_t* sizes) {
  sizes[0] = sizeof(ForwardParams);
  sizes[1] = sizeof(BackwardParams);
  sizes[2] = sizeof(Force);
  sizes[3] = sizeof(Plan);
}

// Null is success, else what went wrong. Without `force` these are the launchers that register.cpp calls.
const char* sp_forward(ForwardParams* p, const Force* force, Plan* ran) {
  *ran = make_plan(problem_of(*p), simt::settings().device, force ? *force : Force{});
  const Memory memory(force ? forward_workspace_cuda(*p, *ran) : forward_workspace_cuda(*p));
  p->workspace = memory.data;
  return (force ? launch_forward_cuda(*p, *ran, nullptr) : launch_forward_cuda(*p, nullptr)).message;
}

const char* sp_backward(BackwardParams* p, const Force* force, Plan* ran) {
  *ran = make_plan(problem_of(*p), simt::settings().device, force ? *force : Force{});
  const Memory memory(force ? backward_workspace_cuda(*p, *ran) : backward_workspace_cuda(*p));
  p->workspace = memory.data;
  return (force ? launch_backward_cuda(*p, *ran, nullptr) : launch_backward_cuda(*p, nullptr)).message;
}

}  // extern "C"
