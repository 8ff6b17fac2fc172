// The elementwise passes over the feature maps.
//
//   Computes  y = out_act(residual + s x + t);  dx = s v + t,  v = dy out_act'(u)
//   Layout    a row is contiguous: L positions of a channel, or C channels of a position (params.h)
//   Mapping   one call a range of rows of one sample on one thread; a vector is adjacent elements of a row, or of two
//             where rows are joined
//   Traffic   each map is read or written once by each call, past the caches where cpu.cpp says so
//   Numerics  accumulation dtype, one rounding to the map's
namespace attnkern::squeeze_excite::ATTNKERN_ISA {

// step(i, access, streaming) over a row of n elements whose output begins at `out`; streaming is a constant, so that
// the loop over whole vectors has no branch
template <class T, class F>
ATTNKERN_INLINE void each_vector(const T* out, int64_t n, bool streaming, bool bitwise, const F& step) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>, bytes = lanes * sizeof(T);
  int64_t i = 0;
  if (streaming) {
    const int64_t ahead = reinterpret_cast<uintptr_t>(out) % bytes;
    const int64_t head = (bytes - ahead) / static_cast<int64_t>(sizeof(T));
    if (ahead && (bitwise || ahead % sizeof(T) || head >= n)) {
      streaming = false;
    } else if (ahead) {
      step(0, Part{head}, std::false_type{});
      i = head;
    }
  }
  if (streaming)
    for (; i + lanes <= n; i += lanes) step(i, Whole{}, std::true_type{});
  else
    for (; i + lanes <= n; i += lanes) step(i, Whole{}, std::false_type{});
  if (i < n) step(i, Part{n - i}, std::false_type{});
}

// out = s in + t over `rows` rows of n elements that follow one another (cpu_kernels.h: joins_rows): whole aligned
// vectors, one of which may end a row and begin the next.
template <class T, class A>
void scale_joined(const T* in, T* out, const A* s, const A* t, int64_t n, int64_t rows, bool streaming) {
  constexpr int64_t lanes = kLanes<A>, bytes = lanes * sizeof(T);
  const auto scale = [&](auto streaming) ATTNKERN_INLINE_LAMBDA {
    const auto step = [&](int64_t i, auto access, Vec<A> si, Vec<A> ti)
                          ATTNKERN_INLINE_LAMBDA { access.write(out + i, access.read(in + i) * si + ti, streaming); };
    const int64_t ahead = reinterpret_cast<uintptr_t>(out) % bytes / sizeof(T);
    int64_t i = ahead ? lanes - ahead : 0;
    if (i) step(0, Part{i}, splat(s[0]), splat(t[0]));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = (row + 1) * n;
      const Vec<A> si = splat(s[row]), ti = splat(t[row]);
      for (; i + lanes <= end; i += lanes) step(i, Whole{}, si, ti);
      if (i >= end) continue;
      if (row + 1 == rows) return step(i, Part{end - i}, si, ti);
      const Mask<A> own = lane_index<A>() < static_cast<Int<A>>(end - i);
      step(i, Whole{}, own ? si : splat(s[row + 1]), own ? ti : splat(t[row + 1]));
      i += lanes;
    }
  };
  streaming ? scale(std::true_type{}) : scale(std::false_type{});
}

