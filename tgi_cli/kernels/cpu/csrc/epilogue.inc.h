// What a GEMM does with a finished row of a panel, whatever form its weights have; and how it is split
// into work items. Included once per instruction set, before the GEMMs.

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

// One row of one panel: bias, then the epilogue. A call of its own: inlined into the tiles it makes the
// compiler spill their accumulators.
__attribute__((noinline)) inline void gemm_finish(const Gemm& g, int64_t row, int64_t panel, const vf* acc_in) {
  constexpr int kPer = kPanel / kLanes;
  const int64_t col = panel * kPanel;
  vf acc[kPer];
  for (int v = 0; v < kPer; ++v) acc[v] = acc_in[v];
  if (g.bias != nullptr)
    for (int v = 0; v < kPer; ++v) {
      float b[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t c = col + v * kLanes + i;
        b[i] = c < g.w.n ? g.bias[c] : 0.0f;
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
  if (col + kPanel > g.w.n) {
    float values[kPanel];
    for (int v = 0; v < kPer; ++v) store(values + v * kLanes, acc[v]);
    store_tail(g, row, col, values, static_cast<int>(g.w.n - col));
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

// Cuts panels, or tiles of them, into runs that get shorter: long ones stream through memory, short ones
// at the end let all threads end together. first[i] is where run i begins.
struct PanelRuns {
  static constexpr int64_t kMost = 128;
  int64_t first[kMost + 1];
  int64_t count = 0;

  PanelRuns(int64_t panels, int threads) {
    const int64_t least = (panels + kMost - 1) / kMost;
    for (int64_t at = 0; at < panels; ++count) {
      first[count] = at;
      at += std::max((panels - at + 2 * threads - 1) / (2 * threads), least);
    }
    first[count] = panels;
  }
};

// Calls block(row, rows, panel, panels, worker) for all of an [m, n] result. `row_block` rows share a visit of
// a panel; `group` panels make a tile. Few rows: each item streams a run of panels. Many rows: one
// group of panels at a time, used again by a block of rows.
template <class Block>
inline void split_work(Pool& pool, const Gemm& g, int64_t row_block, int64_t group, const Block& block) {
  if (g.m <= 0) return;
  const int64_t panels = (g.w.n + kPanel - 1) / kPanel;
  const int64_t row_blocks = (g.m + row_block - 1) / row_block;
  // bf16 panels are large: there short runs cost more than they give.
  if (g.m == 1 && static_cast<Form>(g.w.form) != Form::kBf16) {
    const PanelRuns runs((panels + group - 1) / group, pool.size());
    pool.parallel(runs.count, [&](int64_t item, int worker) {
      const int64_t first = runs.first[item] * group, end = std::min(runs.first[item + 1] * group, panels);
      block(0, 1, first, end - first, worker);
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
    block(row, row + row_block <= g.m ? row_block : g.m - row, panel,
          panel + chunk < panels ? chunk : panels - panel, worker);
  });
}
