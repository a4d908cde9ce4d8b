// What a GEMM does with a finished row of a panel, whatever form its weights have; and how it is split
// into work items. Included once per instruction set, before the GEMMs.

// 1 / (1 + 2^x) to a few ulp of fp32.
inline vf logistic(vf x) {
  const vf power = exp2(max(min(x, set1(126.0f)), set1(-126.0f)));
  return reciprocal(add(set1(1.0f), power));
}

inline vf silu(vf x) { return mul(x, logistic(mul(x, set1(-kLog2e)))); }

// x * (1 + tanh(inner)) / 2, by 1 + tanh(y) = 2 / (1 + exp(-2 y)).
inline vf gelu_tanh(vf x) {
  const vf cube = mul(mul(x, x), x);
  const vf inner = mul(set1(0.7978845608028654f), fma(set1(0.044715f), cube, x));
  return mul(x, logistic(mul(inner, set1(-2.0f * kLog2e))));
}

inline void store_tail(const Gemm& g, int64_t row, int64_t col, const float* values, int count) {
  for (int i = 0; i < count; ++i) {
    if (g.epilogue == static_cast<int32_t>(Epilogue::kStoreBf16)) {
      static_cast<bf16*>(g.out)[row * g.ldo + col + i] = to_bf16(values[i]);
    } else {
      float* out = static_cast<float*>(g.out) + row * g.ldo + col + i;
      *out = g.epilogue == static_cast<int32_t>(Epilogue::kAddFloat) ? *out + values[i] : values[i];
    }
  }
}

// Asks for the lines of the result that a tile is going to write, so that they are there when it ends.
inline void expect_result(const Gemm& g, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  const auto epilogue = static_cast<Epilogue>(g.epilogue);
  const bool is_float = epilogue == Epilogue::kStoreFloat || epilogue == Epilogue::kAddFloat;
  const bool halved = epilogue == Epilogue::kSiluMul || epilogue == Epilogue::kGeluTanhMul;
  const int64_t size = is_float ? 4 : 2, width = kPanel / (halved ? 2 : 1);
  auto* at = static_cast<char*>(g.out) + (row * g.ldo + panel * width) * size;
  for (int64_t r = 0; r < rows; ++r, at += g.ldo * size)
    for (int64_t line = 0; line < panels * width * size; line += 64) prefetch_written(at + line);
}

inline void add_bias(const Gemm& g, int64_t rows, int64_t col, const vf* acc_in, int64_t stride, vf* acc) {
  constexpr int kPer = kPanel / kLanes;
  for (int v = 0; v < kPer; ++v) {
    float b[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t c = col + v * kLanes + i;
      b[i] = c < g.w.n ? g.bias[c] : 0.0f;
    }
    for (int64_t r = 0; r < rows; ++r) acc[r * kPer + v] = add(acc_in[r * stride + v], load(b));
  }
}

// Some rows of one panel, `stride` vectors apart: bias, then the epilogue. A call of its own: inlined into
// the tiles it makes the compiler spill their accumulators.
__attribute__((noinline)) inline void gemm_finish(const Gemm& g, int64_t row, int64_t rows, int64_t panel,
                                                  const vf* acc, int64_t stride) {
  constexpr int kPer = kPanel / kLanes, kMost = std::max({kMaxRows, kCodeRows, kQuantRows});
  const int64_t col = panel * kPanel;
  vf biased[kMost * kPer];
  if (g.bias != nullptr) {
    add_bias(g, rows, col, acc, stride, biased);
    acc = biased;
    stride = kPer;
  }
  const auto epilogue = static_cast<Epilogue>(g.epilogue);
  if (epilogue == Epilogue::kSiluMul || epilogue == Epilogue::kGeluTanhMul) {
    bf16* out = static_cast<bf16*>(g.out) + row * g.ldo + col / 2;
    for (int64_t r = 0; r < rows; ++r, acc += stride, out += g.ldo)
      for (int v = 0; v < kPer / 2; ++v) {
        const vf gate = epilogue == Epilogue::kSiluMul ? silu(acc[v]) : gelu_tanh(acc[v]);
        store_bf16(out + v * kLanes, mul(gate, acc[v + kPer / 2]));
      }
  } else if (col + kPanel > g.w.n) {
    for (int64_t r = 0; r < rows; ++r, acc += stride) {
      float values[kPanel];
      for (int v = 0; v < kPer; ++v) store(values + v * kLanes, acc[v]);
      store_tail(g, row + r, col, values, static_cast<int>(g.w.n - col));
    }
  } else if (epilogue == Epilogue::kStoreBf16) {
    bf16* out = static_cast<bf16*>(g.out) + row * g.ldo + col;
    for (int64_t r = 0; r < rows; ++r, acc += stride, out += g.ldo)
#pragma GCC unroll 16
      for (int v = 0; v < kPer; ++v) store_bf16(out + v * kLanes, acc[v]);
  } else {
    float* out = static_cast<float*>(g.out) + row * g.ldo + col;
    const bool adds = epilogue == Epilogue::kAddFloat;
    for (int64_t r = 0; r < rows; ++r, acc += stride, out += g.ldo)
#pragma GCC unroll 16
      for (int v = 0; v < kPer; ++v) {
        float* at = out + v * kLanes;
        store(at, adds ? add(load(at), acc[v]) : acc[v]);
      }
  }
}

