// Kernels over what is [B, C]-sized: the excite MLP as small matrix products, gates, and their gradients.
//
//   Computes  h = W1 m + b1;  z = W2 act(h) + b2;  s, t of z;  dz, dh, dm, dW1, dW2, db1, db2, dact_weight
//   Layout    weights [out, in]; activations [B, in], accumulation dtype
//   Mapping   one call a range of samples and of outputs on one thread; register tiles of samples x outputs
//   Traffic   weights are read once for each tile of samples
//   Numerics  accumulation dtype; an output's order of summation depends on the shape alone
namespace attnkern::squeeze_excite::ATTNKERN_ISA {

constexpr int kTile = ATTNKERN_BYTES == 64 ? 4 : 2;  // kTile x 4 accumulators fill half of the registers

// f(A{}, W{}): accumulation type and weight type
template <class F>
void visit_weights(const Inputs& p, const F& f) {
  if (p.dtype == DType::float64) return p.weight_dtype == DType::float64 ? f(double{}, double{}) : f(double{}, float{});
  cpu::visit(p.weight_dtype, [&](auto w) {
    if constexpr (!std::is_same_v<decltype(w), double>) f(float{}, w);
  });
}

template <class A, class T>
ATTNKERN_INLINE Vec<A> load_as_n(const T* p, int64_t n) {
  if constexpr (std::is_same_v<A, Accumulator<T>>) {
    return load_n(p, n);
  } else {
    Vec<A> v{};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
}

template <class A, class T>
ATTNKERN_INLINE A read_as(const T* p) {
  if constexpr (sizeof(T) == 2)
    return load_n(p, 1)[0];
  else
    return *p;
}

template <class A, class T>
ATTNKERN_INLINE void write_as(T* p, Vec<A> v, int64_t n) {
  if constexpr (std::is_same_v<A, Accumulator<T>>) {
    n == kLanes<A> ? store(p, v) : store_n(p, v, n);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(v[i]);
  }
}

// ---- out[b, i] = bias[i] + sum_k in[b, k] w[i, k]: lanes along k

template <int M, int N, class A, class W>
ATTNKERN_INLINE void dot_tile(const A* in, const W* w, const W* bias, A* out, int64_t inner, int64_t ld_out) {
  Vec<A> sums[M][N] = {};
  const auto step = [&](int64_t k, const auto& read, const auto& read_weight) {
    Vec<A> x[M];
    for (int m = 0; m < M; ++m) x[m] = read(in + m * inner + k);
    for (int n = 0; n < N; ++n) {
      const Vec<A> wn = read_weight(w + n * inner + k);
      for (int m = 0; m < M; ++m) sums[m][n] += x[m] * wn;
    }
  };
  int64_t k = 0;
  for (; k + kLanes<A> <= inner; k += kLanes<A>)
    step(k, [](const A* p) { return load(p); }, [](const W* p) { return load_as<A>(p); });
  if (k < inner)
    step(k, [&](const A* p) { return load_n(p, inner - k); }, [&](const W* p) { return load_as_n<A>(p, inner - k); });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * ld_out + n] = sum<A>(sums[m][n]) + (bias ? read_as<A>(bias + n) : A(0));
}

template <int M, class A, class W>
void dot_rows(const A* in, const W* w, const W* bias, A* out, Range rows, int64_t inner, int64_t ld_out) {
  int64_t i = rows.begin;
  for (; i + 4 <= rows.end; i += 4)
    dot_tile<M, 4>(in, w + i * inner, bias ? bias + i : nullptr, out + i, inner, ld_out);
  for (; i < rows.end; ++i) dot_tile<M, 1>(in, w + i * inner, bias ? bias + i : nullptr, out + i, inner, ld_out);
}

template <class A, class W>
void linear(const A* in, const W* w, const W* bias, A* out, Range samples, Range rows, int64_t inner, int64_t ld_out) {
  int64_t b = samples.begin;
  for (; b + kTile <= samples.end; b += kTile)
    dot_rows<kTile>(in + b * inner, w, bias, out + b * ld_out, rows, inner, ld_out);
  for (; b < samples.end; ++b) dot_rows<1>(in + b * inner, w, bias, out + b * ld_out, rows, inner, ld_out);
}

// ---- out[i, j] = sum_k a[i, k] b[k, j]: lanes along j, a of any strides

template <class A>
struct Strided {
  const A* p;
  int64_t row, column;
};

template <int M, int N, class A, class T, class Out>
ATTNKERN_INLINE void outer_tile(const Strided<A>& a, const T* b, int64_t ld_b, Out* out, int64_t ld_out, int64_t inner,
                                int64_t n) {
  constexpr int64_t kChain = 256;  // terms a lane adds before its sum joins the total
  Vec<A> total[M][N] = {};
  for (int64_t begin = 0; begin < inner; begin += kChain) {
    const int64_t end = begin + kChain < inner ? begin + kChain : inner;
    Vec<A> sums[M][N] = {};
    for (int64_t k = begin; k < end; ++k) {
      Vec<A> v[N];
      for (int j = 0; j < N; ++j) {
        const T* p = b + k * ld_b + j * kLanes<A>;
        v[j] = N == 1 && n < kLanes<A> ? load_as_n<A>(p, n) : load_as<A>(p);
      }
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < N; ++j) sums[m][j] += a.p[m * a.row + k * a.column] * v[j];
    }
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < N; ++j) total[m][j] += sums[m][j];
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) write_as<A>(out + m * ld_out + j * kLanes<A>, total[m][j], N == 1 ? n : kLanes<A>);
}

