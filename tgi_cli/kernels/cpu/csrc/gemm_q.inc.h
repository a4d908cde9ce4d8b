// GEMM of grouped 8- and 4-bit weights by activations rounded to int8. Included once per instruction
// set, inside its namespace.
//
// Both sides are cut into runs of 32 inputs. A run's products add up exactly in int32; runs add up in
// fp32, in their order, one chain for every output element (two in wide forms: runs within their group,
// then groups). Activations are rounded to nearest with the scale (largest magnitude / 127) of their own
// row and run. So an output element depends on its own row and column alone, and equals that of every
// other instruction set bit for bit.

// A row's activations of one run. `start` makes good that codes have a zero point and dot4 perhaps another,
// for each part of a run with a scale of its own.
struct Activations {
  int8_t values[kRun];
  float scale;
  float sum;  // scale * sum of values: what a minimum is multiplied by
  int32_t start[2];
};

template <class G>
constexpr int32_t start_factor() {
  return kDotOffset<G::kBits> - G::kZero;
}

// Values that are not finite make the scale NaN, and so the whole output row.
template <class G>
inline void quantize_run(const bf16* x, Activations* out) {
  constexpr int kPer = kRun / kLanes;
  vf v[kPer], largest = zero(), poison = zero();
  for (int i = 0; i < kPer; ++i) {
    v[i] = load_bf16(x + i * kLanes);
    largest = max(largest, max(v[i], sub(zero(), v[i])));
    poison = fma(v[i], zero(), poison);
  }
  const float magnitude = hmax(largest);
  // Below this, 127 / magnitude overflows; such a group counts as zero.
  const float inverse = magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
  int32_t sums[2] = {0, 0};
  for (int i = 0; i < kPer; ++i)
    sums[i * kLanes / 16] += round_to_int8(mul(v[i], set1(inverse)), out->values + i * kLanes);
  out->scale = magnitude * (1.0f / 127.0f) + sum(poison);
  out->sum = out->scale * static_cast<float>(sums[0] + sums[1]);
  out->start[0] = start_factor<G>() * (G::kParts == 1 ? sums[0] + sums[1] : sums[0]);
  out->start[1] = start_factor<G>() * sums[1];
}

// A row's activations of run i: where they lie, or gathered into `run`.
inline const bf16* run_of(const Gemm& g, int64_t row, int64_t i, bf16* run) {
  const bf16* x = g.x + row * g.ldx;
  if (g.w.order == nullptr) return x + i * kRun;
  for (int64_t j = 0; j < kRun; ++j) run[j] = x[g.w.order[i * kRun + j]];
  return run;
}

// Adds the products of a run's codes, or of one part of them, for kRows rows, `stride` apart.
template <class G, int kRows, int kVectors>
inline void add_dots(const Activations* x, int64_t stride, const uint8_t* codes, int first, int part,
                     vi (&dot)[kRows][kVectors]) {
  constexpr int kFours = 8 / G::kParts;  // of inputs
  if (G::kBits == 8) {
#pragma GCC unroll 8
    for (int four = part * kFours; four < (part + 1) * kFours; ++four) {
      vi code[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) code[v] = load_pairs(codes + (four * kPanel + (first + v) * kLanes) * 4);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vi a = broadcast_pair(x[r * stride].values + four * 4);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) dot4<8>(dot[r][v], code[v], a);
      }
    }
    return;
  }
  const vi low = set1_int(0x0f0f0f0f);
#pragma GCC unroll 8
  for (int eight = 0; eight < 4; ++eight) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vi code[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vi both = load_pairs(codes + (eight * kPanel + (first + v) * kLanes) * 4);
        code[v] = bit_and(half == 0 ? both : shift_right(both, 4), low);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vi a = broadcast_pair(x[r * stride].values + eight * 8 + half * 4);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) dot4<4>(dot[r][v], code[v], a);
      }
    }
  }
}

