// CPU launchers: schedules the kernels of cpu_kernels.h over samples and threads.
//
// Grouped: a thread takes a few samples through every step while their maps are in its cache. Phased: all threads share
// each step of a chunk of samples that fits the last-level cache. The order of every sum is the same in both, so
// results depend neither on the schedule nor on the number of threads.
#include <algorithm>
#include <cstddef>

#include "core/divide.h"
#include "cpu/arena.h"
#include "cpu/cache.h"
#include "cpu/share.h"
#include "ops/squeeze_excite/cpu_kernels.h"

namespace attnkern::squeeze_excite {
namespace {

// Rows that share a line with the next are written past the caches in pieces of lines, which only long rows can afford:
// rows of 98 bytes at 4 GB/s against 33 through the caches, of 392 at 16 against 38, of 784 at 43 against 35.
constexpr int64_t kStreamedRowBytes = 768;

struct Plan {
  bool grouped;
  int64_t samples;  // of a group, or of a phased chunk
  bool stream;      // write past the caches
};

bool channels_last(const Inputs& p) { return p.layout == Layout::channels_last; }
int64_t rows(const Inputs& p) { return channels_last(p) ? p.sizes.length : p.sizes.channels; }
int64_t columns(const Inputs& p) { return channels_last(p) ? p.sizes.channels : p.sizes.length; }
int64_t map_bytes(const Inputs& p) { return p.sizes.channels * p.sizes.length * size_of(p.dtype); }

// Channels last sums positions in blocks, at most 16 a sample so that the partial sums stay small.
int64_t block_rows(const Inputs& p) {
  return channels_last(p) ? std::max<int64_t>(128, ceil_div(p.sizes.length, 16)) : p.sizes.channels;
}
int64_t blocks(const Inputs& p) { return ceil_div(rows(p), block_rows(p)); }

// `maps`: how many maps a sample reads twice or carries between the passes.
template <class Params>
Plan make_plan(const Params& p, int threads, int maps) {
  const int64_t bytes = map_bytes(p) * maps, batch = p.sizes.batch;
  const int64_t weights = (p.sizes.hidden ? p.sizes.hidden * (p.sizes.channels + p.sizes.width)
                           : p.w1         ? p.sizes.width * p.sizes.channels
                                          : 0) *
                          size_of(p.weight_dtype);
  const int64_t share = std::max(cpu::l2_bytes(), cpu::l3_bytes() / threads / 2);
  const int64_t row_bytes = columns(p) * size_of(p.dtype);
  const bool whole_lines = joins_rows(p) || row_bytes % 64 == 0 || row_bytes >= kStreamedRowBytes;
  const bool stream = whole_lines && map_bytes(p) * batch * 2 > cpu::l3_bytes();
  const bool balanced = batch >= 4 * threads || batch % threads == 0;
  if (threads == 1 || (balanced && bytes <= share)) {
    const int64_t fits =
        std::max<int64_t>(1, (weights > bytes ? share : cpu::l2_bytes() / 2) / std::max<int64_t>(1, bytes));
    return {true, fits, stream};
  }
  return {false, std::clamp<int64_t>(cpu::l3_bytes() / 2 / std::max<int64_t>(1, bytes), 1, std::max<int64_t>(1, batch)),
          stream};
}

// One operator call: kernels, threads and what forward and backward share.
template <class Params>
struct Call {
  const Params& p;
  const ThreadPool& pool;
  const CpuKernels& kernels;
  Plan plan;
  int64_t size = size_of(accumulation(p.dtype));

  void* at(const void* base, int64_t b, int64_t width) const {
    return const_cast<std::byte*>(static_cast<const std::byte*>(base)) + b * width * size;
  }

