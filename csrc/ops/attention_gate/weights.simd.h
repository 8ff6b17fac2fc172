// The weights as a call's tiles multiply by them, and their gradients back to the caller's order.
namespace attnkern::attention_gate::ATTNKERN_ISA {

#if defined(ATTNKERN_AVX512_BF16)
// w in two bfloat16 whose sum it is to 2^-16. Both have its sign and neither is 0, so that an infinite x meets
// infinities of one sign, and no 0 times infinity.
ATTNKERN_INLINE void split(Vec<float> w, Vec<float>& high, Vec<float>& low) {
  const Bits32 u = bit_cast<Bits32>(w);
  const Bits32 truncated = u & 0xffff0000u;
  // one step nearer to 0 where nothing would be left
  high = bit_cast<Vec<float>>(truncated == u && w != 0 ? truncated - 0x10000u : truncated);
  const auto finite = w - w == 0;
  high = finite ? high : w;
  low = finite ? w - high : w;
}

// Rows of floats, zero beyond the last, to pairs of them in their places: `parts` rows of pairs for two of floats.
void pair_in_place(float* rows, int64_t ld, int64_t count, int64_t columns, int parts) {
  if (count % 2) store_zeros(rows + count * ld, columns);
  for (int64_t k = 0; k < count; k += 2)
    for (int64_t j = 0; j < columns; j += kLanes<float>) {
      float *first = rows + k * ld + j, *second = first + ld;
      const Vec<float> even = load(first), odd = load(second);
      const auto put = [](float* to, Vec<float> a, Vec<float> b) {
        const Bits32 pairs = interleave(narrow(a, cpu::BFloat16{}), narrow(b, cpu::BFloat16{}));
        std::memcpy(to, &pairs, sizeof pairs);
      };
      if (parts == 1) {
        put(first, even, odd);
        continue;
      }
      Vec<float> even_high, even_low, odd_high, odd_low;
      split(even, even_high, even_low);
      split(odd, odd_high, odd_low);
      put(first, even_high, odd_high);
      put(second, even_low, odd_low);
    }
}

inline bool all_bfloat16(const float* p, int64_t n) {
  Bits32 rest{};
  each_vector<float>(n, [&](int64_t i, auto access) { rest |= bit_cast<Bits32>(access.read(p + i)) & 0xffffu; });
  return to_bits<float>((Mask<float>)(rest != 0)) == 0;
}
#endif

// A part of a packed weight's columns, or its rows.
template <class T>
RowsAt<const Term<T>> packed_rows(const void* matrix, int64_t ld, int part = 0) {
  return {static_cast<const Term<T>*>(matrix) + part * ld, kPaired<T> ? 2 * ld : ld};
}

template <class T, class A>
void pack_matrix(const A* weight, int64_t hidden, int64_t channels, int64_t patch, Weight& w) {
  A *columns = static_cast<A*>(w.columns), *rows = static_cast<A*>(w.rows);
  const int64_t inner = channels * patch;
  for (int64_t f = 0; f < padded(hidden); ++f) {
    A* row = rows + f * leading(inner);
    if (f >= hidden) {
      store_zeros(row, inner);
      continue;
    }
    for (int64_t j = 0; j < patch; ++j)
      for (int64_t c = 0; c < channels; ++c) row[j * channels + c] = weight[f * inner + c * patch + j];
  }
  transpose<A>({rows, leading(inner)}, {columns, leading(hidden)}, padded(hidden), inner);
  if constexpr (kPaired<T>) {
    w.parts = all_bfloat16(weight, hidden * inner) ? 1 : 2;
    pair_in_place(columns, leading(hidden), inner, padded(hidden), w.parts);
    pair_in_place(rows, leading(inner), padded(hidden), inner, 1);
  }
}

void pack(const Inputs& p, const Branch& theta, const Branch& phi, Weights& w) {
  cpu::visit(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Sizes& n = p.sizes;
    pack_matrix<T>(static_cast<const A*>(p.theta), n.hidden, n.channels, volume(n.kernel), w.theta);
    if (p.phi) pack_matrix<T>(static_cast<const A*>(p.phi), n.hidden, n.gating, 1, w.phi);
    const void* from[kVectors] = {p.bias, p.psi, theta.scale, theta.k0, theta.k1, phi.scale, phi.k0, phi.k1};
    for (int i = 0; i < kVectors; ++i) {
      A* to = static_cast<A*>(w.vectors) + i * padded(n.hidden);
      const A absent = i == kThetaScale || i == kPhiScale ? 1 : 0;
      for (int64_t f = 0; f < padded(n.hidden); ++f)
        to[f] = f >= n.hidden ? A(0) : from[i] ? static_cast<const A*>(from[i])[f] : absent;
    }
  });
}

void put_weight(DType acc, const void* sums, int64_t channels, int64_t patch, int64_t hidden, Range f, void* out) {
  cpu::visit(acc, [&](auto zero) {
    using A = Accumulator<decltype(zero)>;
    const A* from = static_cast<const A*>(sums);
    A* to = static_cast<A*>(out);
    for (int64_t j = 0; j < patch; ++j)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = f.begin; i < f.end; ++i)
          to[(i * channels + c) * patch + j] = from[(j * channels + c) * padded(hidden) + i];
  });
}

void add(DType acc, const void* parts, int64_t stride, int64_t count, void* out, int64_t n) {
  cpu::visit(acc, [&](auto zero) {
    using A = Accumulator<decltype(zero)>;
    const A* from = static_cast<const A*>(parts);
    each_vector<A>(n, [&](int64_t i, auto access) {
      Vec<A> sums{};
      for (int64_t j = 0; j < count; ++j) sums += access.read(from + j * stride + i);
      access.write(static_cast<A*>(out) + i, sums);
    });
  });
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
