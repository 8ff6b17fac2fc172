// CPU launchers: one operator call each, in the workspace that it carves.
#include "ops/attention_gate/cpu_call.h"

namespace attnkern::attention_gate {
namespace {

struct ForwardCall : Call {
  const ForwardParams& params;
  ForwardCall(const ForwardParams& p, const ThreadPool& pool, const CpuKernels& kernels)
      : Call{.p = p, .pool = pool, .kernels = kernels, .split = false, .backward = false, .maps = p.apply ? 3 : 2},
        params(p) {}

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_weights(arena);
    take_scratch(arena);
    return static_cast<size_t>(arena.used());
  }
  void run() {
    kernels.pack(p, {}, {}, weights);
    each_units([&](const Units& some, const Scratch& s) { kernels.forward(params, weights, some, s); });
  }
};

struct BackwardCall : Call {
  const BackwardParams& params;
  Groups groups;
  Slab* slabs = nullptr;

  BackwardCall(const BackwardParams& p, const ThreadPool& pool, const CpuKernels& kernels)
      : Call{.p = p,
             .pool = pool,
             .kernels = kernels,
             .split = p.theta_branch.scale || p.phi_branch.scale,
             .backward = true,
             .slabbed = p.dg.data && !p.phi,
             .maps = 4,
             .with_d = p.apply && p.d.data},
        params(p) {}

  // Where a group's sums stand among its elements.
  Sums sums_at(void* base) const {
    if (!params.dtheta) return {};
    const auto own = [&](int64_t first) { return at(base, first); };
    return {own(0),
            p.phi ? own(phi_at()) : nullptr,
            own(bias_at()),
            own(bias_at() + width),
            own(bias_at() + 2 * width),
            nullptr,
            nullptr,
            nullptr};
  }
  int64_t phi_at() const { return terms(n) * width; }
  int64_t bias_at() const { return phi_at() + (p.phi ? n.gating * width : 0); }

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_weights(arena);
    take_scratch(arena);
    groups.take(arena, *this, params.dtheta ? bias_at() + 2 * width + kPad : 0);
    if (slabbed) {
      slabs = static_cast<Slab*>(arena.take(units.last, sizeof(Slab)));
      for (int64_t i = 0; i < units.last; ++i) {
        const Range own = slab_of(p, units.at(i));
        void* data = arena.take((own.end - own.begin) * width, size);
        if (slabs) slabs[i] = {own, data};
      }
    }
    return static_cast<size_t>(arena.used());
  }

  void run() {
    if (!params.dx.data && !params.dg.data && !params.dtheta) return;
    kernels.pack(p, params.theta_branch, params.phi_branch, weights);
    groups.each(*this, [&](const Units& some, void* own, const Scratch& s) {
      kernels.backward(params, weights, some, s, sums_at(own), slabs);
    });
    merge_weights();
    if (slabbed) merge_slabs();
    bool covered = true;
    for (int d = 0; d < 2; ++d) covered = covered && n.grid[d] * n.kernel[d] == n.x[d];
    if (params.dx.data && !covered)
      cpu::share(pool, lanes, n.batch, [&](int64_t b, int64_t) { kernels.uncovered(params, b); });
  }

  void merge_weights() const {
    if (!params.dtheta) return;
    const auto weight = [&](int64_t first, int64_t channels, int64_t patch, void* out) {
      groups.add(*this, first, channels * patch * width, at(groups.data, first));
      cpu::share(pool, lanes, ceil_div(n.hidden, kPad), [&](int64_t i, int64_t) {
        kernels.put_weight(accumulation(p.dtype), at(groups.data, first), channels, patch, n.hidden,
                           {i * kPad, std::min(n.hidden, (i + 1) * kPad)}, out);
      });
    };
    weight(0, n.channels, volume(n.kernel), params.dtheta);
    if (p.phi) weight(phi_at(), n.gating, 1, params.dphi);
    groups.add(*this, bias_at(), n.hidden, params.dbias);
    groups.add(*this, bias_at() + width, n.hidden, params.dpsi);
    groups.add(*this, bias_at() + 2 * width, 1, params.dpsi_bias);
  }