template <class T, bool last>
void rescale_rows(const ForwardParams& p, const Coefficients& coefficients, int64_t b, Range range, bool streaming) {
  using A = Accumulator<T>;
  const int64_t n = columns_of(p), rows = last ? p.sizes.length : p.sizes.channels;
  const Act act = p.options.out_act;
  const bool plain = act == Act::identity && !p.residual.data;  // y = s x + t, the loop most calls spend their time in
  if constexpr (!last) {
    if (joins_rows(p)) {
      const int64_t at = b * p.sizes.channels + range.begin;
      scale_joined(row_of<T>(p.x, b, range.begin), row_of<T>(p.y, b, range.begin),
                   static_cast<const A*>(coefficients.s) + at, static_cast<const A*>(coefficients.t) + at, n,
                   range.end - range.begin, streaming);
      range.begin = range.end;
    }
  }
  for (int64_t row = range.begin; row < range.end; ++row) {
    const T* x = row_of<T>(p.x, b, row);
    const T* residual = row_of<T>(p.residual, b, row);
    T* y = row_of<T>(p.y, b, row);
    uint8_t* bits = p.mask ? p.mask + (b * rows + row) * ((n + 7) / 8) : nullptr;
    const Coefficient<A, last> s(coefficients.s, b, row, p.sizes.channels), t(coefficients.t, b, row, p.sizes.channels);
    if (plain) {
      each_vector(y, n, streaming, false, [&](int64_t i, auto access, auto streaming) ATTNKERN_INLINE_LAMBDA {
        access.write(y + i, access.read(x + i) * s.at(i, access) + t.at(i, access), streaming);
      });
      continue;
    }
    each_vector(y, n, streaming, bits, [&](int64_t i, auto access, auto streaming) ATTNKERN_INLINE_LAMBDA {
      Vec<A> u = access.read(x + i) * s.at(i, access) + t.at(i, access);
      if (residual) u += access.read(residual + i);
      if (bits) write_bits<A>(bits, i, n, to_bits<A>(activation_grad<A>(act, u, Vec<A>{}) != 0));
      if (act != Act::identity) u = activation<A>(act, u, Vec<A>{});
      access.write(y + i, u, streaming);
    });
  }
  if (streaming) fence();
}

void rescale(const ForwardParams& p, const Coefficients& c, int64_t b, Range rows, bool streaming) {
  cpu::visit(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.layout == Layout::channels_last ? rescale_rows<T, true>(p, c, b, rows, streaming)
                                      : rescale_rows<T, false>(p, c, b, rows, streaming);
  });
}

template <class T, bool last>
void grad_x_rows(const BackwardParams& p, const Coefficients& u, const Coefficients& c, int64_t b, Range range,
                 bool streaming) {
  using A = Accumulator<T>;
  const int64_t n = columns_of(p);
  if constexpr (!last) {
    if (joins_rows(p)) {
      const int64_t at = b * p.sizes.channels + range.begin;
      scale_joined(row_of<T>(p.dy, b, range.begin), row_of<T>(p.dx, b, range.begin), static_cast<const A*>(c.s) + at,
                   static_cast<const A*>(c.t) + at, n, range.end - range.begin, streaming);
      range.begin = range.end;
    }
  }
  visit_grad<T, last>(p, u, [&](const auto& grad) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      const auto v = grad(b, row);
      T* dx = row_of<T>(p.dx, b, row);
      T* dresidual = row_of<T>(p.dresidual, b, row);
      const Coefficient<A, last> s(c.s, b, row, p.sizes.channels), t(c.t, b, row, p.sizes.channels);
      if (!dresidual) {
        each_vector(dx, n, streaming, p.mask, [&](int64_t i, auto access, auto streaming) ATTNKERN_INLINE_LAMBDA {
          access.write(dx + i, v.at(i, access) * s.at(i, access) + t.at(i, access), streaming);
        });
        continue;
      }
      each_vector(dx ? dx : dresidual, n, streaming, p.mask,
                  [&](int64_t i, auto access, auto streaming) ATTNKERN_INLINE_LAMBDA {
                    const Vec<A> vi = v.at(i, access);
                    access.write(dresidual + i, vi, false);
                    if (dx) access.write(dx + i, vi * s.at(i, access) + t.at(i, access), streaming);
                  });
    }
  });
  if (streaming) fence();
}

void grad_x(const BackwardParams& p, const Coefficients& u, const Coefficients& dx, int64_t b, Range rows,
            bool streaming) {
  cpu::visit(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.layout == Layout::channels_last ? grad_x_rows<T, true>(p, u, dx, b, rows, streaming)
                                      : grad_x_rows<T, false>(p, u, dx, b, rows, streaming);
  });
}

}  // namespace attnkern::squeeze_excite::ATTNKERN_ISA
