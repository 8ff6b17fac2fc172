// Rows of the feature maps, and sums over positions.
//
//   Computes  sum_l x;  sum_l v x, sum_l v,  v = dy out_act'(u)
//   Layout    a row is contiguous: L positions of a channel, or C channels of a position (params.h)
//   Mapping   one call a range of rows of one sample on one thread; a vector is adjacent elements of a row
//   Traffic   each map is read once by each call; cpu.cpp keeps a sample in cache between calls
//   Numerics  rows are summed in blocks of 64 vectors, in double beyond one; positions in trees of 4; the order depends
//             on the shape alone
namespace attnkern::squeeze_excite::ATTNKERN_ISA {

template <class T>
ATTNKERN_INLINE const T* row_of(const ConstMap& map, int64_t b, int64_t row) {
  return map.data ? static_cast<const T*>(map.data) + b * map.stride_batch + row * map.stride_row : nullptr;
}

template <class T>
ATTNKERN_INLINE T* row_of(const Map& map, int64_t b, int64_t row) {
  return map.data ? static_cast<T*>(map.data) + b * map.stride_batch + row * map.stride_row : nullptr;
}

// How a vector is read and written: whole, or its first n lanes.
struct Whole {
  template <class T>
  ATTNKERN_INLINE auto read(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  ATTNKERN_INLINE void write(T* p, V v, bool streaming) const {
    streaming ? stream(p, v) : store(p, v);
  }
};
struct Part {
  int64_t n;
  template <class T>
  ATTNKERN_INLINE auto read(const T* p) const {
    return load_n(p, n);
  }
  template <class T, class V>
  ATTNKERN_INLINE void write(T* p, V v, bool) const {
    store_n(p, v, n);
  }
};

// A coefficient of a row's elements: one for all (channels first), or one a column (channels last).
template <class A, bool last>
struct Coefficient {
  const A* p;
  Vec<A> all{};
  ATTNKERN_INLINE Coefficient(const void* base, int64_t b, int64_t row, int64_t channels)
      : p(static_cast<const A*>(base) + b * channels + (last ? 0 : row)) {
    if constexpr (!last) all = splat(*p);
  }
  template <class Access>
  ATTNKERN_INLINE Vec<A> at(int64_t i, const Access& access) const {
    if constexpr (last) return access.read(p + i);
    return all;
  }
};

ATTNKERN_INLINE int64_t columns_of(const Inputs& p) {
  return p.layout == Layout::channels_last ? p.sizes.channels : p.sizes.length;
}

// ---- the bit mask: element i of a row is bit i % 8 of byte i / 8

template <class A>
ATTNKERN_INLINE uint32_t read_bits(const uint8_t* bits, int64_t i, int64_t n) {
  uint32_t value = bits[i / 8] >> (i % 8);
  if (kLanes<A> > 8 && i + 8 < n) value |= bits[i / 8 + 1] << 8;
  return value;
}

template <class A>
ATTNKERN_INLINE void write_bits(uint8_t* bits, int64_t i, int64_t n, uint32_t value) {
  if (n - i < kLanes<A>) value &= (1u << (n - i)) - 1;
  if (kLanes<A> < 8 && i % 8) {
    bits[i / 8] |= static_cast<uint8_t>(value << (i % 8));
  } else {
    bits[i / 8] = static_cast<uint8_t>(value);
    if (kLanes<A> > 8 && i + 8 < n) bits[i / 8 + 1] = static_cast<uint8_t>(value >> 8);
  }
}

// ---- v = dy out_act'(u) of one row

template <class T>
struct PlainGrad {
  const T* dy;
  template <class Access>
  ATTNKERN_INLINE auto at(int64_t i, const Access& access) const {
    return access.read(dy + i);
  }
};

template <class T>
struct MaskedGrad {
  using A = Accumulator<T>;
  const T* dy;
  const uint8_t* bits;
  int64_t n;
  template <class Access>
  ATTNKERN_INLINE Vec<A> at(int64_t i, const Access& access) const {
    return from_bits<A>(read_bits<A>(bits, i, n)) ? access.read(dy + i) : Vec<A>{};
  }
};

template <class T, bool last>
struct SmoothGrad {
  using A = Accumulator<T>;
  const T *dy, *x, *residual;
  Coefficient<A, last> s, t;
  Act act;
  template <class Access>
  ATTNKERN_INLINE Vec<A> at(int64_t i, const Access& access) const {
    Vec<A> u = access.read(x + i) * s.at(i, access) + t.at(i, access);
    if (residual) u += access.read(residual + i);
    return activation_backward<A>(act, u, Vec<A>{}, access.read(dy + i));
  }
};

// f(grad) with grad(b, row) making the row's v.
template <class T, bool last, class F>
ATTNKERN_INLINE void visit_grad(const BackwardParams& p, const Coefficients& u, const F& f) {
  const int64_t columns = columns_of(p), rows = last ? p.sizes.length : p.sizes.channels;
  if (p.options.out_act == Act::identity) {
    f([&](int64_t b, int64_t row) { return PlainGrad<T>{row_of<T>(p.dy, b, row)}; });
  } else if (p.mask) {
    f([&](int64_t b, int64_t row) {
      return MaskedGrad<T>{row_of<T>(p.dy, b, row), p.mask + (b * rows + row) * ((columns + 7) / 8), columns};
    });
  } else {
    f([&](int64_t b, int64_t row) {
      return SmoothGrad<T, last>{row_of<T>(p.dy, b, row),         row_of<T>(p.x, b, row),
                                 row_of<T>(p.residual, b, row),   {u.s, b, row, p.sizes.channels},
                                 {u.t, b, row, p.sizes.channels}, p.options.out_act};
    });
  }
}

// ---- sums

constexpr int64_t kBlock = 64;  // vectors a lane adds before its sum goes to double

// What an element adds to n sums at once.
template <class A, int n>
struct Terms {
  Vec<A> v[n];
  ATTNKERN_INLINE Terms& operator+=(const Terms& other) {
    for (int k = 0; k < n; ++k) v[k] += other.v[k];
    return *this;
  }
  ATTNKERN_INLINE friend Terms operator+(Terms a, const Terms& b) { return a += b; }
};

// x
template <class T>
struct XTerms {
  const T* x;
  template <class Access>
  ATTNKERN_INLINE Terms<Accumulator<T>, 1> at(int64_t i, const Access& access) const {
    return {{access.read(x + i)}};
  }
};

// v x and v
template <class T, class Grad>
struct GradTerms {
  const T* x;
  Grad grad;
  template <class Access>
  ATTNKERN_INLINE Terms<Accumulator<T>, 2> at(int64_t i, const Access& access) const {
    const Vec<Accumulator<T>> v = grad.at(i, access);
    return {{v * access.read(x + i), v}};
  }
};
template <class T, class Grad>
GradTerms(const T*, Grad) -> GradTerms<T, Grad>;

// out[k] = sum of term k over a row of `length` elements
template <int n, class A, class Row>
ATTNKERN_INLINE void sum_row(int64_t length, const Row& row, A (&out)[n]) {
  constexpr int64_t lanes = kLanes<A>;
  double total[n] = {};
  for (int64_t begin = 0; begin < length; begin += kBlock * lanes) {
    const int64_t end = begin + kBlock * lanes < length ? begin + kBlock * lanes : length;
    Terms<A, n> a{}, b{}, c{}, d{};
    int64_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      a += row.at(i, Whole{});
      b += row.at(i + lanes, Whole{});
      c += row.at(i + 2 * lanes, Whole{});
      d += row.at(i + 3 * lanes, Whole{});
    }
    for (; i + lanes <= end; i += lanes) a += row.at(i, Whole{});
    if (i < end) b += row.at(i, Part{end - i});
    const Terms<A, n> all = (a + b) + (c + d);
    for (int k = 0; k < n; ++k) total[k] += sum<A>(all.v[k]);
  }
  for (int k = 0; k < n; ++k) out[k] = static_cast<A>(total[k]);
}

// out[k][j] = sum over rows of term k of column j, 4 rows at a time; make(row) has a row's terms
template <int n, class A, class Make>
ATTNKERN_INLINE void sum_columns(Range rows, int64_t columns, A* const (&out)[n], const Make& make) {
  const auto add = [&](int64_t i, auto access, const Terms<A, n>& terms, bool first) ATTNKERN_INLINE_LAMBDA {
    for (int k = 0; k < n; ++k)
      access.write(out[k] + i, first ? terms.v[k] : access.read(out[k] + i) + terms.v[k], false);
  };
  const auto each_vector = [&](const auto& step) {
    int64_t i = 0;
    for (; i + kLanes<A> <= columns; i += kLanes<A>) step(i, Whole{});
    if (i < columns) step(i, Part{columns - i});
  };
  int64_t row = rows.begin;
  for (; row + 4 <= rows.end; row += 4) {
    const auto a = make(row), b = make(row + 1), c = make(row + 2), d = make(row + 3);
    each_vector([&](int64_t i, auto access) ATTNKERN_INLINE_LAMBDA {
      add(i, access, (a.at(i, access) + b.at(i, access)) + (c.at(i, access) + d.at(i, access)), row == rows.begin);
    });
  }
  for (; row < rows.end; ++row) {
    const auto a = make(row);
    each_vector([&](int64_t i, auto access)
                    ATTNKERN_INLINE_LAMBDA { add(i, access, a.at(i, access), row == rows.begin); });
  }
}

void sum_x(const Inputs& p, int64_t b, Range rows, void* sum) {
  cpu::visit(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accumulator<T>;
    const auto terms = [&](int64_t row) { return XTerms<T>{row_of<T>(p.x, b, row)}; };
    A* out = static_cast<A*>(sum);
    if (p.layout == Layout::channels_last) return sum_columns<1, A>(rows, p.sizes.channels, {out}, terms);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      A total[1];
      sum_row(p.sizes.length, terms(row), total);
      out[row] = total[0];
    }
  });
}

void sum_grads(const BackwardParams& p, const Coefficients& u, int64_t b, Range rows, void* sum_vx, void* sum_v) {
  cpu::visit(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accumulator<T>;
    A *vx = static_cast<A*>(sum_vx), *v = static_cast<A*>(sum_v);
    if (p.layout == Layout::channels_last)
      return visit_grad<T, true>(p, u, [&](const auto& grad) {
        sum_columns<2, A>(rows, p.sizes.channels, {vx, v},
                          [&](int64_t row) { return GradTerms{row_of<T>(p.x, b, row), grad(b, row)}; });
      });
    visit_grad<T, false>(p, u, [&](const auto& grad) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        A total[2];
        sum_row(p.sizes.length, GradTerms{row_of<T>(p.x, b, row), grad(b, row)}, total);
        vx[row] = total[0];
        v[row] = total[1];
      }
    });
  });
}

}  // namespace attnkern::squeeze_excite::ATTNKERN_ISA