// Tiles of a matrix for a lone row, which is done when they are read: each thread streams through a
// share of its own, and what is left of the others' shares it takes from their ends. So a stream goes on
// where it was fetched ahead, and a thread that lost its core holds back the one tile it works on.
class TileStreams {
 public:
  TileStreams(int64_t tiles, int threads) : tiles_(tiles), count_(std::min({tiles, int64_t{threads}, kMost})) {
    for (int64_t i = 0; i < count_; ++i)
      shares_[i].left.store(static_cast<uint64_t>(first(i + 1)) << 32 | static_cast<uint64_t>(first(i)),
                            std::memory_order_relaxed);
  }

  int64_t count() const { return count_; }
  int64_t first(int64_t share) const { return tiles_ * share / count_; }

  // Whether every tile has been taken.
  bool done() const {
    return std::all_of(shares_, shares_ + count_, [](const Share& share) {
      const uint64_t left = share.left.load(std::memory_order_relaxed);
      return (left & 0xffffffffu) == left >> 32;
    });
  }

  // Calls visit(tile) for what is left of share `own`, then of the others.
  template <class Visit>
  void run(int64_t own, const Visit& visit) {
    for (int64_t i = 0; i < count_; ++i) {
      std::atomic<uint64_t>& left = shares_[(own + i) % count_].left;
      for (int64_t tile; (tile = take(left, i == 0)) >= 0;) visit(tile);
    }
  }

 private:
  static constexpr int64_t kMost = 64;
  struct alignas(64) Share {
    std::atomic<uint64_t> left;  // its end << 32 | its first tile
  };

  // Only the claim is shared here; the pool orders what the tiles' results are written and read by.
  static int64_t take(std::atomic<uint64_t>& left, bool first) {
    for (uint64_t now = left.load(std::memory_order_relaxed);;) {
      const uint64_t begin = now & 0xffffffffu, end = now >> 32;
      if (begin == end) return -1;
      const uint64_t rest = first ? now + 1 : now - (uint64_t{1} << 32);
      if (left.compare_exchange_weak(now, rest, std::memory_order_relaxed))
        return static_cast<int64_t>(first ? begin : end - 1);
    }
  }

  Share shares_[kMost];
  int64_t tiles_, count_;
};

// A part of an [m, n] result for one thread. `next` is the panel that it will probably need after these, or
// -1 if that is one of them or none.
struct Part {
  int64_t row, rows, panel, panels, next;
  int worker;

  // What to fetch while `count` panels from `at` on are in work.
  int64_t after(int64_t at, int64_t count) const { return at + count < panel + panels ? at + count : next; }
};

// Calls block(part) for all of an [m, n] result. `row_block` rows share a visit of a panel; `group` panels
// make a tile. Few rows: each item streams a run of panels. Many rows: one group of panels at a time, used
// again by a block of rows.
template <class Block>
inline void split_work(Pool& pool, const Gemm& g, int64_t row_block, int64_t group, const Block& block) {
  if (g.m <= 0) return;
  const int64_t panels = (g.w.n + kPanel - 1) / kPanel;
  const int64_t row_blocks = (g.m + row_block - 1) / row_block;
  row_block = (g.m + row_blocks - 1) / row_blocks;  // of one size, so that threads end together
  if (g.m == 1) {
    TileStreams streams((panels + group - 1) / group, pool.width());
    pool.parallel(streams.count(), [&](int64_t item, int worker) {
      streams.run(item, [&](int64_t tile) {
        block(Part{0, 1, tile * group, std::min(group, panels - tile * group), -1, worker});
      });
    });
    return;
  }
  const int64_t wanted = 4 * pool.size();
  int64_t chunk = group;
  if (row_blocks == 1) {
    chunk = (panels + wanted - 1) / wanted;
    if (g.m > 1) chunk = (chunk + group - 1) / group * group;
  }
  const int64_t chunks = (panels + chunk - 1) / chunk;
  pool.parallel(chunks * row_blocks, [&](int64_t item, int worker) {
    const int64_t row = item % row_blocks * row_block;
    const int64_t panel = item / row_blocks * chunk;
    const int64_t next = (item + pool.size()) / row_blocks * chunk;  // if threads go on in step
    block(Part{row, std::min(row_block, g.m - row), panel, std::min(chunk, panels - panel),
               next > panel && next < panels ? next : -1, worker});
  });
}
