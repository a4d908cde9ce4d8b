// GEMM of grouped 8- and 4-bit weights by activations rounded to int8. Included once per instruction
// set, inside its namespace.
//
// Both sides are cut into groups of 32 inputs. A group's products add up exactly in int32; groups add
// up in fp32, in their order, one chain for every output element. Activations are rounded to nearest
// with the scale (largest magnitude / 127) of their own row and group. So an output element depends
// on its own row and column alone, and equals that of every other instruction set bit for bit.
//
// A panel is a stream of groups, each: codes, 32 scales (twice 32 with one for each 16 inputs), 32
// minima if the form has them. 8-bit codes: [8 runs of 4 inputs][32 outputs][4]. 4-bit codes: [4 runs of
// 8 inputs][32 outputs][4], the first four inputs in the low halves of the bytes, the others above.

constexpr int kQuantGroup = 32;

// A row's activations of one group. `start` cancels what the codes' zero point adds,
// for each part of a group with a scale of its own.
struct Activations {
  int8_t values[kQuantGroup];
  float scale;
  float sum;  // scale * sum of values: what a minimum is multiplied by
  int32_t start[2];
};

template <int kBitsOf, int kSpan, bool kHalf, bool kMinimumOf>
struct Grouped {
  static constexpr int kBits = kBitsOf;
  static constexpr bool kMinimum = kMinimumOf;
  static constexpr int kParts = kQuantGroup / kSpan;  // scales of an output in a group
  static constexpr int kZero = kMinimum ? 0 : kBits == 4 ? 8 : 128;
  static constexpr int64_t kCodeBytes = kPanel * kQuantGroup * kBits / 8;
  static constexpr int64_t kScaleBytes = kPanel * (kHalf ? 2 : 4);
  static constexpr int64_t kGroupBytes = kCodeBytes + kScaleBytes * (kParts + (kMinimum ? 1 : 0));

  static vf scales(const uint8_t* group, int row, int output) {  // kLanes of them
    const uint8_t* at = group + kCodeBytes + row * kScaleBytes + output * (kHalf ? 2 : 4);
    if (kHalf) return load_half(reinterpret_cast<const uint16_t*>(at));
    return load(reinterpret_cast<const float*>(at));
  }
  static float scale(const uint8_t* group, int row, int output) {
    float all[kLanes];
    store(all, scales(group, row, output / kLanes * kLanes));
    return all[output % kLanes];
  }
  static int code(const uint8_t* group, int64_t input, int64_t output) {
    if (kBits == 8) return group[(input / 4 * kPanel + output) * 4 + input % 4];
    const int byte = group[(input / 8 * kPanel + output) * 4 + input % 4];
    return input % 8 < 4 ? byte & 15 : byte >> 4;
  }
};

// Calls visit(Grouped<...>{}) for a grouped form.
template <class Visitor>
inline void visit_grouped(Form form, const Visitor& visit) {
  switch (form) {
    case Form::kInt8: return visit(Grouped<8, 32, true, false>{});
    case Form::kInt4: return visit(Grouped<4, 32, true, false>{});
    case Form::kInt4Min: return visit(Grouped<4, 32, true, true>{});
    case Form::kInt4MinF: return visit(Grouped<4, 32, false, true>{});
    case Form::kInt8MinF: return visit(Grouped<8, 32, false, true>{});
    case Form::kInt8F16: return visit(Grouped<8, 16, false, false>{});
    default: return;
  }
}

// Values that are not finite make the scale NaN, and so the whole output row.
template <class G>
inline void quantize_group(const bf16* x, Activations* out) {
  constexpr int kPer = kQuantGroup / kLanes;
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
  out->start[0] = -G::kZero * (G::kParts == 1 ? sums[0] + sums[1] : sums[0]);
  out->start[1] = -G::kZero * sums[1];
}