template <class G, int kRows, int kVectors>
inline void start_dots(const Activations* x, int64_t stride, int part, vi (&dot)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) dot[r][v] = set1_int(start_factor<G>() != 0 ? x[r * stride].start[part] : 0);
}

// A lone row streams and looks ahead in its own panel, further rows in the next one. Codes of 4 bits, for
// which there are twice as many instructions to a byte, were measured 5 to 10 % faster this way.
template <class G, int kRows>
inline void fetch(const uint8_t* w, int64_t bytes, const Lookahead& ahead, int64_t step) {
  if (kRows == 1) {
#pragma GCC unroll 32
    for (int64_t line = 0; line < bytes; line += 64) {
      if (G::kBits == 4)
        prefetch_near(w + kAheadBytes * 3 / 2 + line);
      else
        prefetch(w + kAheadBytes + line);
    }
  } else {
    look_ahead<ahead_lines(kRows, G::kGroupBytes)>(ahead, step);
  }
}

// kVectors of a panel's outputs, beginning at vector `first`, for kRows rows.
template <class G, int kRows, int kVectors>
inline void grouped_tile(const Activations* x, int64_t runs, const uint8_t* w, int first, Lookahead ahead,
                         vf (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  for (int64_t left = runs; left > 0; --left, w += G::kGroupBytes, ++x) {
    const uint8_t* tail = w + G::kCodeBytes;
    fetch<G, kRows>(w, G::kGroupBytes, ahead, runs - left);
#pragma GCC unroll 2
    for (int part = 0; part < G::kParts; ++part) {
      vi dot[kRows][kVectors];
      start_dots<G>(x, runs, part, dot);
      add_dots<G>(x, runs, w, first, part, dot);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vf scale = G::scales(tail, part, (first + v) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          acc[r][v] = fma(int_to_float(dot[r][v]), mul(scale, set1(x[r * runs].scale)), acc[r][v]);
      }
    }
    if (G::kMinimum) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vf minimum = G::scales(tail, G::kParts, (first + v) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(minimum, set1(x[r * runs].sum), acc[r][v]);
      }
    }
  }
}

// The same for groups of `each` runs.
template <class G, int kRows, int kVectors>
inline void wide_tile(const Activations* x, int64_t runs, int64_t each, const uint8_t* w, int first, Lookahead ahead,
                      vf (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  for (int64_t step = 0; step < runs; w += G::kTailBytes) {
    vf within[kRows][kVectors];
    float sums[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sums[r] = 0;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) within[r][v] = zero();
    }
    for (int64_t left = each; left > 0; --left, ++step, w += G::kCodeBytes, ++x) {
      fetch<G, kRows>(w, G::kCodeBytes, ahead, step);
      vi dot[kRows][kVectors];
      start_dots<G>(x, runs, 0, dot);
      add_dots<G>(x, runs, w, first, 0, dot);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vf scale = set1(x[r * runs].scale);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) within[r][v] = fma(int_to_float(dot[r][v]), scale, within[r][v]);
        if (G::kMinimum) sums[r] += x[r * runs].sum;
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const vf scale = G::scales(w, 0, (first + v) * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r][v] = fma(within[r][v], scale, acc[r][v]);
      if (!G::kMinimum) continue;
      const vf minimum = G::scales(w, 1, (first + v) * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r][v] = fma(minimum, set1(sums[r]), acc[r][v]);
    }
  }
}

template <class G>
constexpr int most_rows() {
  return G::kWide ? kQuantWideRows : kQuantRows;
}

