// Between the sweeps, in [C]-land: one block's share of one sample's MLP, forward and backward. A block owns a range of
// channels: their columns of the first layer, their rows of the second. Blocks of a cluster add their parts in rank
// order. Nothing here depends on the map's type: it is compiled once and called.
#pragma once

#include "ops/squeeze_excite/sweeps.cuh"

namespace attnkern::squeeze_excite {

template <class W>
ATTNKERN_DEVICE float weight(const void* weights, int64_t i) {
  return widen(load_global(static_cast<const W*>(weights) + i));
}

// A bias, or 0.
template <class W>
ATTNKERN_DEVICE float bias(const void* biases, int64_t i) {
  return biases ? weight<W>(biases, i) : 0.0f;
}

ATTNKERN_DEVICE float* floats(void* p, int64_t offset) { return static_cast<float*>(p) + offset; }
ATTNKERN_DEVICE const float* floats(const void* p, int64_t offset) { return static_cast<const float*>(p) + offset; }

// One sample's share of one block.
struct Share {
  int64_t sample;
  bool whole;  // all channels: the last block of a streamed sample; else those of the rank in its cluster
};

struct Workspace {
  float* dz;           // [B, width]
  float* da;           // [B, R]
  float* dm;           // [B, C]; streamed
  float* partial;      // [B, pieces, sums, channels_here]; streamed
  uint32_t* counters;  // ticket, [B] pieces done, [B] samples ready; zeroed
};

// done(r, sum_c weights[r * stride + c] v[c]) for r < rows, c < columns, called by one thread a row.
template <class W, class Done>
ATTNKERN_DEVICE void dot_rows(const void* weights, int64_t stride, int rows, int columns, const Shared<float>& v,
                              const Done& done) {
  const int width = power_of_two_above(columns, kWarpSize);
  const int groups = block_size() / width, group = thread_index() / width, lane = thread_index() % width;
  for (int base = 0; base < rows; base += groups) {
    const int row = base + group;
    float sum = 0.0f;
    if (row < rows) {
#pragma unroll 4
      for (int c = lane; c < columns; c += width) sum += weight<W>(weights, row * stride + c) * v.load(c);
    }
    sum = lanes_sum(sum, width);
    if (row < rows && lane == 0) done(row, sum);
  }
}

// done(c, sum_r weights[r * stride + c] v[r]) for c < columns, r < rows: a thread a column and every `groups`-th row.
template <class W, class Done>
ATTNKERN_DEVICE void dot_columns(const void* weights, int64_t stride, int rows, int columns, const Shared<float>& v,
                                 const Shared<float>& scratch, const Done& done) {
  for (int begin = 0; begin < columns; begin += block_size()) {
    const int width = columns - begin < block_size() ? columns - begin : block_size();
    const int groups = block_size() / width, group = thread_index() / width, column = thread_index() % width;
    float sum = 0.0f;
    if (group < groups) {
#pragma unroll 4
      for (int r = group; r < rows; r += groups) sum += weight<W>(weights, r * stride + begin + column) * v.load(r);
    }
    scratch.store(thread_index(), sum);
    block_sync();
    if (group == 0) {
      for (int g = 1; g < groups; ++g) sum += scratch.load(g * width + column);
      done(begin + column, sum);
    }
    block_sync();
  }
}

// Channels [begin, begin + count) and the rank that owns any channel.
struct Ownership {
  const Inputs& p;
  const Plan& plan;
  bool whole;
  int rank;

  ATTNKERN_DEVICE Ownership(const Inputs& p, const Plan& plan, bool whole)
      : p(p), plan(plan), whole(whole), rank(whole ? 0 : cluster_rank()) {}