  // f(item range), each item `bytes` of work
  template <class F>
  void parallel(int64_t items, int64_t bytes, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, cpu::kGrainBytes / std::max<int64_t>(1, bytes));
    if (items <= grain)
      f(Range{0, items});
    else
      pool.parallel_for(items, grain, [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
  }

  // f(b, range): `samples` x `per_sample` items, split among threads
  template <class F>
  void parallel_rows(Range samples, int64_t per_sample, int64_t bytes, const F& f) const {
    parallel((samples.end - samples.begin) * per_sample, bytes, [&](Range items) {
      for (int64_t i = items.begin; i < items.end;) {
        const int64_t b = i / per_sample, end = std::min(items.end, (b + 1) * per_sample);
        f(samples.begin + b, Range{i - b * per_sample, end - b * per_sample});
        i = end;
      }
    });
  }

  Range block(int64_t k) const { return {k * block_rows(p), std::min((k + 1) * block_rows(p), rows(p))}; }

  // total[b] = (sum over blocks of part) / divisor; `part(k)` computes block k's sums, or returns where they are.
  template <class F>
  void sum_blocks(int64_t b, void* total, double divisor, const F& part) const {
    const int64_t channels = p.sizes.channels, last = blocks(p) - 1;
    for (int64_t k = 0; k <= last; ++k)
      kernels.add(accumulation(p.dtype), part(k), at(total, b, channels), channels, k == 0, k == last ? divisor : 1.0);
  }

  // f(samples) over the batch as planned: on one thread each, or chunk by chunk.
  template <class Grouped, class Phased>
  void each_group(const Grouped& grouped, const Phased& phased) const {
    const auto split = [&](Range range, const auto& f) {
      for (int64_t b = range.begin; b < range.end; b += plan.samples)
        f(Range{b, std::min(b + plan.samples, range.end)});
    };
    if (plan.grouped)
      parallel(p.sizes.batch, map_bytes(p), [&](Range range) { split(range, grouped); });
    else
      split(Range{0, p.sizes.batch}, phased);
  }
};

int64_t part_elements(const Inputs& p, const Plan& plan) {
  return plan.grouped || blocks(p) == 1 ? 0 : plan.samples * blocks(p) * p.sizes.channels;
}

// ---- forward

struct ForwardCall : Call<ForwardParams> {
  void *a, *part;
  Coefficients out;

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    a = arena.take(p.sizes.batch * p.sizes.hidden, size);
    out.s = arena.take(p.sizes.batch * p.sizes.channels, size);
    out.t = arena.take(p.sizes.batch * p.sizes.channels, size);
    part = arena.take(part_elements(p, plan), size);
    return static_cast<size_t>(arena.used());
  }

  void grouped(Range samples) const {
    const Sizes& n = p.sizes;
    if (p.mean) squeeze_grouped(samples);
    if (n.hidden) kernels.hidden(p, samples, {0, n.hidden}, a);
    kernels.logits(p, samples, {0, n.width}, a);
    kernels.coefficients(p, p.logits, samples, out);
    for (int64_t b = samples.begin; b < samples.end; ++b) kernels.rescale(p, out, b, {0, rows(p)}, plan.stream);
  }

  void phased(Range samples) const {
    const Sizes& n = p.sizes;
    const int64_t count = samples.end - samples.begin, row_bytes = columns(p) * size_of(p.dtype);
    if (p.mean) squeeze_phased(samples);
    const auto weight_bytes = [&](int64_t inner) { return inner * (count + size_of(p.weight_dtype)); };
    if (n.hidden) parallel(n.hidden, weight_bytes(n.channels), [&](Range r) { kernels.hidden(p, samples, r, a); });
    parallel(n.width, p.w1 ? weight_bytes(p.w2 ? n.hidden : n.channels) : 8 * count,
             [&](Range r) { kernels.logits(p, samples, r, a); });
    parallel_rows(samples, 1, n.channels * 32,
                  [&](int64_t b, Range) { kernels.coefficients(p, p.logits, {b, b + 1}, out); });
    parallel_rows(samples, rows(p), row_bytes, [&](int64_t b, Range r) { kernels.rescale(p, out, b, r, plan.stream); });
  }

  void squeeze_grouped(Range samples) const {
    for (int64_t b = samples.begin; b < samples.end; ++b)
      sum_blocks(b, p.mean, static_cast<double>(p.sizes.length), [&](int64_t k) {
        void* sum = at(out.s, b, p.sizes.channels);
        kernels.sum_x(p, b, block(k), sum);
        return sum;
      });
  }