// Rows `rows` and columns `columns` of out.
template <class A, class T, class Out>
void product(const Strided<A>& a, const T* b, int64_t ld_b, Out* out, int64_t ld_out, Range rows, Range columns,
             int64_t inner) {
  constexpr int64_t lanes = kLanes<A>;
  const auto column_tile = [&](int64_t i, auto m) {
    constexpr int M = decltype(m)::value;
    const Strided<A> ai{a.p + i * a.row, a.row, a.column};
    int64_t j = columns.begin;
    for (; j + 2 * lanes <= columns.end; j += 2 * lanes)
      outer_tile<M, 2>(ai, b + j, ld_b, out + i * ld_out + j, ld_out, inner, lanes);
    for (; j < columns.end; j += lanes)
      outer_tile<M, 1>(ai, b + j, ld_b, out + i * ld_out + j, ld_out, inner,
                       columns.end - j < lanes ? columns.end - j : lanes);
  };
  int64_t i = rows.begin;
  for (; i + kTile <= rows.end; i += kTile) column_tile(i, std::integral_constant<int, kTile>{});
  for (; i < rows.end; ++i) column_tile(i, std::integral_constant<int, 1>{});
}

// out[j] = sum_k b[k, j]
template <class A, class Out>
void column_sums(const A* b, int64_t ld_b, Out* out, Range columns, int64_t inner) {
  const A one = 1;
  product(Strided<A>{&one, 0, 0}, b, ld_b, out, 0, {0, 1}, columns, inner);
}

// ---- elementwise over [begin, end)

template <class A, class F>
ATTNKERN_INLINE void elementwise(Range range, const F& f) {
  int64_t i = range.begin;
  for (; i + kLanes<A> <= range.end; i += kLanes<A>) f(i, Whole{});
  if (i < range.end) f(i, Part{range.end - i});
}

template <class A, class W>
ATTNKERN_INLINE Vec<A> act_slopes(const Inputs& p, int64_t unit, int64_t n) {
  if (p.act_weight == nullptr) return splat(static_cast<A>(p.options.act_slope));
  const W* slopes = static_cast<const W*>(p.act_weight) + unit * p.act_weight_stride;
  if (p.act_weight_stride == 0) return splat(read_as<A>(slopes));
  return n < kLanes<A> ? load_as_n<A>(slopes, n) : load_as<A>(slopes);
}

ATTNKERN_INLINE int64_t lanes_of(const Part& part, int64_t) { return part.n; }
ATTNKERN_INLINE int64_t lanes_of(const Whole&, int64_t all) { return all; }

void add(DType acc, const void* part, void* total, int64_t n, bool first, double divisor) {
  cpu::visit(acc, [&](auto t) {
    using A = decltype(t);
    if constexpr (sizeof(A) > 2) {
      const A* in = static_cast<const A*>(part);
      A* out = static_cast<A*>(total);
      const A d = static_cast<A>(divisor);
      elementwise<A>({0, n}, [&](int64_t i, auto access) {
        Vec<A> v = access.read(in + i);
        if (!first) v += access.read(out + i);
        access.write(out + i, v / d, false);
      });
    }
  });
}

// ---- forward

void hidden(const ForwardParams& p, Range samples, Range rows, void* a) {
  visit_weights(p, [&](auto acc, auto weight) {
    using A = decltype(acc);
    using W = decltype(weight);
    const int64_t r = p.sizes.hidden;
    const A* in = static_cast<const A*>(p.src ? p.src : p.mean);
    A* h = static_cast<A*>(p.hidden);
    A* out = static_cast<A*>(a);
    linear(in, static_cast<const W*>(p.w1), static_cast<const W*>(p.b1), h, samples, rows, p.sizes.channels, r);
    for (int64_t b = samples.begin; b < samples.end; ++b)
      elementwise<A>(rows, [&](int64_t i, auto access) {
        const Vec<A> slope = act_slopes<A, W>(p, i, lanes_of(access, kLanes<A>));
        access.write(out + b * r + i, activation<A>(p.options.act, access.read(h + b * r + i), slope), false);
      });
  });
}