  ATTNKERN_DEVICE int64_t begin_of(int of_rank) const {
    if (whole) return 0;
    if (p.layout == Layout::channels_last) return Piece::min64(p.sizes.channels, int64_t{of_rank} * plan.channels_own);
    const int64_t begin =
        (of_rank * plan.chunk + p.sizes.length - 1) / p.sizes.length;  // the first row that begins here
    return Piece::min64(p.sizes.channels, begin);
  }
  ATTNKERN_DEVICE int64_t begin() const { return begin_of(rank); }
  ATTNKERN_DEVICE int count() const {
    return static_cast<int>((whole ? p.sizes.channels : begin_of(rank + 1)) - begin());
  }
  ATTNKERN_DEVICE int owner(int64_t channel) const {
    if (whole) return 0;
    return static_cast<int>(p.layout == Layout::channels_last ? channel / plan.channels_own
                                                              : channel * p.sizes.length / plan.chunk);
  }
  // A value that the channel's owner keeps: of its logit (part 0) or shift (part 1).
  ATTNKERN_DEVICE float gather(const Shared<float>& values, int64_t channel, int part) const {
    const int from = owner(channel);
    return remote(values, from).load(part * plan.channels_own + static_cast<int>(channel - begin_of(from)));
  }
};

// A channel's sums over the pieces that hold it, in order: from the cluster's shared memory, or from the workspace.
template <int sums>
ATTNKERN_DEVICE Vec<float, sums> channel_sums(const Inputs& p, const Plan& plan, const Workspace& w, const Arrays& s,
                                              const Share& share, int64_t channel) {
  int64_t from, to, local;
  if (p.layout == Layout::channels_last) {
    const int64_t blocks = (p.sizes.channels + plan.block_columns - 1) / plan.block_columns;
    const int64_t block = channel / plan.block_columns, pieces = plan.pieces / blocks;
    from = block * pieces;
    to = from + pieces - 1;
    local = channel - block * plan.block_columns;
  } else {
    from = channel * p.sizes.length / plan.chunk;
    to = (channel * p.sizes.length + p.sizes.length - 1) / plan.chunk;
    local = 0;
  }
  // Runs of 32 first: one chain over a thousand pieces would round as often.
  Vec<float, sums> total{};
  for (int64_t run = from; run <= to; run += 32) {
    Vec<float, sums> part{};
    for (int64_t piece = run; piece <= to && piece < run + 32; ++piece) {
      if (p.layout == Layout::channels_first) local = channel - piece * plan.chunk / p.sizes.length;
#pragma unroll
      for (int k = 0; k < sums; ++k) {
        const int64_t slot = k * plan.channels_here + local;
        part[k] +=
            share.whole
                ? load_global(w.partial + (share.sample * plan.pieces + piece) * sums * plan.channels_here + slot)
                : remote(s.sums, static_cast<int>(piece)).load(static_cast<int>(slot));
      }
    }
#pragma unroll
    for (int k = 0; k < sums; ++k) total[k] += part[k];
  }
  return total;
}

// Where the pieces of a cluster end inside a channel, or each holds all of them.
ATTNKERN_DEVICE bool shares_channels(const Inputs& p, const Plan& plan) {
  return plan.cluster > 1 && (p.layout == Layout::channels_last || plan.chunk % p.sizes.length != 0);
}

// Blocks that share channels wait for each other; else the block alone.
ATTNKERN_DEVICE void share_sync(bool shared) {
  if (shared)
    cluster_sync();
  else
    block_sync();
}

// Sum over the cluster of exchange[i], in rank order.
ATTNKERN_DEVICE float cluster_total(const Arrays& s, int i) {
  float total = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank) total += remote(s.exchange, rank).load(i);
  return total;
}

template <class W>
ATTNKERN_DEVICE float hidden_slope(const Inputs& p, int64_t r) {
  return p.options.act == Act::prelu ? weight<W>(p.act_weight, r * p.act_weight_stride)
                                     : static_cast<float>(p.options.act_slope);
}

// a and t of the channels [first, first + count), from the logits: in global memory, or with the cluster that made
// them.
ATTNKERN_DEVICE_CALL void write_scaling(const Inputs& p, const Plan& plan, const void* logits, int64_t sample,
                                        int64_t first, int count) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, false);
  const float scale = branch_scale(p, sample);
  const auto z = [&](int64_t channel, int part) {
    return logits ? load_global(floats(logits, sample * p.sizes.width + part * p.sizes.channels + channel))
                  : own.gather(s.out, channel, part);
  };
  const bool shifts = p.options.apply == Apply::scale_shift;
  for (int i = thread_index(); i < count; i += block_size()) {
    const Scaling st = scaling(p.options, z(first + i, 0), shifts ? z(first + i, 1) : 0.0f);
    s.a.store(i, scale * st.s);
    s.t.store(i, shifts || p.options.apply == Apply::shift ? scale * st.t : -0.0f);  // a x + -0 is a x, also at x = -0
  }
}

