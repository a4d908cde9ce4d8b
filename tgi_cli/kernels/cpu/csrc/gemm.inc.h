// bf16 GEMM: fp32 accumulators, one chain over K for every output element whatever M is.
// Included once per instruction set, inside its namespace.

// What a tile fetches while it multiplies: from `at` on, so many cache lines for each step of the loop over
// K as its kind takes, or always the same ones if `stride` is 0. Weights come from memory once and for
// further row tiles from a near cache.
struct Lookahead {
  const char* at;
  int64_t stride;  // bytes a step
};

template <int kLines>
inline void look_ahead(const Lookahead& ahead, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < kLines; ++i) prefetch(ahead.at + step * ahead.stride + i * 64);
}

// Lines a step: all if there are two tiles of a few rows or four of many, as is usual.
constexpr int ahead_lines(int rows, int64_t bytes) {
  const int64_t tiles = rows <= 4 ? 2 : 4;
  return static_cast<int>((bytes / 64 + tiles - 1) / tiles);
}

// `next`: the panels to fetch, or null for none: then a line of the tile's `own`, as an address that is not
// mapped would be looked up in vain each time.
inline Lookahead tile_ahead(const void* next, const void* own, int64_t tile, int64_t steps, int64_t height,
                            int64_t bytes) {
  if (next == nullptr) return {static_cast<const char*>(own), 0};
  const int64_t stride = ahead_lines(static_cast<int>(height), bytes) * 64;
  return {static_cast<const char*>(next) + tile * steps * stride, stride};
}

constexpr int64_t kAheadBytes = 4096;  // what a single row, which waits for memory alone, looks ahead

// Rows of x times vectors of one or more panels; the accumulators live in registers.
template <int kRows, int kPanels>
inline void gemm_tile(const bf16* x, int64_t ldx, const bf16* w, int64_t panel_stride, int64_t k, Lookahead ahead,
                      vf (&acc)[kRows][kPanels * (kPanel / kLanes)]) {
  constexpr int kPer = kPanel / kLanes;
  constexpr int kVectors = kPanels * kPer;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  for (int64_t i = 0; i < k; i += 2) {
    vi b[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const bf16* p = w + (v / kPer) * panel_stride + i * kPanel + (v % kPer) * kLanes * 2;
      b[v] = load_pairs(p);
      if (kRows == 1 && v % kLineVectors == 0) prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
    }
    if (kRows > 1) look_ahead<ahead_lines(kRows, kVectors * kLanes * 4)>(ahead, i / 2);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi a = broadcast_pair(x + r * ldx + i);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) dot2(acc[r][v], b[v], a);
    }
  }
}

template <int kRows, int kPanels>
inline void gemm_rows(const Gemm& g, const bf16* w, int64_t row, int64_t panel, Lookahead ahead) {
  constexpr int kPer = kPanel / kLanes;
  vf acc[kRows][kPanels * kPer], whole[kRows][kPanels * kPer];
  const int64_t k = g.w.k;
  if (kRows > 1) expect_result(g, row, kRows, panel, kPanels);
  gemm_tile<kRows, kPanels>(g.x + row * g.ldx, g.ldx, w, k * kPanel, k, ahead, acc);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)  // a copy in memory, so that the accumulators need not be there
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kPer; ++v) whole[r][v] = acc[r][v];
  for (int p = 0; p < kPanels; ++p) gemm_finish(g, row, kRows, panel + p, whole[0] + p * kPer, kPanels * kPer);
}

// `next`: the panel from which to fetch meanwhile, or -1.
template <int kPanels>
inline void gemm_block(const Gemm& g, int64_t row, int64_t rows, int64_t panel, int64_t next) {
  // Tiles of nearly equal heights: 8 rows are 4 and 4 and not 6 and 2.
  const int64_t all = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t steps = g.w.k / 2;
  const auto* data = static_cast<const bf16*>(g.w.data);
  const bf16* w = data + panel * g.w.k * kPanel;
  const bf16* fetched = next < 0 ? nullptr : data + next * g.w.k * kPanel;
  for (int64_t tile = 0; tile < all; ++tile) {
    const int64_t height = (rows + all - tile - 1) / (all - tile);
    const Lookahead ahead = tile_ahead(fetched, w, tile, steps, height, kPanels * kPanel * 4);
    with_count<kMaxRows>(height,
                         [&](auto n) { gemm_rows<decltype(n)::value, kPanels>(g, w, row, panel, ahead); });
    row += height;
    rows -= height;
  }
}

inline void gemm_bf16(Pool& pool, const Gemm& g) {
  // A lone row takes one panel after the other: memory gives a thread one stream sooner than two.
  split_work(pool, g, kMaxRows * 16, g.m == 1 ? 1 : kGroup, [&](const Part& part) {
    const int64_t end = part.panel + part.panels;
    for (int64_t panel = part.panel; panel < end; panel += kGroup)
      if (panel + kGroup <= end)
        gemm_block<kGroup>(g, part.row, part.rows, panel, part.after(panel, kGroup));
      else
        gemm_block<1>(g, part.row, part.rows, panel, -1);
  });
}

// [n, k] bf16 to panels of 32 outputs; missing outputs of the last panel are zero. k must be even.
void pack(const uint16_t* w, int64_t n, int64_t k, uint16_t* out) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < k / 2; ++i)
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t row = p * kPanel + j;
        uint16_t* at = out + ((p * (k / 2) + i) * kPanel + j) * 2;
        at[0] = row < n ? w[row * k + 2 * i] : 0;
        at[1] = row < n ? w[row * k + 2 * i + 1] : 0;
      }
}