  void squeeze_phased(Range samples) const {
    const int64_t channels = p.sizes.channels, count = blocks(p), row_bytes = columns(p) * size_of(p.dtype);
    const double length = static_cast<double>(p.sizes.length);
    if (channels_last(p)) {
      const auto part_of = [&](int64_t b, int64_t k) {
        return count == 1 ? at(out.s, b, channels) : at(part, (b - samples.begin) * count + k, channels);
      };
      parallel_rows(samples, count, block_rows(p) * row_bytes, [&](int64_t b, Range r) {
        for (int64_t k = r.begin; k < r.end; ++k) kernels.sum_x(p, b, block(k), part_of(b, k));
      });
      for (int64_t b = samples.begin; b < samples.end; ++b)
        sum_blocks(b, p.mean, length, [&](int64_t k) { return part_of(b, k); });
    } else {
      parallel_rows(samples, channels, row_bytes,
                    [&](int64_t b, Range r) { kernels.sum_x(p, b, r, at(out.s, b, channels)); });
      for (int64_t b = samples.begin; b < samples.end; ++b)
        sum_blocks(b, p.mean, length, [&](int64_t) { return at(out.s, b, channels); });
    }
  }
};

// ---- backward

struct BackwardCall : Call<BackwardParams> {
  void *vx, *v, *dz, *da, *dh, *a, *part_vx, *part_v;
  Coefficients u, dx;

  size_t carve(void* workspace) {
    const Sizes& n = p.sizes;
    cpu::Arena arena(workspace);
    for (void** array : {&vx, &v, &u.s, &u.t, &dx.s, &dx.t}) *array = arena.take(n.batch * n.channels, size);
    dz = p.w1 || !p.dsrc ? arena.take(n.batch * n.width, size) : p.dsrc;
    for (void** array : {&da, &dh, &a}) *array = arena.take(n.batch * n.hidden, size);
    for (void** array : {&part_vx, &part_v}) *array = arena.take(part_elements(p, plan), size);
    return static_cast<size_t>(arena.used());
  }

  bool wants_weights() const { return p.dw1 || p.db1 || p.dw2 || p.db2 || p.dact_weight; }
  bool wants_mean() const { return p.dsrc || (p.dx.data && !p.src); }
  bool wants_sums() const { return wants_weights() || wants_mean() || p.ddrop_path; }
  const void* first() const { return p.w2 ? dh : dz; }  // gradient at the first layer's output

  // dm of the samples, where it goes: dsrc, or dx's addend
  void grad_mean(Range samples, Range channels) const {
    if (p.w1 && wants_mean()) kernels.grad_mean(p, samples, channels, first(), p.dsrc ? p.dsrc : dx.t);
  }
  // dx = d gain s v + dm / L; u's s holds d gain s
  Coefficients dx_coefficients() const { return {u.s, p.src ? dx.s : dx.t}; }

  void grouped(Range samples) const {
    const Sizes& n = p.sizes;
    kernels.coefficients(p, p.logits, samples, u);
    for (int64_t b = samples.begin; wants_sums() && b < samples.end; ++b)
      for (int64_t k = 0; k < blocks(p); ++k) {
        void *vx_part = at(dx.s, b, n.channels), *v_part = at(dx.t, b, n.channels);
        kernels.sum_grads(p, u, b, block(k), vx_part, v_part);
        kernels.add(accumulation(p.dtype), vx_part, at(vx, b, n.channels), n.channels, k == 0, 1.0);
        kernels.add(accumulation(p.dtype), v_part, at(v, b, n.channels), n.channels, k == 0, 1.0);
      }
    if (wants_sums()) kernels.grad_logits(p, samples, vx, v, dz);
    if (n.hidden && (wants_weights() || wants_mean())) kernels.grad_hidden(p, samples, {0, n.hidden}, dz, da, dh, a);
    grad_mean(samples, {0, n.channels});
    clear_addend(samples);
    if (p.dx.data || p.dresidual.data)
      for (int64_t b = samples.begin; b < samples.end; ++b)
        kernels.grad_x(p, u, dx_coefficients(), b, {0, rows(p)}, plan.stream);
  }

  // With src given nothing of the mean flows into dx.
  void clear_addend(Range samples) const {
    if (!p.src) return;
    const int64_t n = p.sizes.channels;
    std::fill_n(static_cast<std::byte*>(at(dx.s, samples.begin, n)), (samples.end - samples.begin) * n * size,
                std::byte{0});
  }