// ------------------------------------------------------------------ forward

// Sums of the owned channels -> m, in s.in and in the output.
ATTNKERN_DEVICE_CALL void finish_sums(const ForwardParams& p, const Plan& plan, const Workspace& w,
                                      const Share& share) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, share.whole);
  const int64_t begin = own.begin();
  const int count = own.count();
  for (int i = thread_index(); i < count; i += block_size()) {
    const float sum = channel_sums<1>(p, plan, w, s, share, begin + i)[0];
    const float mean = sum / static_cast<float>(p.sizes.length);
    store_global(floats(p.mean, share.sample * p.sizes.channels + begin + i), mean);
    if (plan.channels_own) s.in.store(i, mean);
  }
  block_sync();
}

// s.in = m of the owned channels -> s.out = z of the same (and of their shifts), and the outputs hidden and logits.
template <class W>
ATTNKERN_DEVICE_CALL void run_mlp(const ForwardParams& p, const Plan& plan, const Workspace&, const Share& share) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, share.whole);
  const Sizes& n = p.sizes;
  const int64_t begin = own.begin();
  const int count = own.count();
  const bool two = p.w2 != nullptr;
  dot_rows<W>(static_cast<const W*>(p.w1) + begin, n.channels, static_cast<int>(two ? n.hidden : n.width), count, s.in,
              [&](int r, float sum) { s.exchange.store(r, sum); });
  cluster_sync();
  if (two) {
    for (int r = thread_index(); r < n.hidden; r += block_size()) {
      const float h = cluster_total(s, r) + bias<W>(p.b1, r);
      if (own.rank == 0) store_global(floats(p.hidden, share.sample * n.hidden + r), h);
      s.hidden.store(r, activation(p.options.act, h, hidden_slope<W>(p, r)));
    }
    block_sync();
  }
  for (int64_t part = 0; part * n.channels < n.width; ++part) {  // the logits of s, then of t
    const int64_t first = part * n.channels + begin;
    const auto done = [&](int i, float z) {
      store_global(floats(p.logits, share.sample * n.width + first + i), z);
      s.out.store(static_cast<int>(part) * plan.channels_own + i, z);
    };
    if (two)
      dot_rows<W>(static_cast<const W*>(p.w2) + first * n.hidden, n.hidden, count, static_cast<int>(n.hidden), s.hidden,
                  [&](int i, float sum) { done(i, sum + bias<W>(p.b2, first + i)); });
    else
      for (int i = thread_index(); i < count; i += block_size())
        done(i, cluster_total(s, static_cast<int>(first) + i) + bias<W>(p.b1, first + i));
  }
}

ATTNKERN_DEVICE void finish_sample(const ForwardParams&, const Plan&, const Share&) {}

// ------------------------------------------------------------------ backward

// Sums of the owned channels -> dz, in s.in and in the workspace, and this block's part of the drop path's gradient.
ATTNKERN_DEVICE_CALL void finish_sums(const BackwardParams& p, const Plan& plan, const Workspace& w,
                                      const Share& share) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, share.whole);
  const Sizes& n = p.sizes;
  const Options& o = p.options;
  const int64_t begin = own.begin(), row = share.sample * n.width;
  const int count = own.count();
  const float scale = branch_scale(p, share.sample);
  const bool shifts = o.apply == Apply::scale_shift;
  float drop = 0.0f;
  for (int i = thread_index(); i < count; i += block_size()) {
    const int64_t channel = begin + i;
    const auto [vx, v] = channel_sums<2>(p, plan, w, s, share, channel).values;
    const float z = load_global(floats(p.logits, row + channel));
    const Scaling st = scaling(o, z, shifts ? load_global(floats(p.logits, row + n.channels + channel)) : 0.0f);
    const float ds = gate_backward(o.gate, scale * (o.apply == Apply::shift ? v : vx), z,
                                   static_cast<float>(o.gate_slope), static_cast<float>(o.gate_offset));
    drop += st.s * vx + st.t * v;
    for (int part = 0; part <= shifts; ++part) {
      const int64_t at = row + part * n.channels + channel;
      float dz = part ? scale * v : ds;
      if (p.dlogits) dz += load_global(floats(p.dlogits, at));
      store_global(w.dz + at, dz);
      if (!p.w1 && p.dsrc) store_global(floats(p.dsrc, at), dz);
      if (plan.channels_own) s.in.store(part * plan.channels_own + i, dz);
    }
  }
  if (p.ddrop_path) {
    drop = block_sum(drop, s.scratch);
    if (thread_index() == 0) s.drop.store(0, drop);
  }
  block_sync();
}

