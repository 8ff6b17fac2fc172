// Brings the next tile's maps into the caches while the products of this one run.
//
// One core waits for memory as long as it multiplies: 33 MB of x and g took 2.3 ms to copy beside 2.3 ms of products.
// Between two register tiles a feed therefore copies a few rows, and asks for those after them.
namespace attnkern::attention_gate::ATTNKERN_ISA {

template <class From, class To>
ATTNKERN_INLINE void copy(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, n * sizeof(To));
  else
    each_vector<Accumulator<To>>(n, [&](int64_t i, auto access) { access.write(to + i, access.read(from + i)); });
}

class Feed {
 public:
  // `rows` rows of `length` elements, copied to rows of X, or only brought nearer where `to` is null.
  template <class T, class X>
  void add(const T* from, int64_t ld_from, X* to, int64_t ld_to, int64_t rows, int64_t length) {
    maps_[count_++] = {reinterpret_cast<const std::byte*>(from),
                       static_cast<int64_t>(ld_from * sizeof(T)),
                       reinterpret_cast<std::byte*>(to),
                       static_cast<int64_t>(ld_to * sizeof(X)),
                       rows,
                       length,
                       static_cast<int64_t>(length * sizeof(T)),
                       [](const std::byte* row, std::byte* out, int64_t n) {
                         copy(reinterpret_cast<const T*>(row), reinterpret_cast<X*>(out), n);
                       }};
    left_ += rows;
  }
  // The rows spread over `work` multiplications.
  void start(int64_t work) {
    cost_ = left_ ? work / left_ + 1 : std::numeric_limits<int64_t>::max();
    for (int i = 0; i < kAhead; ++i) prefetch();
  }
  ATTNKERN_INLINE void step(int64_t work) {
    credit_ += work;
    if (credit_ >= cost_) advance(credit_ / cost_);
  }
  void finish() { advance(left_); }

 private:
  static constexpr int kAhead = 8;  // rows, 4 KB of float: 4 were waited for, 16 no faster

  struct Map {
    const std::byte* from;
    int64_t step_from;
    std::byte* to;
    int64_t step_to, rows, length, bytes;
    void (*copy)(const std::byte* from, std::byte* to, int64_t length);
  };
  struct Cursor {
    int map = 0;
    int64_t row = 0;
  };

  bool next(Cursor& c) const {
    while (c.map < count_ && c.row == maps_[c.map].rows) ++c.map, c.row = 0;
    return c.map < count_;
  }
  void prefetch() {
    if (!next(ahead_)) return;
    const Map& m = maps_[ahead_.map];
    const std::byte* row = m.from + ahead_.row++ * m.step_from;
    for (int64_t i = 0; i < m.bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
  void advance(int64_t rows) {
    for (credit_ -= rows * cost_; rows > 0 && next(at_); --rows, --left_) {
      prefetch();
      const Map& m = maps_[at_.map];
      if (m.to) m.copy(m.from + at_.row * m.step_from, m.to + at_.row * m.step_to, m.length);
      ++at_.row;
    }
  }

  Map maps_[3] = {};
  int count_ = 0;
  int64_t left_ = 0, cost_ = std::numeric_limits<int64_t>::max(), credit_ = 0;
  Cursor at_, ahead_;
};

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