  void phased(Range samples) const {
    const Sizes& n = p.sizes;
    const int64_t count = samples.end - samples.begin, row_bytes = columns(p) * size_of(p.dtype);
    parallel_rows(samples, 1, n.channels * 32,
                  [&](int64_t b, Range) { kernels.coefficients(p, p.logits, {b, b + 1}, u); });
    if (wants_sums()) {
      sums(samples, row_bytes);
      parallel_rows(samples, 1, n.width * 32, [&](int64_t b, Range) { kernels.grad_logits(p, {b, b + 1}, vx, v, dz); });
    }
    // columns in whole cache lines
    const auto parallel_columns = [&](int64_t total, int64_t inner, const auto& f) {
      constexpr int64_t unit = 32;
      parallel(ceil_div(total, unit), unit * inner * (count + size_of(p.weight_dtype)),
               [&](Range r) { f(Range{r.begin * unit, std::min(total, r.end * unit)}); });
    };
    if (n.hidden && (wants_weights() || wants_mean()))
      parallel_columns(n.hidden, n.width, [&](Range r) { kernels.grad_hidden(p, samples, r, dz, da, dh, a); });
    if (p.w1 && wants_mean())
      parallel_columns(n.channels, p.w2 ? n.hidden : n.width, [&](Range r) { grad_mean(samples, r); });
    clear_addend(samples);
    if (p.dx.data || p.dresidual.data)
      parallel_rows(samples, rows(p), 2 * row_bytes,
                    [&](int64_t b, Range r) { kernels.grad_x(p, u, dx_coefficients(), b, r, plan.stream); });
  }

  void sums(Range samples, int64_t row_bytes) const {
    const int64_t channels = p.sizes.channels, count = blocks(p);
    if (count == 1 && !channels_last(p)) {
      parallel_rows(samples, channels, 2 * row_bytes, [&](int64_t b, Range r) {
        kernels.sum_grads(p, u, b, r, at(vx, b, channels), at(v, b, channels));
      });
      return;
    }
    const auto part_of = [&](void* part, void* total, int64_t b, int64_t k) {
      return count == 1 ? at(total, b, channels) : at(part, (b - samples.begin) * count + k, channels);
    };
    parallel_rows(samples, count, 2 * block_rows(p) * row_bytes, [&](int64_t b, Range r) {
      for (int64_t k = r.begin; k < r.end; ++k)
        kernels.sum_grads(p, u, b, block(k), part_of(part_vx, vx, b, k), part_of(part_v, v, b, k));
    });
    for (int64_t b = samples.begin; count > 1 && b < samples.end; ++b) {
      sum_blocks(b, vx, 1.0, [&](int64_t k) { return part_of(part_vx, vx, b, k); });
      sum_blocks(b, v, 1.0, [&](int64_t k) { return part_of(part_v, v, b, k); });
    }
  }

  void weights() const {
    const Sizes& n = p.sizes;
    const int64_t first_rows = p.w2 ? n.hidden : n.width;
    if (p.dw1 || p.db1)
      parallel(ceil_div(first_rows, 4), 16 * n.batch * n.channels,
               [&](Range r) { kernels.grad_w1(p, {4 * r.begin, std::min(first_rows, 4 * r.end)}, first()); });
    if (p.dw2 || p.db2)
      parallel(ceil_div(n.width, 4), 16 * n.batch * n.hidden,
               [&](Range r) { kernels.grad_w2(p, {4 * r.begin, std::min(n.width, 4 * r.end)}, dz, a); });
    if (p.dact_weight) kernels.grad_act_weight(p, da);
  }
};

ForwardCall forward_call(const ForwardParams& p, const ThreadPool& pool, const CpuKernels& kernels) {
  return {{p, pool, kernels, make_plan(p, pool.threads, 1)}, nullptr, nullptr, {}};
}

BackwardCall backward_call(const BackwardParams& p, const ThreadPool& pool, const CpuKernels& kernels) {
  return {{p, pool, kernels, make_plan(p, pool.threads, 2)}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
}

}  // namespace

size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool) {
  return forward_call(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool) {
  return backward_call(params, pool, cpu_kernels(cpu::Isa::scalar)).carve(nullptr);
}

Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  ForwardCall call = forward_call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.each_group([&](Range r) { call.grouped(r); }, [&](Range r) { call.phased(r); });
  return {};
}

Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  BackwardCall call = backward_call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.each_group([&](Range r) { call.grouped(r); }, [&](Range r) { call.phased(r); });
  call.weights();
  return {};
}

size_t squeeze_workspace_cpu(const ForwardParams& params, const ThreadPool& pool) {
  return forward_workspace_cpu(params, pool);
}

Status launch_squeeze_cpu(const ForwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  ForwardCall call = forward_call(params, pool, cpu_kernels(cpu::active_isa()));
  call.carve(params.workspace);
  call.each_group([&](Range r) { call.squeeze_grouped(r); }, [&](Range r) { call.squeeze_phased(r); });
  return {};
}

}  // namespace attnkern::squeeze_excite