// s.in = dz of the owned channels (and shifts) -> s.out = dm of the same; da, and dm of a streamed sample, in the
// workspace.
template <class W>
ATTNKERN_DEVICE_CALL void run_mlp(const BackwardParams& p, const Plan& plan, const Workspace& w, const Share& share) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, share.whole);
  const Sizes& n = p.sizes;
  const int64_t begin = own.begin();
  const int count = own.count();
  int rows;
  if (!p.w1) {
    cluster_sync();
    return;
  }
  if (p.w2) {
    rows = static_cast<int>(n.hidden);
    for (int part = 0; part * n.channels < n.width; ++part)
      dot_columns<W>(static_cast<const W*>(p.w2) + (part * n.channels + begin) * n.hidden, n.hidden, count, rows,
                     s.in.slice(part * plan.channels_own, count), s.scratch,
                     [&](int r, float sum) { s.exchange.store(r, part ? s.exchange.load(r) + sum : sum); });
    cluster_sync();
    for (int r = thread_index(); r < rows; r += block_size()) {
      const float da = cluster_total(s, r), h = load_global(floats(p.hidden, share.sample * n.hidden + r));
      if (own.rank == 0) store_global(w.da + share.sample * n.hidden + r, da);
      s.hidden.store(r, activation_backward(p.options.act, da, h, hidden_slope<W>(p, r)));
    }
  } else {
    rows = static_cast<int>(n.width);
    cluster_sync();
    for (int o = thread_index(); o < rows; o += block_size()) {
      const int part = o >= n.channels;
      s.hidden.store(o, own.gather(s.in, o - part * n.channels, part));
    }
  }
  block_sync();
  dot_columns<W>(static_cast<const W*>(p.w1) + begin, n.channels, rows, count, s.hidden, s.scratch,
                 [&](int i, float dm) {
                   s.out.store(i, dm);
                   const int64_t at = share.sample * n.channels + begin + i;
                   if (p.dsrc) store_global(floats(p.dsrc, at), dm);
                   if (share.whole) store_global(w.dm + at, dm);
                 });
}

// ddrop_path, after a barrier of the cluster.
ATTNKERN_DEVICE void finish_sample(const BackwardParams& p, const Plan& plan, const Share& share) {
  const Arrays s(p, plan);
  if (!p.ddrop_path || Ownership(p, plan, share.whole).rank != 0 || thread_index() != 0) return;
  float total = 0.0f;
  for (int rank = 0; rank < (share.whole ? 1 : cluster_size()); ++rank) total += remote(s.drop, rank).load(0);
  store_global(floats(p.ddrop_path, share.sample), static_cast<float>(p.options.gain) * total);
}

// k = dm / L of the channels [first, first + count): from global memory, or from the cluster; 0 where x is not
// squeezed.
ATTNKERN_DEVICE_CALL void write_shift(const BackwardParams& p, const Plan& plan, const float* dm, int64_t sample,
                                      int64_t first, int count) {
  const Arrays s(p, plan);
  const Ownership own(p, plan, false);
  for (int i = thread_index(); i < count; i += block_size()) {
    float k = 0.0f;
    if (p.w1 && !p.src)
      k = (dm ? load_global(dm + sample * p.sizes.channels + first + i) : own.gather(s.out, first + i, 0)) /
          static_cast<float>(p.sizes.length);
    s.k.store(i, k);
  }
}

}  // namespace attnkern::squeeze_excite