  void merge_slabs() const {
    const int64_t all = volume(n.g), pieces = ceil_div(all, tile);
    cpu::share(pool, lanes, n.batch * pieces, [&](int64_t i, int64_t lane) {
      const int64_t b = i / pieces, begin = i % pieces * tile;
      const Scratch s = lane_scratch(lane);
      kernels.merge_slabs(params, b, {begin, std::min(begin + tile, all)}, slabs + b * units.per_sample,
                          units.per_sample, s.t, s.columns);
    });
  }
};

struct SumsCall : Call {
  const SumsParams& params;
  Groups groups;
  SumsCall(const SumsParams& p, const ThreadPool& pool, const CpuKernels& kernels)
      : Call{.p = p, .pool = pool, .kernels = kernels, .split = true, .backward = false}, params(p) {}

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_weights(arena);
    take_scratch(arena);
    groups.take(arena, *this, 3 * width);
    return static_cast<size_t>(arena.used());
  }
  void run() {
    kernels.pack(p, {params.theta_scale, nullptr, nullptr}, {params.phi_scale, nullptr, nullptr}, weights);
    groups.each(*this, [&](const Units& some, void* own, const Scratch& s) {
      Sums sums{};
      sums.dh = own, sums.dht = at(own, width), sums.dhu = at(own, 2 * width);
      kernels.sums(params, weights, some, s, sums);
    });
    groups.add(*this, 0, n.hidden, params.dh);
    groups.add(*this, width, n.hidden, params.dht);
    groups.add(*this, 2 * width, n.hidden, params.dhu);
  }
};

struct MomentsCall : Call {
  const MomentsParams& params;
  void* parts = nullptr;
  MomentsCall(const MomentsParams& p, const ThreadPool& pool, const CpuKernels& kernels)
      : Call{.p = p, .pool = pool, .kernels = kernels, .split = false, .backward = false}, params(p) {}

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_weights(arena);
    take_scratch(arena);
    parts = arena.take(units.last * 2 * width, size);
    return static_cast<size_t>(arena.used());
  }
  void run() {
    kernels.pack(p, {}, {}, weights);
    each_units([&](const Units& some, const Scratch& s) { kernels.moments(p, weights, some, s, parts); });
    kernels.merge_moments(params, parts, units);
  }
};

template <class Params, class Kernel>
void apply_units(const Params& p, const ThreadPool& pool, int64_t maps, const Kernel& kernel) {
  const Units units = cut(p.batch, p.length, 256, kUnits);
  const int64_t bytes = p.batch * p.length * p.channels * size_of(p.dtype);
  const bool streaming = maps * bytes > 2 * cpu::l3_bytes();
  cpu::share(pool, cpu::lanes_for(pool, units.last, bytes), units.last,
             [&](int64_t i, int64_t) { kernel(p, units.at(i), streaming); });
}

}  // namespace

size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool) {
  return ForwardCall(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool) {
  return BackwardCall(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

size_t sums_workspace_cpu(const SumsParams& params, const ThreadPool& pool) {
  return SumsCall(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

size_t moments_workspace_cpu(const MomentsParams& params, const ThreadPool& pool) {
  return MomentsCall(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  ForwardCall call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.run();
  return {};
}

Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  BackwardCall call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.run();
  return {};
}

Status launch_sums_cpu(const SumsParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  SumsCall call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.run();
  return {};
}

Status launch_moments_cpu(const MomentsParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  MomentsCall call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.run();
  return {};
}

Status launch_apply_cpu(const ApplyParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  apply_units(params, pool, 2, cpu_kernels(cpu::active_isa()).apply);
  return {};
}

Status launch_apply_backward_cpu(const ApplyBackwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  apply_units(params, pool, 3, cpu_kernels(cpu::active_isa()).apply_backward);
  return {};
}

}  // namespace attnkern::attention_gate
