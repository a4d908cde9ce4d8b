// bf16 GEMM: fp32 accumulators, one chain over K for every output element whatever M is.
// Included once per instruction set, inside its namespace.

// Rows of x times vectors of one or more panels; the accumulators live in registers.
template <int kRows, int kPanels>
inline void gemm_tile(const bf16* x, int64_t ldx, const bf16* w, int64_t panel_stride, int64_t k,
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
      if (kRows <= 2) _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi a = broadcast_pair(x + r * ldx + i);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) dot2(acc[r][v], b[v], a);
    }
  }
}

template <int kRows, int kPanels>
inline void gemm_rows(const Gemm& g, int64_t row, int64_t panel) {
  constexpr int kPer = kPanel / kLanes;
  vf acc[kRows][kPanels * kPer];
  const int64_t k = g.w.k;
  const bf16* w = static_cast<const bf16*>(g.w.data) + panel * k * kPanel;
  gemm_tile<kRows, kPanels>(g.x + row * g.ldx, g.ldx, w, k * kPanel, k, acc);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) gemm_finish(g, row + r, panel + p, acc[r] + p * kPer);
}

constexpr int kMaxRows = TGI_ISA >= 2 ? 6 : 2;
constexpr int kGroup = TGI_ISA >= 2 ? 2 : 1;  // panels per tile: 24 of 32, or 8 of 16 registers

template <int kPanels>
inline void gemm_block(const Gemm& g, int64_t row, int64_t rows, int64_t panel) {
  const int64_t end = row + rows;
  for (; row + kMaxRows <= end; row += kMaxRows) gemm_rows<kMaxRows, kPanels>(g, row, panel);
  switch (end - row) {
    case 1: gemm_rows<1, kPanels>(g, row, panel); break;
#if TGI_ISA >= 2
    case 2: gemm_rows<2, kPanels>(g, row, panel); break;
    case 3: gemm_rows<3, kPanels>(g, row, panel); break;
    case 4: gemm_rows<4, kPanels>(g, row, panel); break;
    case 5: gemm_rows<5, kPanels>(g, row, panel); break;
#endif
    default: break;
  }
}

inline void gemm_bf16(Pool& pool, const Gemm& g) {
  split_work(pool, g, kMaxRows * 16, kGroup, [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    const int64_t end = panel + panels;
    for (; panel + kGroup <= end; panel += kGroup) gemm_block<kGroup>(g, row, rows, panel);
    if (panel < end) gemm_block<1>(g, row, rows, panel);
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
