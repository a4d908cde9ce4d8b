// Low-rank adapters (LoRA; Hu et al., 2021) on top of weights of any form: rows that have one get
// scale * (x @ a.T) @ b added to what the weights gave. Included once per instruction set, after the epilogues.
//
// Both products are float32, and the order of summation of an element depends on its own row alone: over k in
// vectors and then their lanes, over the ranks one after the other. Rows without an adapter are not touched.

// Products of one row with kRanks rows of `a`, scaled. k is a multiple of 16.
template <int kRanks>
inline void lora_dots(const bf16* x, const bf16* a, int64_t k, float scale, float* out) {
  constexpr int64_t kStep = 2 * kLanes;
  vf acc[kRanks];
#pragma GCC unroll 8
  for (int r = 0; r < kRanks; ++r) acc[r] = zero();
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    const vi row = load_pairs(x + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRanks; ++r) dot2(acc[r], load_pairs(a + r * k + i), row);
  }
  if (i < k) {
    bf16 row[kStep] = {}, other[kStep] = {};
    std::memcpy(row, x + i, static_cast<size_t>(k - i) * sizeof(bf16));
    for (int r = 0; r < kRanks; ++r) {
      std::memcpy(other, a + r * k + i, static_cast<size_t>(k - i) * sizeof(bf16));
      dot2(acc[r], load_pairs(other), load_pairs(row));
    }
  }
  for (int r = 0; r < kRanks; ++r) out[r] = scale * sum(acc[r]);
}

inline void lora_shrink(const LoraPart& part, const bf16* x, int64_t k, float* out) {
  int64_t r = 0;
  for (; r + 8 <= part.rank; r += 8) lora_dots<8>(x, part.a + r * k, k, part.scale, out + r);
  for (; r < part.rank; ++r) lora_dots<1>(x, part.a + r * k, k, part.scale, out + r);
}

// Runs of 16 columns, from `run` on, of what one part adds.
template <int kRuns>
inline void lora_runs(const LoraPart& part, const float* shrunk, int64_t run, float* out) {
  constexpr int kPer = 16 / kLanes;
  vf acc[kRuns * kPer];
#pragma GCC unroll 16
  for (int v = 0; v < kRuns * kPer; ++v) acc[v] = zero();
  const bf16* b = part.b + run * 16;
  for (int64_t r = 0; r < part.rank; ++r, b += part.columns) {
    const vf factor = set1(shrunk[r]);
#pragma GCC unroll 16
    for (int v = 0; v < kRuns * kPer; ++v) acc[v] = fma(load_bf16(b + v * kLanes), factor, acc[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < kRuns * kPer; ++v) {
    float* at = out + part.first + (run + v / kPer) * part.stride + v % kPer * kLanes;
    store(at, add(load(at), acc[v]));
  }
}

void lora(Pool& pool, const Lora& l) {
  int64_t width = 0;
  for (int64_t i = 0; i < l.count; ++i) {
    const LoraParts& parts = l.adapters[l.slots[l.rows[i]]][l.index];
    int64_t ranks = 0;
    for (int64_t p = 0; p < parts.count; ++p) ranks += parts.parts[p].rank;
    width = ranks > width ? ranks : width;
  }
  if (width == 0) return;
  float* shrunk = static_cast<float*>(pool.scratch(static_cast<size_t>(l.count * width) * sizeof(float)));
  pool.parallel(l.count, [&](int64_t i, int) {
    const int64_t row = l.rows[i];
    const LoraParts& parts = l.adapters[l.slots[row]][l.index];
    float* out = shrunk + i * width;
    for (int64_t p = 0; p < parts.count; out += parts.parts[p].rank, ++p)
      lora_shrink(parts.parts[p], l.x + row * l.k, l.k, out);
  });
  // Few rows: their columns are split as well, so that every thread has some.
  const int64_t splits = l.count >= 4 * pool.size() ? 1 : 4;
  pool.parallel(l.count * splits, [&](int64_t item, int) {
    const int64_t i = item / splits, split = item % splits;
    const int64_t row = l.rows[i];
    const LoraParts& parts = l.adapters[l.slots[row]][l.index];
    const float* in = shrunk + i * width;
    for (int64_t p = 0; p < parts.count; in += parts.parts[p].rank, ++p) {
      const LoraPart& part = parts.parts[p];
      const int64_t runs = part.columns / 16;
      int64_t run = runs * split / splits;
      const int64_t end = runs * (split + 1) / splits;
      for (; run + 4 <= end; run += 4) lora_runs<4>(part, in, run, l.out + row * l.ldo);
      for (; run < end; ++run) lora_runs<1>(part, in, run, l.out + row * l.ldo);
    }
  });
}

// The gated activations apart from their GEMM, with the same bits as its epilogue gives.
void activate(Pool& pool, const Activate& a) {
  const bool is_silu = a.activation == static_cast<int32_t>(Epilogue::kSiluMul);
  pool.parallel(a.rows, [&](int64_t row, int) {
    const float* x = a.x + row * 2 * a.n;
    bf16* out = a.out + row * a.n;
    for (int64_t i = 0; i < a.n; i += kLanes) {
      const float* gate = x + i / 16 * 32 + i % 16;
      const vf value = is_silu ? silu(load(gate)) : gelu_tanh(load(gate));
      store_bf16(out + i, mul(value, load(gate + 16)));
    }
  });
}