// kVectors of a panel's outputs, beginning at vector `first`, for kRows rows.
template <class G, int kRows, int kVectors>
inline void grouped_tile(const Activations* x, int64_t groups, const uint8_t* w, int first, Lookahead ahead,
                         vf (&acc)[kRows][kVectors]) {
  constexpr int kRuns = 8 / G::kParts;  // of four inputs
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  for (int64_t left = groups; left > 0; --left, w += G::kGroupBytes, ++x) {
    if (kRows == 1) {
#pragma GCC unroll 32
      for (int64_t line = 0; line < G::kGroupBytes; line += 64)
        prefetch(reinterpret_cast<const char*>(w) + kAheadBytes + line);
    } else {
      look_ahead<ahead_lines(kRows, G::kGroupBytes)>(ahead, groups - left);
    }
#pragma GCC unroll 2
    for (int part = 0; part < G::kParts; ++part) {
      vi dot[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          dot[r][v] = set1_int(G::kZero != 0 ? x[r * groups].start[part] : 0);
      if (G::kBits == 8) {
#pragma GCC unroll 8
        for (int run = part * kRuns; run < (part + 1) * kRuns; ++run) {
          vi code[kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v)
            code[v] = load_pairs(w + (run * kPanel + (first + v) * kLanes) * 4);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const vi a = broadcast_pair(x[r * groups].values + run * 4);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) dot4<8>(dot[r][v], code[v], a);
          }
        }
      } else {
        const vi low = set1_int(0x0f0f0f0f);
#pragma GCC unroll 8
        for (int run = 0; run < 4; ++run) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            vi code[kVectors];
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
              const vi both = load_pairs(w + (run * kPanel + (first + v) * kLanes) * 4);
              code[v] = bit_and(half == 0 ? both : shift_right(both, 4), low);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
              const vi a = broadcast_pair(x[r * groups].values + run * 8 + half * 4);
#pragma GCC unroll 16
              for (int v = 0; v < kVectors; ++v) dot4<4>(dot[r][v], code[v], a);
            }
          }
        }
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vf scale = G::scales(w, part, (first + v) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          acc[r][v] = fma(int_to_float(dot[r][v]), mul(scale, set1(x[r * groups].scale)), acc[r][v]);
      }
    }
    if (G::kMinimum) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const vf minimum = G::scales(w, G::kParts, (first + v) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(minimum, set1(x[r * groups].sum), acc[r][v]);
      }
    }
  }
}

constexpr int kQuantRows = TGI_ISA >= 2 ? 6 : 2;
constexpr int kQuantVectors = 2;  // with kQuantRows: 24 of 32, or 8 of 16 registers are accumulators

template <class G, int kRows>
inline void grouped_rows(const Gemm& g, const Activations* x, int64_t row, int64_t panel, Lookahead ahead) {
  constexpr int kPer = kPanel / kLanes;
  const int64_t groups = g.w.k / kQuantGroup;
  const uint8_t* w = static_cast<const uint8_t*>(g.w.data) + panel * groups * G::kGroupBytes;
  vf whole[kRows][kPer];
#pragma GCC unroll 4
  for (int first = 0; first < kPer; first += kQuantVectors) {
    vf acc[kRows][kQuantVectors];
    grouped_tile<G, kRows, kQuantVectors>(x + row * groups, groups, w, first, ahead, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kQuantVectors; ++v) whole[r][first + v] = acc[r][v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) gemm_finish(g, row + r, panel, whole[r]);
}

// `more`: the next panel is this thread's next work.
template <class G>
inline void grouped_block(const Gemm& g, const Activations* x, int64_t row, int64_t rows, int64_t panel, bool more) {
  // Tiles of nearly equal heights: 8 rows are 4 and 4 and not 6 and 2.
  const int64_t all = (rows + kQuantRows - 1) / kQuantRows;
  const int64_t groups = g.w.k / kQuantGroup;
  const char* next = static_cast<const char*>(g.w.data) + (panel + 1) * groups * G::kGroupBytes;
  for (int64_t tile = 0; tile < all; ++tile) {
    const int64_t height = (rows + all - tile - 1) / (all - tile);
    const Lookahead ahead = tile_ahead(next, tile, groups, height, G::kGroupBytes, more);
    switch (height) {
      case 1: grouped_rows<G, 1>(g, x, row, panel, ahead); break;
      case 2: grouped_rows<G, 2>(g, x, row, panel, ahead); break;
#if TGI_ISA >= 2
      case 3: grouped_rows<G, 3>(g, x, row, panel, ahead); break;
      case 4: grouped_rows<G, 4>(g, x, row, panel, ahead); break;
      case 5: grouped_rows<G, 5>(g, x, row, panel, ahead); break;
      case 6: grouped_rows<G, 6>(g, x, row, panel, ahead); break;
#endif
      default: break;
    }
    row += height;
    rows -= height;
  }
}

template <class G>
inline void gemm_grouped(Pool& pool, const Gemm& g, G) {
  const int64_t groups = g.w.k / kQuantGroup;
  auto* x = static_cast<Activations*>(pool.scratch(static_cast<size_t>(g.m * groups) * sizeof(Activations)));
  constexpr int64_t kRows = 4;
  pool.parallel((g.m + kRows - 1) / kRows, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kRows < g.m ? (item + 1) * kRows : g.m;
    for (int64_t row = item * kRows; row < end; ++row)
      for (int64_t i = 0; i < groups; ++i)
        quantize_group<G>(g.x + row * g.ldx + i * kQuantGroup, x + row * groups + i);
  });
  split_work(pool, g, kQuantRows * 16, 1, [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t end = panel + panels; panel < end; ++panel)
      grouped_block<G>(g, x, row, rows, panel, panel + 1 < end);
  });
}

