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

inline vf silu(vf x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// tanh by exp: exact limits at both ends, since exp saturates.
inline vf tanh(vf x) {
  const vf e = exp(mul(set1(2.0f), max(min(x, set1(20.0f)), set1(-20.0f))));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

inline vf gelu_tanh(vf x) {
  const vf cube = mul(mul(x, x), x);
  const vf inner = mul(set1(0.7978845608028654f), fma(set1(0.044715f), cube, x));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
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

// One row of one panel: bias, then the epilogue.
inline void gemm_finish(const Gemm& g, int64_t row, int64_t panel, const vf* acc_in) {
  constexpr int kPer = kPanel / kLanes;
  const int64_t col = panel * kPanel;
  vf acc[kPer];
  for (int v = 0; v < kPer; ++v) acc[v] = acc_in[v];
  if (g.bias != nullptr)
    for (int v = 0; v < kPer; ++v) {
      float b[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t c = col + v * kLanes + i;
        b[i] = c < g.n ? g.bias[c] : 0.0f;
      }
      acc[v] = add(acc[v], load(b));
    }
  switch (static_cast<Epilogue>(g.epilogue)) {
    case Epilogue::kSiluMul:
    case Epilogue::kGeluTanhMul: {
      bf16* out = static_cast<bf16*>(g.out) + row * g.ldo + col / 2;
      const bool is_silu = g.epilogue == static_cast<int32_t>(Epilogue::kSiluMul);
      for (int v = 0; v < kPer / 2; ++v) {
        const vf gate = is_silu ? silu(acc[v]) : gelu_tanh(acc[v]);
        store_bf16(out + v * kLanes, mul(gate, acc[v + kPer / 2]));
      }
      return;
    }
    default:
      break;
  }
  if (col + kPanel > g.n) {
    float values[kPanel];
    for (int v = 0; v < kPer; ++v) store(values + v * kLanes, acc[v]);
    store_tail(g, row, col, values, static_cast<int>(g.n - col));
    return;
  }
  for (int v = 0; v < kPer; ++v) {
    const int64_t at = row * g.ldo + col + v * kLanes;
    if (g.epilogue == static_cast<int32_t>(Epilogue::kStoreBf16)) {
      store_bf16(static_cast<bf16*>(g.out) + at, acc[v]);
    } else {
      float* out = static_cast<float*>(g.out) + at;
      store(out, g.epilogue == static_cast<int32_t>(Epilogue::kAddFloat) ? add(load(out), acc[v]) : acc[v]);
    }
  }
}

template <int kRows, int kPanels>
inline void gemm_rows(const Gemm& g, int64_t row, int64_t panel) {
  constexpr int kPer = kPanel / kLanes;
  vf acc[kRows][kPanels * kPer];
  gemm_tile<kRows, kPanels>(g.x + row * g.ldx, g.ldx, g.w + panel * g.k * kPanel, g.k * kPanel, g.k, acc);
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

void gemm(Pool& pool, const Gemm& g) {
  if (g.m <= 0) return;
  const int64_t panels = (g.n + kPanel - 1) / kPanel;
  constexpr int64_t kRowBlock = kMaxRows * 16;
  const int64_t row_blocks = (g.m + kRowBlock - 1) / kRowBlock;
  // Few rows: each thread streams runs of panels. Many rows: one panel group a time, reused by a block.
  const int64_t wanted = 4 * pool.size();
  int64_t chunk = kGroup;
  if (row_blocks == 1) {
    chunk = (panels + wanted - 1) / wanted;
    if (g.m > 1) chunk = (chunk + kGroup - 1) / kGroup * kGroup;
  }
  const int64_t chunks = (panels + chunk - 1) / chunk;
  pool.parallel(chunks * row_blocks, [&](int64_t item, int) {
    const int64_t row = item % row_blocks * kRowBlock;
    const int64_t rows = row + kRowBlock <= g.m ? kRowBlock : g.m - row;
    int64_t panel = item / row_blocks * chunk;
    const int64_t end = panel + chunk < panels ? panel + chunk : panels;
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
