// CPU launchers.
#include "ops/squeeze_excite/params.h"

namespace attnkern::squeeze_excite {

size_t forward_workspace_cpu(const ForwardParams&, const ThreadPool&) { return 0; }
size_t backward_workspace_cpu(const BackwardParams&, const ThreadPool&) { return 0; }
Status launch_forward_cpu(const ForwardParams&, const ThreadPool&) { return {"not written yet"}; }
Status launch_backward_cpu(const BackwardParams&, const ThreadPool&) { return {"not written yet"}; }
Status launch_squeeze_cpu(const ConstMap&, DType, Layout, const Sizes&, void*, const ThreadPool&) {
  return {"not written yet"};
}

}  // namespace attnkern::squeeze_excite
