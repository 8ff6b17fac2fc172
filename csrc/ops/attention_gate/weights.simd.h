// The weights as a call's tiles multiply by them, and their gradients back to the caller's order.
namespace attnkern::attention_gate::ATTNKERN_ISA {

template <class A>
void pack_matrix(const A* weight, int64_t hidden, int64_t channels, int64_t patch, A* columns, A* rows) {
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
}

void pack(const Inputs& p, const Branch& theta, const Branch& phi, const Weights& w) {
  cpu::visit(accumulation(p.dtype), [&](auto zero) {
    using A = Accumulator<decltype(zero)>;
    const Sizes& n = p.sizes;
    const auto matrix = [&](const void* from, int64_t channels, int64_t patch, void* columns, void* rows) {
      pack_matrix(static_cast<const A*>(from), n.hidden, channels, patch, static_cast<A*>(columns),
                  static_cast<A*>(rows));
    };
    matrix(p.theta, n.channels, volume(n.kernel), w.theta, w.theta_rows);
    if (p.phi) matrix(p.phi, n.gating, 1, w.phi, w.phi_rows);
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
