// A tile of items, in place in either layout, and its three products with rows of queries.
namespace attnkern::softmax_pool::ATTNKERN_ISA {

// Rows: a row is an item's features. Columns: a row is a feature of adjacent items.
template <class T>
struct Tile {
  T* p;
  int64_t ld;
  bool columns;
};

// Items from `begin` of one head of a sample, whose items have `features`.
template <class T, class Pointer>
ATTNKERN_INLINE Tile<T> tile_of(const ItemsOf<Pointer>& items, int64_t features, int64_t sample, int64_t head,
                                int64_t begin) {
  T* p =
      static_cast<T*>(items.data) + sample * items.stride_batch + head * items.stride_head + begin * items.stride_item;
  const bool columns = features == 1 ? items.stride_item == 1 : items.stride_feature != 1;
  return {p, columns ? items.stride_feature : items.stride_item, columns};
}

template <class A, class Pointer>
ATTNKERN_INLINE A* row_of(const RowsOf<Pointer>& rows, int64_t sample, int64_t head, int64_t query) {
  return rows.data ? static_cast<A*>(rows.data) + sample * rows.stride_batch + head * rows.stride_head +
                         query * rows.stride_query
                   : nullptr;
}

// out[m, t] = rows[m] . x[t]
template <class A, class T>
void dot_items(const A* rows, int64_t count, Tile<const T> x, int64_t items, int64_t features, A* out, int64_t ld_out) {
  const RowsAt<A> to{out, ld_out};
  if (x.columns)
    outer<A, T, A>({rows, features, 1}, {x.p, x.ld}, {nullptr, 0}, to, count, items, features);
  else
    inner<false, A, T>({rows, features}, {x.p, x.ld}, to, count, items, features);
}

// out[m] += sum_t c[m, t] x[t]
template <class A, class T>
void add_items(const A* c, int64_t ld_c, int64_t count, Tile<const T> x, int64_t items, int64_t features, A* out) {
  const RowsAt<A> to{out, features};
  if (x.columns)
    inner<true, A, T>({c, ld_c}, {x.p, x.ld}, to, count, features, items);
  else
    outer<A, T, A>({c, ld_c, 1}, {x.p, x.ld}, {out, features}, to, count, features, items);
}

// x[t] (+)= sum_m c[m, t] rows[m]
template <class A, class T>
void make_items(const A* c, int64_t ld_c, const A* rows, int64_t count, Tile<T> x, int64_t items, int64_t features,
                bool add = false, bool streaming = false) {
  const RowsAt<T> to{x.p, x.ld};
  RowsAt<const A> from{nullptr, x.ld};
  if constexpr (std::is_same_v<A, T>) {
    if (add) from.p = x.p;
  }
  const auto make = [&](auto full) {
    if (x.columns)
      outer<A, A, T, decltype(full)>({rows, 1, features}, {c, ld_c}, from, to, features, items, count);
    else
      outer<A, A, T, decltype(full)>({c, 1, ld_c}, {rows, features}, from, to, items, features, count);
  };
  const auto misaligned = (reinterpret_cast<uintptr_t>(x.p) | x.ld * sizeof(T)) % 64;
  streaming && !misaligned ? make(Streamed{}) : make(Whole{});
}

template <class A, class T>
ATTNKERN_INLINE A load_one(const T* p) {
  if constexpr (sizeof(T) == 2)
    return load_n(p, 1)[0];
  else
    return *p;
}

template <class T, class A>
ATTNKERN_INLINE void store_one(T* p, A a) {
  if constexpr (sizeof(T) == 2)
    store_n(p, splat(a), 1);
  else
    *p = a;
}

// Copies items, whatever their types and layouts.
template <class From, class To>
void put_items(Tile<From> from, Tile<To> to, int64_t items, int64_t features) {
  using A = Accumulator<To>;
  const int64_t rows = to.columns ? features : items, length = to.columns ? items : features;
  for (int64_t i = 0; i < rows; ++i) {
    if (from.columns == to.columns)
      each_vector<A>(length, [&](int64_t j, auto access) {
        access.write(to.p + i * to.ld + j, access.read(from.p + i * from.ld + j));
      });
    else
      for (int64_t j = 0; j < length; ++j) {
        const From& element = from.p[j * from.ld + i];
        if constexpr (std::is_same_v<From, const To>)
          to.p[i * to.ld + j] = element;
        else
          store_one(to.p + i * to.ld + j, load_one<A>(&element));
      }
  }
}

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