void logits(const ForwardParams& p, Range samples, Range rows, const void* a) {
  const int64_t width = p.sizes.width;
  visit_weights(p, [&](auto acc, auto weight) {
    using A = decltype(acc);
    using W = decltype(weight);
    A* z = static_cast<A*>(p.logits);
    const A* m = static_cast<const A*>(p.src ? p.src : p.mean);
    const auto* w1 = static_cast<const W*>(p.w1);
    const auto* w2 = static_cast<const W*>(p.w2);
    if (w2)
      linear(static_cast<const A*>(a), w2, static_cast<const W*>(p.b2), z, samples, rows, p.sizes.hidden, width);
    else if (w1)
      linear(m, w1, static_cast<const W*>(p.b1), z, samples, rows, p.sizes.channels, width);
    else
      for (int64_t b = samples.begin; b < samples.end; ++b)
        elementwise<A>(rows, [&](int64_t i, auto access) {
          access.write(z + b * width + i, access.read(m + b * width + i), false);
        });
  });
}

template <class A>
ATTNKERN_INLINE A sample_scale(const Inputs& p, int64_t b) {
  return static_cast<A>(p.options.gain) * (p.drop_path ? static_cast<const A*>(p.drop_path)[b] : A(1));
}

template <class F>
ATTNKERN_INLINE void visit_accumulation(const Inputs& p, const F& f) {
  p.dtype == DType::float64 ? f(double{}) : f(float{});
}

void coefficients(const Inputs& p, const void* logits, Range samples, const Coefficients& out) {
  visit_accumulation(p, [&](auto acc) {
    using A = decltype(acc);
    const int64_t channels = p.sizes.channels;
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      const A* z = static_cast<const A*>(logits) + b * p.sizes.width;
      A* s = static_cast<A*>(out.s) + b * channels;
      A* t = static_cast<A*>(out.t) + b * channels;
      const A scale = sample_scale<A>(p, b);
      elementwise<A>({0, channels}, [&](int64_t c, auto access) {
        const Vec<A> g = gate<A>(p.options, access.read(z + c));
        Vec<A> si = g, ti = splat(A(-0.0));  // adding -0 keeps the sign of zero
        if (p.options.apply == Apply::scale1p) si = 1 + g;
        if (p.options.apply == Apply::scale_shift) ti = access.read(z + channels + c) * scale;
        if (p.options.apply == Apply::shift) si = splat(A(1)), ti = g * scale;
        access.write(s + c, si * scale, false);
        access.write(t + c, ti, false);
      });
    }
  });
}

// ---- backward

// s vx + t v
template <class A>
struct DropPathTerms {
  const Options& o;
  const A *z, *vx, *v;
  int64_t channels;
  template <class Access>
  ATTNKERN_INLINE Terms<A, 1> at(int64_t c, const Access& access) const {
    const Vec<A> g = gate<A>(o, access.read(z + c)), vxc = access.read(vx + c), vc = access.read(v + c);
    if (o.apply == Apply::scale1p) return {{(1 + g) * vxc}};
    if (o.apply == Apply::scale_shift) return {{g * vxc + access.read(z + channels + c) * vc}};
    if (o.apply == Apply::shift) return {{vxc + g * vc}};
    return {{g * vxc}};
  }
};

void grad_logits(const BackwardParams& p, Range samples, const void* sum_vx, const void* sum_v, void* dz) {
  visit_accumulation(p, [&](auto acc) {
    using A = decltype(acc);
    const int64_t channels = p.sizes.channels, width = p.sizes.width;
    const Apply apply = p.options.apply;
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      const A* z = static_cast<const A*>(p.logits) + b * width;
      const A* vx = static_cast<const A*>(sum_vx) + b * channels;
      const A* v = static_cast<const A*>(sum_v) + b * channels;
      const A* extra = p.dlogits ? static_cast<const A*>(p.dlogits) + b * width : nullptr;
      A* out = static_cast<A*>(dz) + b * width;
      const A scale = sample_scale<A>(p, b);
      elementwise<A>({0, channels}, [&](int64_t c, auto access) {
        const Vec<A> grad = access.read((apply == Apply::shift ? v : vx) + c) * scale;
        Vec<A> d = gate_backward<A>(p.options, access.read(z + c), grad);
        if (extra) d += access.read(extra + c);
        access.write(out + c, d, false);
        if (apply == Apply::scale_shift) {
          Vec<A> shift = access.read(v + c) * scale;
          if (extra) shift += access.read(extra + channels + c);
          access.write(out + channels + c, shift, false);
        }
      });
      // dd = gain sum_c (s sum_l v x + t sum_l v)
      if (p.ddrop_path) {
        A total[1];
        sum_row(channels, DropPathTerms<A>{p.options, z, vx, v, channels}, total);
        static_cast<A*>(p.ddrop_path)[b] = static_cast<A>(p.options.gain) * total[0];
      }
    }
  });
}