void gemm(Pool& pool, const Gemm& g) {
  const auto form = static_cast<Form>(g.w.form);
  if (g.m <= 0) return;
  if (form == Form::kBf16) return gemm_bf16(pool, g);
  visit_grouped(form, [&](auto grouped) { gemm_grouped(pool, g, grouped); });
}

// Missing outputs of the last panel have the code 0 and the scale 0.
template <class G>
inline void pack_panels(const PackGrouped& a, G) {
  const int64_t groups = a.w.k / kQuantGroup;
  const int64_t size = G::kScaleBytes / kPanel;  // of a scale
  auto* out = static_cast<uint8_t*>(const_cast<void*>(a.w.data));
  const int64_t panels = (a.w.n + kPanel - 1) / kPanel;
  std::memset(out, 0, static_cast<size_t>(panels * groups * G::kGroupBytes));
  for (int64_t n = 0; n < a.w.n; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* group = out + (n / kPanel * groups + g) * G::kGroupBytes;
      const uint8_t* codes = a.codes + n * a.w.k + g * kQuantGroup;
      const int64_t j = n % kPanel;
      for (int64_t i = 0; i < kQuantGroup; i += 4) {
        if (G::kBits == 8) {
          std::memcpy(group + (i / 4 * kPanel + j) * 4, codes + i, 4);
        } else {
          uint8_t* at = group + (i / 8 * kPanel + j) * 4;
          for (int64_t b = 0; b < 4; ++b) at[b] |= static_cast<uint8_t>(codes[i + b] << (i % 8));
        }
      }
      uint8_t* at = group + G::kCodeBytes + j * size;
      const auto* scales = static_cast<const uint8_t*>(a.scales);
      for (int part = 0; part < G::kParts; ++part)
        std::memcpy(at + part * G::kScaleBytes, scales + ((n * groups + g) * G::kParts + part) * size,
                    static_cast<size_t>(size));
      if (G::kMinimum)
        std::memcpy(at + G::kScaleBytes, static_cast<const uint8_t*>(a.minima) + (n * groups + g) * size,
                    static_cast<size_t>(size));
    }
}

void pack_grouped(const PackGrouped& a) {
  visit_grouped(static_cast<Form>(a.w.form), [&](auto grouped) { pack_panels(a, grouped); });
}

template <class G>
inline void embed_grouped(const Matrix& table, int64_t id, float factor, float* out, G) {
  const int64_t groups = table.k / kQuantGroup;
  const auto* group = static_cast<const uint8_t*>(table.data) + id / kPanel * groups * G::kGroupBytes;
  const int j = static_cast<int>(id % kPanel);
  constexpr int kSpan = kQuantGroup / G::kParts;
  for (int64_t g = 0; g < groups; ++g, group += G::kGroupBytes)
    for (int part = 0; part < G::kParts; ++part) {
      const float scale = G::scale(group, part, j);
      const float minimum = G::kMinimum ? G::scale(group, G::kParts, j) : 0.0f;
      for (int i = part * kSpan; i < (part + 1) * kSpan; ++i) {
        const int code = G::code(group, i, j) - G::kZero;
        out[g * kQuantGroup + i] = factor * (static_cast<float>(code) * scale + minimum);
      }
    }
}

void embed(Pool& pool, const Embed& a) {
  constexpr int64_t kTokens = 16;
  const int64_t dim = a.table.k;
  const auto form = static_cast<Form>(a.table.form);
  pool.parallel((a.tokens + kTokens - 1) / kTokens, [&](int64_t item, int) {
    const int64_t end = (item + 1) * kTokens < a.tokens ? (item + 1) * kTokens : a.tokens;
    for (int64_t t = item * kTokens; t < end; ++t) {
      float* out = a.out + t * dim;
      const int64_t id = a.ids[t];
      const bool panels = form == Form::kBf16;
      if (panels || form == Form::kRows) {
        // Consecutive pairs of a row lie one panel width apart when packed.
        const bf16* row = static_cast<const bf16*>(a.table.data) +
                          (panels ? (id / kPanel * (dim / 2) * kPanel + id % kPanel) * 2 : id * dim);
        const int64_t stride = panels ? 2 * kPanel : 2;
        for (int64_t i = 0; i < dim / 2; ++i) {
          out[2 * i] = a.scale * to_float(row[i * stride]);
          out[2 * i + 1] = a.scale * to_float(row[i * stride + 1]);
        }
      } else {
        visit_grouped(form, [&](auto grouped) { embed_grouped(a.table, id, a.scale, out, grouped); });
      }
    }
  });
}