template <class G, int kRows>
inline void grouped_rows(const Gemm& g, const Activations* x, int64_t row, int64_t panel, Lookahead ahead) {
  constexpr int kPer = kPanel / kLanes;
  constexpr int kVectors = kRows == 1 ? kLoneVectors : kQuantVectors;
  const int64_t runs = g.w.k / kRun;
  const uint8_t* w = G::codes(g.w, panel, 0);
  vf whole[kRows][kPer];
  if (kRows > 1) expect_result(g, row, kRows, panel, 1);
#pragma GCC unroll 4
  for (int first = 0; first < kPer; first += kVectors) {
    vf acc[kRows][kVectors];
    if (G::kWide)
      wide_tile<G, kRows, kVectors>(x + row * runs, runs, G::runs(g.w), w, first, ahead, acc);
    else
      grouped_tile<G, kRows, kVectors>(x + row * runs, runs, w, first, ahead, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) whole[r][first + v] = acc[r][v];
  }
  gemm_finish(g, row, kRows, panel, whole[0], kPer);
}

// `next`: the panel to fetch meanwhile, or -1.
template <class G>
inline void grouped_block(const Gemm& g, const Activations* x, int64_t row, int64_t rows, int64_t panel, int64_t next) {
  // Tiles of nearly equal heights: 8 rows are 4 and 4 and not 6 and 2.
  constexpr int kMost = most_rows<G>();
  const int64_t all = (rows + kMost - 1) / kMost;
  const int64_t runs = g.w.k / kRun;
  const uint8_t* fetched = next < 0 ? nullptr : G::codes(g.w, next, 0);
  for (int64_t tile = 0; tile < all; ++tile) {
    const int64_t height = (rows + all - tile - 1) / (all - tile);
    const Lookahead ahead = tile_ahead(fetched, G::codes(g.w, panel, 0), tile, runs, height, G::kGroupBytes);
    with_count<kMost>(height, [&](auto n) { grouped_rows<G, decltype(n)::value>(g, x, row, panel, ahead); });
    row += height;
    rows -= height;
  }
}

// A lone row. Every thread rounds it for itself, as that takes no longer than to wait for another, and
// memory brings the beginning of its share meanwhile.
template <class G>
inline void lone_grouped(Pool& pool, const Gemm& g, G) {
  const int64_t runs = g.w.k / kRun, bytes = G::panel_bytes(g.w) / runs;
  auto* all = static_cast<Activations*>(pool.scratch(static_cast<size_t>(pool.size() * runs) * sizeof(Activations)));
  TileStreams streams((g.w.n + kPanel - 1) / kPanel, pool.width());
  pool.parallel(streams.count(), [&](int64_t share, int worker) {
    if (streams.done()) return;  // another thread has been quicker
    Activations* x = all + worker * runs;
    const uint8_t* first = G::codes(g.w, streams.first(share), 0);
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t line = 0; line < bytes; line += 64) prefetch(first + i * bytes + line);
      bf16 run[kRun];
      quantize_run<G>(run_of(g, 0, i, run), x + i);
    }
    streams.run(share, [&](int64_t panel) { grouped_block<G>(g, x, 0, 1, panel, -1); });
  });
}

template <class G>
inline void gemm_grouped(Pool& pool, const Gemm& g, G) {
  if (g.m == 1) return lone_grouped(pool, g, G{});
  const int64_t runs = g.w.k / kRun;
  auto* x = static_cast<Activations*>(pool.scratch(static_cast<size_t>(g.m * runs) * sizeof(Activations)));
  constexpr int64_t kRows = 4;
  pool.parallel((g.m + kRows - 1) / kRows, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRows < g.m ? (item + 1) * kRows : g.m;
    for (int64_t row = item * kRows; row < end; ++row)
      for (int64_t i = 0; i < runs; ++i) {
        bf16 run[kRun];
        quantize_run<G>(run_of(g, row, i, run), x + row * runs + i);
      }
  });
  split_work(pool, g, most_rows<G>() * 16, 1, [&](const Part& part) {
    for (int64_t panel = part.panel; panel < part.panel + part.panels; ++panel)
      grouped_block<G>(g, x, part.row, part.rows, panel, part.after(panel, 1));
  });
}