void grad_hidden(const BackwardParams& p, Range samples, Range columns, const void* dz, void* da, void* dh, void* a) {
  visit_weights(p, [&](auto acc, auto weight) {
    using A = decltype(acc);
    using W = decltype(weight);
    const int64_t r = p.sizes.hidden, width = p.sizes.width;
    const Strided<A> dzs{static_cast<const A*>(dz), width, 1};
    A* das = static_cast<A*>(da);
    product(dzs, static_cast<const W*>(p.w2), r, das, r, samples, columns, width);
    for (int64_t b = samples.begin; b < samples.end; ++b)
      elementwise<A>(columns, [&](int64_t i, auto access) {
        const int64_t at = b * r + i;
        const Vec<A> slope = act_slopes<A, W>(p, i, lanes_of(access, kLanes<A>));
        const Vec<A> h = access.read(static_cast<const A*>(p.hidden) + at), d = access.read(das + at);
        access.write(static_cast<A*>(dh) + at, activation_backward<A>(p.options.act, h, slope, d), false);
        access.write(static_cast<A*>(a) + at, activation<A>(p.options.act, h, slope), false);
        if (p.act_weight) access.write(das + at, h > 0 ? Vec<A>{} : d * h, false);
      });
  });
}

void grad_mean(const BackwardParams& p, Range samples, Range columns, const void* first, void* dm) {
  visit_weights(p, [&](auto acc, auto weight) {
    using A = decltype(acc);
    using W = decltype(weight);
    const int64_t channels = p.sizes.channels, inner = p.w2 ? p.sizes.hidden : p.sizes.width;
    A* out = static_cast<A*>(dm);
    product(Strided<A>{static_cast<const A*>(first), inner, 1}, static_cast<const W*>(p.w1), channels, out, channels,
            samples, columns, inner);
    if (p.src) return;
    const A length = static_cast<A>(p.sizes.length);
    for (int64_t b = samples.begin; b < samples.end; ++b)
      elementwise<A>(columns, [&](int64_t i, auto access) {
        access.write(out + b * channels + i, access.read(out + b * channels + i) / length, false);
      });
  });
}

template <class A, class W>
void grad_layer(Range rows, const void* grad, int64_t outputs, const void* in, int64_t inputs, int64_t batch, void* dw,
                void* db) {
  const A* g = static_cast<const A*>(grad);
  if (dw)
    product(Strided<A>{g, 1, outputs}, static_cast<const A*>(in), inputs, static_cast<W*>(dw), inputs, rows,
            {0, inputs}, batch);
  if (db) column_sums(g, outputs, static_cast<W*>(db), rows, batch);
}

void grad_w1(const BackwardParams& p, Range rows, const void* first) {
  visit_weights(p, [&](auto acc, auto weight) {
    grad_layer<decltype(acc), decltype(weight)>(rows, first, p.w2 ? p.sizes.hidden : p.sizes.width,
                                                p.src ? p.src : p.mean, p.sizes.channels, p.sizes.batch, p.dw1, p.db1);
  });
}

void grad_w2(const BackwardParams& p, Range rows, const void* dz, const void* a) {
  visit_weights(p, [&](auto acc, auto weight) {
    grad_layer<decltype(acc), decltype(weight)>(rows, dz, p.sizes.width, a, p.sizes.hidden, p.sizes.batch, p.dw2,
                                                p.db2);
  });
}

void grad_act_weight(const BackwardParams& p, const void* da) {
  visit_weights(p, [&](auto acc, auto weight) {
    using A = decltype(acc);
    using W = decltype(weight);
    const A* d = static_cast<const A*>(da);
    W* out = static_cast<W*>(p.dact_weight);
    const int64_t r = p.sizes.hidden, batch = p.sizes.batch;
    if (p.act_weight_stride) return column_sums(d, r, out, {0, r}, batch);
    A total[1];
    sum_row(batch * r, XTerms<A>{d}, total);
    write_as<A>(out, splat(total[0]), 1);
  });
}

}  // namespace attnkern::squeeze_excite::ATTNKERN_ISA
